"""The layout is a promise: imports point one way, module by module, and the public names are there."""

import ast
from pathlib import Path

from imports import cycles, module_imports, modules, parsed, room_imports, room_of

import rmprune

PACKAGE = Path(rmprune.__file__).parent
# From the top down, as in docs and DESIGN.md; a room imports from the rooms below it.
ROOMS = (
    "__main__",
    "cli",
    "__init__",
    "pipelines",
    "report",
    "methods",
    "amc",
    "pruning",
    "training",
    "measure",
    "removal",
    "artifact",
    "onnx",
    "models",
    "data",
    "runs",
    "graph",
    "config",
    "errors",
)


def test_every_module_has_its_room() -> None:
    assert {room_of(module) for module in module_imports(PACKAGE)} == set(ROOMS)


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, imported in module_imports(PACKAGE).items()
        for other in imported
        if ROOMS.index(room_of(other)) < ROOMS.index(room_of(module))
    ]
    assert not wrong, wrong


def test_no_module_imports_itself_through_others() -> None:
    assert cycles(module_imports(PACKAGE)) == []


def test_names_are_imported_from_where_they_stand() -> None:
    """Of a module; what a package gives stands in one of its modules."""
    files = {name: path for name, path in modules(PACKAGE).items() if path.name != "__init__.py"}
    wrong = [
        f"{name} takes {alias.name} from {node.module}"
        for name, path in files.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.module in files
        for alias in node.names
        if alias.name in _imported_names(files[node.module])
    ]
    assert not wrong, wrong


def _imported_names(path: Path) -> set[str]:
    imports = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def test_a_cycle_would_be_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_the_report_reads_records_settings_and_errors_alone() -> None:
    imported = module_imports(PACKAGE)
    read = {other for module in imported if room_of(module) == "report" for other in imported[module]}
    assert {other for other in read if room_of(other) != "report"} <= {
        "rmprune.runs.records",
        "rmprune.runs.writing",
        "rmprune.config",
        "rmprune.errors",
    }


def test_removal_knows_no_pruning_and_the_graph_knows_nobody() -> None:
    rooms = room_imports(PACKAGE)
    assert set(rooms["graph"]) == {"errors"} and set(rooms["removal"]) <= {"graph", "errors"}


def test_public_names() -> None:
    for name in rmprune.__all__:
        assert getattr(rmprune, name) is not None


SHARED = {"logger", "Config", "SCHEMA", "NAMES", "PATTERN", "BATCH"}
"""Names that mean the same wherever they stand: the package's logger, any config, a file's version, a family's names, a batch."""


def defined(path: Path) -> dict[str, ast.stmt]:
    """Public names that a module defines, with their statements; type variables of one letter are no names."""
    found: dict[str, ast.stmt] = {}
    for node in parsed(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [getattr(t, "id", "_") for t in targets]
        )
        found |= {name: node for name in names if not name.startswith("_") and len(name) > 1}
    return found


def test_one_word_has_one_meaning() -> None:
    where: dict[str, list[str]] = {}
    for module, path in modules(PACKAGE).items():
        for name in defined(path):
            if name not in SHARED and room_of(module) not in ("cli", "pipelines"):
                where.setdefault(name, []).append(module)
    assert not {name: found for name, found in where.items() if len(found) > 1}


def test_every_public_function_says_what_it_gives() -> None:
    silent = [
        f"{module}.{name}"
        for module, path in modules(PACKAGE).items()
        for name, node in defined(path).items()
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not ast.get_docstring(node)
    ]
    assert not silent, silent
