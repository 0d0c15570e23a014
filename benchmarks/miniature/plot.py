"""The plot of claims: each claim's effect with its standard error, coloured by its verdict, as SVG text.

It owns the drawing alone. An effect is the mean difference as a share of the other row's value, so that claims in
different measures stand on one axis; to the right the claim's row is the better one, margins left out.
"""

import html
from collections.abc import Sequence

from benchmarks.miniature.claims import Finding

COLORS = {"confirmed": "#1a7f37", "undecided": "#6e7781", "contradicted": "#cf222e"}
LABEL, WIDTH, ROW, TOP, BOTTOM = 500, 420, 20, 40, 30
LIMIT = 1.0
"""Effects beyond this are drawn at the edge."""


def claims_plot(findings: Sequence[Finding]) -> str:
    height = TOP + ROW * len(findings) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + WIDTH + 20}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="{height}" fill="white"/>',
        *_axis(height - BOTTOM),
    ]
    for index, finding in enumerate(findings):
        parts += _line(finding, TOP + ROW * (index + 0.5))
    for index, (word, color) in enumerate(COLORS.items()):
        x = LABEL + 10 + 110 * index
        parts.append(f'<circle cx="{x}" cy="16" r="5" fill="{color}"/><text x="{x + 9}" y="20">{word}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(bottom: float) -> list[str]:
    parts: list[str] = []
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x, stroke = _x(share), "#1f2328" if share == 0 else "#d0d7de"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{100 * share:+.0f} %</text>')
    return parts


def _line(finding: Finding, y: float) -> list[str]:
    color, scale = COLORS[finding.verdict], abs(finding.than_mean) or 1.0
    effect, error = finding.mean / scale, finding.standard_error / scale
    low, high = _x(effect - error), _x(effect + error)
    return [
        f'<text x="{LABEL - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(finding.claim.says)}</text>',
        f'<line x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}" stroke="{color}" stroke-width="2"/>',
        f'<circle cx="{_x(effect):.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>',
    ]


def _x(share: float) -> float:
    return LABEL + 10 + (max(-LIMIT, min(LIMIT, share)) + LIMIT) / (2 * LIMIT) * (WIDTH - 20)
