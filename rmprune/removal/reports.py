"""What removal says of each residual, and of the whole network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockReport:
    """One residual addition: whether it can go, how, and what its layers cost before and after.

    macs are multiply-accumulates for one image of the given size, params the values of all parameters. `macs_after` and
    `params_after` are those of the network that is built with these settings: a layer fused from two counts with the block of the
    second, or else of the first; the layers of a block inside another count with the outer one, too.

    form is how copies pass the activations: `free` (already where the activation is the identity), `shift`, `pair`, `slope`, `slice`
    (beside it, by slices and a concatenation), `linear` (no activation in between), and `gate` where they pass a gate that is
    exactly 1 for them; or several joined by `+`. note: a limit of the exactness that a user has to know.
    """

    name: str
    removable: bool
    reason: str = ""
    form: str = ""
    shortcut: str = ""
    reserved: int = 0
    macs_before: int = 0
    macs_after: int = 0
    params_before: int = 0
    params_after: int = 0
    note: str = ""


class Plan(list[BlockReport]):
    """The reports in topological order. macs_change, params_change: what the whole network has more than the original after all."""

    macs_change: int = 0
    params_change: int = 0

    def _repr_html_(self) -> str:
        """What a notebook shows: a row for each residual."""
        import pandas as pd

        names = ("removable", "form", "shortcut", "reserved", "macs_before", "macs_after", "reason")
        rows = {block.name: {name: getattr(block, name) for name in names} for block in self}
        return pd.DataFrame.from_dict(rows, orient="index", columns=names).to_html(border=0)
