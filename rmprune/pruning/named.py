"""Names that a user gives to `prune`: modules that stay whole, groups with widths of their own. Those that are not there are refused."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.facts import facts_of
from rmprune.graph.inputs import as_names
from rmprune.pruning.groups import Structure


def few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def leave_whole(structure: Structure, model: nn.Module, names: Iterable[str] | None) -> Structure:
    """The same network with the output channels of the modules of these names left whole (of a block: of each layer in it).

    Raises ConfigError for a name that is not there, with those like it, and for a module with no channels of its own.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}  # of several names, the one groups know
    of: dict[str, str] = {}
    for name in as_names(names, "ignore"):
        if name not in known or not name:
            near = difflib.get_close_matches(name, known, 5, 0.4) or list(known)[1:6]
            raise ConfigError(f"ignore names {name!r}, which is no module of the network; there are: {', '.join(near)}")
        own = [first[id(part)] for part in known[name].modules()]
        if not any(True for _ in known[name].parameters()):
            raise ConfigError(
                f"ignore names {name!r}, which has no channels of its own; name the layer whose it passes on"
            )
        of |= dict.fromkeys(own, name)
    reasons = {
        g.name: f"ignore={of[m.layer]!r}"
        for g in structure.groups
        for m in g.members
        if m.side != "in" and m.layer in of
    }
    if reasons and len(reasons) == len(structure.groups):
        raise UnsupportedModel(f"nothing can be pruned: ignore leaves every channel ({', '.join(reasons)})")
    return structure.without(reasons) if reasons else structure


def refuse_unknown(structure: Structure, model: nn.Module, **widths: Mapping[str, int] | None) -> None:
    """Raises ConfigError where one of these settings names no group; of a network that was cut, whose groups may be fewer, no layer."""
    known = {*structure.units} | ({n for n, _ in model.named_modules()} if "kept" in facts_of(model) else set())
    for setting, units in widths.items():
        if not isinstance(units or {}, Mapping) or not all(hasattr(u, "__index__") for u in (units or {}).values()):
            raise ConfigError(f"{setting} is {units!r}; give {{group: units, a whole number}}")
        for name in units or ():
            if name not in known and name.partition("[")[0] not in known:
                near = difflib.get_close_matches(str(name), structure.units, 5, 0.4) or list(structure.units)[:5]
                raise ConfigError(
                    f"{setting} names {name!r}, which is no group of channels; there are: {', '.join(near)}"
                )
