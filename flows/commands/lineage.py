"""A lineage drawn: as a text tree, as DOT for Graphviz, as one HTML page with its picture in it.

It owns how the graph looks; what is in it is `infra.registry.lineage`'s.
"""

from collections import defaultdict
from html import escape

from infra.registry.lineage import Lineage, Node

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 250, 86, 90, 26, 24
"""Of a node's box and of the space around it, in pixels."""


def as_text(graph: Lineage) -> str:
    """A tree from the artifact down to what it was first made from; what was shown above is only named again."""
    lines: list[str] = []
    shown: set[str] = set()

    def show(digest: str, role: str, indent: str, branch: str, below: str) -> None:
        node = graph.nodes[digest]
        again = digest in shown and bool(graph.parents(digest))
        lines.append(f"{indent}{branch}{role}{node.title}{' (above)' if again else ''}")
        if again:
            return
        shown.add(digest)
        edges = graph.parents(digest)
        inner = indent + below
        lines.extend(f"{inner}{'│ ' if edges else '  '}{line}" for line in _facts(node))
        for place, edge in enumerate(edges):
            last = place == len(edges) - 1
            show(edge.parent, f"{edge.role}: ", inner, "└─ " if last else "├─ ", "   " if last else "│  ")

    show(graph.root, "", "", "", "")
    return "\n".join(lines)


def as_dot(graph: Lineage) -> str:
    """For Graphviz; edges run from what was there first to what was made from it."""
    lines = ["digraph lineage {", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif"];']
    for node in graph.nodes.values():
        label = "\\n".join(_quoted(line) for line in (node.title, *_facts(node)))
        style = ', color="red"' if node.overrides or node.manifest is None else ""
        lines.append(f'  "{node.digest}" [label="{label}"{style}];')
    lines += [f'  "{edge.parent}" -> "{edge.child}" [label="{_quoted(edge.role)}"];' for edge in graph.edges]
    return "\n".join([*lines, "}"])


def as_html(graph: Lineage) -> str:
    """One page that needs nothing from elsewhere: the picture, and a table of every artifact."""
    title = escape(graph.nodes[graph.root].title)
    rows = "\n".join(_row(node) for node in graph.nodes.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Lineage of {title}</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #1d2330 }}
svg {{ max-width: 100%; height: auto }} td, th {{ text-align: left; padding: .2em 1em .2em 0; vertical-align: top }}
.bad {{ color: #b3261e }} code {{ font-size: 12px }}
</style></head><body>
<h1>Lineage of {title}</h1>
{_picture(graph)}
<table><tr><th>artifact</th><th>made</th><th>by</th><th>promoted</th></tr>
{rows}
</table></body></html>
"""


def _facts(node: Node) -> list[str]:
    """The few lines a person looks for first."""
    if node.manifest is None:
        return ["no longer in the store"]
    made = node.manifest
    code = f", commit {made.code.commit[:10]}" if made.code.commit else ""
    code += " with changes of its own" if made.code.modified else ""
    facts = [f"made {made.created_at:%Y-%m-%d %H:%M}, version {made.code.version}{code}"]
    if "heldout_loss" in made.metrics:
        facts.append(f"heldout_loss {made.metrics['heldout_loss']:.4g}")
    refs = dict.fromkeys(f"{move.name} #{move.generation}" for move in node.moves)
    facts += [f"promoted: {', '.join(refs)}"] if refs else []
    return facts + [f"GATE OVERRIDDEN {reason}" for reason in node.overrides]


def _row(node: Node) -> str:
    made, code = ("-", "-")
    if node.manifest is not None:
        made = f"{node.manifest.created_at:%Y-%m-%d %H:%M}"
        code = f"{node.manifest.code.version} {(node.manifest.code.commit or '')[:10]}"
    refs = ", ".join(dict.fromkeys(f"{move.name} #{move.generation}" for move in node.moves))
    bad = "".join(f'<div class="bad">gate overridden: {escape(reason)}</div>' for reason in node.overrides)
    title = escape(node.title.rpartition(" ")[0])
    cells = (f"{title}<br><code>{node.digest}</code>", made, escape(code), escape(refs) + bad)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _picture(graph: Lineage) -> str:
    places = _places(graph)
    wide = max(x for x, _ in places.values()) + WIDTH + MARGIN
    high = max(y for _, y in places.values()) + HEIGHT + MARGIN
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" role="img">']
    for edge in graph.edges:
        (x, y), (to_x, to_y) = places[edge.parent], places[edge.child]
        x, y, to_y = x + WIDTH, y + HEIGHT / 2, to_y + HEIGHT / 2
        bend = (to_x - x) / 2
        curve = f"M{x} {y} C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}"
        parts.append(f'<path d="{curve}" fill="none" stroke="#8a93a6" stroke-width="1.5"/>')
        middle = f'x="{(x + to_x) / 2}" y="{(y + to_y) / 2 - 4}"'
        parts.append(f'<text {middle} font-size="10" fill="#5a6275" text-anchor="middle">{escape(edge.role)}</text>')
    parts += [_box(node, *places[digest]) for digest, node in graph.nodes.items()]
    return "\n".join([*parts, "</svg>"])


def _box(node: Node, x: float, y: float) -> str:
    bad = bool(node.overrides) or node.manifest is None
    lines = [f"<title>{escape(chr(10).join((node.title, *_facts(node))))}</title>"]
    lines.append(
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{"#fdecea" if bad else "#eef3fb"}"'
        f' stroke="{"#b3261e" if bad else "#5b7db1"}"/>'
    )
    name, _, digest = node.title.rpartition(" ")
    shown = [(name, 14, "bold"), (digest, 11, "normal"), *((line[:44], 10, "normal") for line in _facts(node)[:3])]
    for place, (text, size, weight) in enumerate(shown):
        at = f'x="{x + 12}" y="{y + 20 + 15 * place}" font-size="{size}" font-weight="{weight}"'
        lines.append(f"<text {at}>{escape(text)}</text>")
    return f"<g>{''.join(lines)}</g>"


def _places(graph: Lineage) -> dict[str, tuple[float, float]]:
    """Left upper corner of every box: the artifact at the right, each parent left of all that came from it."""
    depth = {graph.root: 0}
    waiting = [graph.root]
    while waiting:  # ends: an artifact is named by its content's digest, so none can be its own ancestor
        digest = waiting.pop()
        for edge in graph.parents(digest):
            if depth.get(edge.parent, -1) <= depth[digest]:
                depth[edge.parent] = depth[digest] + 1
                waiting.append(edge.parent)
    columns: dict[int, list[str]] = defaultdict(list)
    for digest in graph.nodes:
        columns[depth[digest]].append(digest)
    deepest, tallest = max(columns), max(map(len, columns.values()))
    places: dict[str, tuple[float, float]] = {}
    for column, digests in columns.items():
        free = (tallest - len(digests)) * (HEIGHT + GAP_Y) / 2
        for row, digest in enumerate(digests):
            y = MARGIN + free + row * (HEIGHT + GAP_Y)
            places[digest] = (MARGIN + (deepest - column) * (WIDTH + GAP_X), y)
    return places


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
