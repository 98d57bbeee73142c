"""The layout is a promise: imports point one way, modules stay small, and the public names are there."""

import ast
from pathlib import Path

import rmprune

PACKAGE = Path(rmprune.__file__).parent
# From the bottom up; a package may import from its own layer and from lower ones.
LAYERS = [
    {"errors"},
    {"config", "vocabulary"},
    {"configfile", "architecture", "rebuild", "onnx_export", "records"},
    {"artifact", "rundir"},
    {"data", "data_sources", "data_folder", "models"},
    {"removal", "training", "measure", "loading"},
    {"pruning", "collapse"},
    {"amc", "timed", "report", "methods", "starting"},
    {"cutter"},
    {"slimming"},
    {"candidates"},
    {"pipelines"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rmprune":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rmprune.")}
    return found


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imports(path)
        if name in RANK and RANK[name] > RANK[part(path)]
    ]
    assert not wrong, wrong


def test_every_module_has_its_layer() -> None:
    assert {part(path) for path in PACKAGE.rglob("*.py")} <= set(RANK)


def test_the_report_reads_records_and_nothing_else() -> None:
    read = set().union(*(imports(path) for path in (PACKAGE / "report").rglob("*.py")))
    assert read <= {"report", "records", "config", "errors"}


def test_public_names() -> None:
    for name in rmprune.__all__:
        assert getattr(rmprune, name) is not None
