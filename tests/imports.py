"""The drawing of imports: `python tests/imports.py [PACKAGE]` prints rooms, floors, arrows and cycles of a package on disk.

A room is a package or a loose module directly below the root; an arrow is one room importing another, lazily or not. The floor of a
room is one above the highest that it imports, rooms of a cycle counted as one. tests/test_layout.py holds rmprune to its drawing.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package, itself included."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def module_imports(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports anywhere; a name out of a package counts as that package."""
    known = modules(package)
    return {name: set(_imported(path, known, package.name)) - {name} for name, path in known.items()}


def _imported(path: Path, known: Mapping[str, Path], root: str) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == root:
            assert node.level == 0 and node.module in known, f"{path}: imports {node.module}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known and not _is_shadowed(known[node.module], alias.name) else node.module


def _is_shadowed(init: Path, name: str) -> bool:
    """Whether a package takes `name` from a module of its own, so that importing it from the package is no module."""
    statements = parsed(init).body
    return any(isinstance(n, ast.ImportFrom) and name in {a.asname or a.name for a in n.names} for n in statements)


def room_of(module: str) -> str:
    """The package or loose module below the root that holds this module."""
    return [*module.split("."), "__init__"][1]


def room_imports(package: Path) -> dict[str, Counter[str]]:
    """Room -> the rooms it imports, and by how many of its modules."""
    rooms: dict[str, Counter[str]] = {}
    for module, imported in module_imports(package).items():
        own = room_of(module)
        rooms.setdefault(own, Counter()).update({room_of(other) for other in imported} - {own})
    return rooms


def cycles(graph: Graph) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Node -> its floor, from 0."""
    merged = {node: "+".join(component) for component in cycles(graph) for node in component}
    top = {node: merged.get(node, node) for node in graph}
    below: dict[str, set[str]] = {}
    for node, others in graph.items():
        below.setdefault(top[node], set()).update({top[other] for other in others} - {top[node]})
    heights: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in heights:
            heights[node] = 1 + max((height(other) for other in below[node]), default=-1)
        return heights[node]

    return {node: height(top[node]) for node in graph}


def draw(package: Path) -> str:
    """Rooms by floor, the top one first, each with its modules and lines and the rooms that it imports."""
    arrows, files = room_imports(package), modules(package)
    graph = {room: set(others) for room, others in arrows.items()}
    floor, lines = floors(graph), Counter[str]()
    size = Counter(room_of(module) for module in files)
    for module, path in files.items():
        lines[room_of(module)] += len(path.read_text().splitlines())
    inside = cycles(module_imports(package))
    text = [
        f"{package}: {len(graph)} rooms on {max(floor.values()) + 1} floors, {sum(map(len, graph.values()))} arrows, "
        f"{len(cycles(graph))} cycles of rooms, {len(inside)} cycles of modules; {len(files)} modules, {sum(lines.values())} lines",
    ]
    for room in sorted(graph, key=lambda room: (-floor[room], room)):
        below = ", ".join(sorted(graph[room], key=lambda other: -floor[other]))
        text.append(f"{floor[room]:3}  {room:14} {size[room]:3} modules {lines[room]:6} lines  -> {below}")
    text += [f"cycle: {' <-> '.join(cycle)}" for cycle in (*cycles(graph), *inside)]
    return "\n".join(text)


if __name__ == "__main__":
    print(draw(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "rmprune")))
