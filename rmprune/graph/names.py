"""Names of layers in the code that torch.fx writes of a graph: words of Python, and what a GraphModule calls its own."""

import keyword

from torch import fx, nn

from rmprune.errors import UnsupportedModel

_HELD = ("meta", "shape_env")  # by a GraphModule itself, beside what its class has
RESERVED = frozenset((*keyword.kwlist, "self", *_HELD, *dir(fx.GraphModule), *dir(nn.Module())))
"""What an input or a layer that is named here is not called: the code of its graph could not be read, or lost something of its own."""


class _Word(str):
    """A part of a path that is a keyword: torch.fx writes getattr(self, "class") for what is no identifier."""

    def isidentifier(self) -> bool:
        return False


class _Path(str):
    def split(self, *separator: str, **rest: int) -> list[str]:  # type: ignore[override]
        return [_Word(part) if keyword.iskeyword(part) else part for part in super().split(*separator, **rest)]  # type: ignore[arg-type]


def spelled(path: str) -> str:
    """The same path, of which torch.fx writes code that Python reads although a part of it is a keyword (`heads.class`)."""
    return _Path(path) if any(map(keyword.iskeyword, path.split("."))) else path


def spell(graph: fx.Graph) -> None:
    """The paths of a graph, `spelled`, in place."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = spelled(str(node.target))


def is_taken(name: str) -> bool:
    """Whether a GraphModule has something else under this name."""
    return name in _HELD or (hasattr(fx.GraphModule, name) and not hasattr(nn.Module, name))


def refuse_taken(model: nn.Module) -> None:
    """Raise UnsupportedModel where a GraphModule could not hold what this network holds."""
    for name in (*model._modules, *model._parameters, *model._buffers):
        if is_taken(name):
            raise UnsupportedModel(
                f"{type(model).__name__}: torch.fx calls something of its own {name!r}; rename this layer"
            )
