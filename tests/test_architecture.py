"""The house keeps its rules: one-way rooms, one door a heavy library, small modules, a docstring each.

Layers and doors are contracts in `pyproject.toml`; here they are run, and shown to catch what they must.
"""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ROOMS = ("flows", "infra", "export", "model", "monitoring", "benchmarks")
LIBRARY_ROOMS = ("infra", "export", "model", "monitoring")
MODULES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
SWAMPS = {"utils", "util", "common", "helpers", "misc", "base", "manager"}
MODULE_LINES = 400
FUNCTION_LINES = 80
MODULES_A_PACKAGE = 14


# What `pip install` brings for a machine with the hardware, not for every machine.
OPTIONAL = {"tensorrt"}
EXTRAS = ("demo", "cluster")
"""Of what the rooms import, what a user asks for by name."""


def tree(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text())


def imported(module: Path) -> set[str]:
    """Top-level names a module imports, at its head or inside a function."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def small_house(tmp_path: Path) -> Path:
    """The rooms with nothing in them but a used door; `flows` has no `__init__.py` here either."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / ("catalog.py" if room == "flows" else "__init__.py")).touch()
    (tmp_path / "infra" / "store").mkdir()
    (tmp_path / "infra" / "store" / "__init__.py").touch()
    (tmp_path / "infra" / "store" / "s3_client.py").write_text("import boto3\n")
    return tmp_path


def test_rooms_depend_one_way_and_heavy_libraries_have_one_door() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


STRAYS = {
    "model.one -> infra.store": "import infra.store",
    "infra.two -> flows.catalog": "from flows import catalog",
    "export.three -> flows.catalog": "import flows.catalog",
    "monitoring.four -> model": "import model",
    "flows.five -> benchmarks": "import benchmarks",
    "model.six -> deepspeed": "import deepspeed",
    "flows.seven -> boto3": "import boto3",
    "infra.eight -> botocore": "from botocore.config import Config",
    "infra.nine -> kubernetes": "def f():\n    import kubernetes",
    "infra.ten -> tensorrt": "import tensorrt",
    "infra.eleven -> metaflow": "from metaflow import FlowSpec",
    "infra.fourteen -> pyarrow": "import pyarrow",
    "infra.thirteen -> model_signing": "from model_signing import verifying",
    "infra.twelve -> prometheus_client": "from prometheus_client import Counter",
}


def test_the_contracts_catch_every_stray_import(small_house: Path) -> None:
    for stray, line in STRAYS.items():
        room, module = stray.partition(" ")[0].split(".")
        (small_house / room / f"{module}.py").write_text(line + "\n")
    result = lint_imports(small_house)
    assert result.returncode == 1
    assert not [stray for stray in STRAYS if stray not in result.stdout], result.stdout


def test_the_contracts_let_a_sound_house_stand(small_house: Path) -> None:
    result = lint_imports(small_house)
    assert result.returncode == 0, result.stdout + result.stderr


def names(requirements: Iterable[str]) -> list[str]:
    return [canonicalize_name(Requirement(line).name) for line in requirements]


def test_every_library_a_room_imports_is_declared() -> None:
    """What a room imports stands in pyproject.toml by name, and is not there only because something else needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra: set(names(project["optional-dependencies"][extra])) for extra in (*EXTRAS, "dev")}
    declared = set(names(project["dependencies"])).union(*(extras[extra] for extra in EXTRAS))
    providers = packages_distributions()
    undeclared = [
        f"{module} imports {library}"
        for module in MODULES
        for library in imported(module) - sys.stdlib_module_names - set(ROOMS) - OPTIONAL
        if not (library == "tests" and module.parts[0] == "benchmarks")  # they lie beside the tests, in no wheel
        if not (declared | (extras["dev"] if module.parts[0] == "benchmarks" else set()))
        & set(names(providers.get(library, [])))
    ]
    assert not undeclared


def test_flows_has_no_init_that_would_hide_metaflow_where_it_is_unpacked() -> None:
    assert not (ROOT / "flows" / "__init__.py").exists()


@pytest.mark.parametrize("room", LIBRARY_ROOMS)
def test_a_library_room_travels_with_a_flow_and_imports_nothing_by_itself(room: str) -> None:
    package = tree(Path(room, "__init__.py"))
    assert 'METAFLOW_PACKAGE_POLICY = "include"' in (ROOT / room / "__init__.py").read_text()
    assert not [node for node in ast.walk(package) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_no_flow_file_is_named_like_a_package_it_would_hide() -> None:
    assert not {path.stem for path in (ROOT / "flows").glob("*.py")} & {*ROOMS, "tests"}


def test_every_module_says_what_it_owns() -> None:
    told = [module for module in MODULES + TESTS if not module.name.startswith(("__init__", "test_"))]
    assert not [str(module) for module in told if not ast.get_docstring(tree(module))]


def test_no_module_is_named_as_a_swamp() -> None:
    assert not [str(module) for module in MODULES + TESTS if {Path(part).stem for part in module.parts} & SWAMPS]


def test_every_module_is_short_enough_to_read() -> None:
    lines = {str(module): len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert not {module: count for module, count in lines.items() if count > MODULE_LINES}


def test_every_function_is_short_enough_to_read() -> None:
    lines = {
        f"{module}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for module in MODULES + TESTS
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {function: count for function, count in lines.items() if count > FUNCTION_LINES}


def test_a_package_holds_few_modules() -> None:
    for package in sorted({(ROOT / module).parent for module in MODULES}):
        names = sorted(path.name for path in package.glob("*.py") if path.name != "__init__.py")
        assert len(names) <= MODULES_A_PACKAGE, f"{package.relative_to(ROOT)}: {len(names)} modules {names}"
