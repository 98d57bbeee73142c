"""What becomes of a trained network, as data: a choice for every residual block, a width for every channel group. Carries nothing out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from rmprune.config.pruning import PlannedChoice
from rmprune.errors import ConfigError
from rmprune.graph.network import flat_name as flat_name
from rmprune.pruning.groups import Structure
from rmprune.runs.reading import read_json

Choice = Literal[PlannedChoice, "collapse"]
"""keep: the residual stays and its channels stay tied. remove: RM, exactly, with reserved copies. fuse: as remove, and the linear
layers beside it are multiplied, as `remove_residuals` does for blocks in `fused`: an inverted residual in MobileNetV1's form. merge: the
branch is fitted by one convolution, which RM merges with the shortcut, nothing reserved. drop: the branch goes, the shortcut stays.
collapse: merge without RM, the residual stays: what RM is responsible for in a merged block is measured against it."""
CHOICES: tuple[Choice, ...] = get_args(Choice)
Options = Mapping[str, Mapping[Choice, str]]
"""{block: {choice: "" where it can be had, or why it cannot}}, blocks from front to back."""
_FUSE = ("cheaper", "always", "never")
PLAN_SCHEMA = 1


def _by_name(names: Iterable[str]) -> dict[str, str]:
    """Each by its flat name, where no other has that for its own, and by its own."""
    return {flat_name(name): name for name in names} | {name: name for name in names}


def _around(block: str, model: nn.Module, blocks: Iterable[str]) -> str | None:
    """The one block in the module of this name, or around it: graphs that were saved call a block otherwise than the network's modules."""
    if not any(name == block or name.startswith(f"{block}.") for name, _ in model.named_modules()):
        return None
    found = [name for name in blocks if name.startswith(f"{block}.") or block.startswith(f"{name}.")]
    return found[0] if len(found) == 1 else None


def layers_digest(model: nn.Module) -> str:
    """What two networks of the same layers have in common, whatever their weights: a digest of the sizes of all tensors, by name."""
    sizes = sorted((flat_name(name), list(tensor.shape)) for name, tensor in model.state_dict().items())
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SlimPlan:
    """What becomes of each residual block, and how wide each channel group then is.

    blocks: {block as `inspect` names it: its choice}; a block that is absent is kept. widths: {group of the network that the blocks'
    choices make, as `rmprune.pruning.find_structure` names it, with _ for dots: units that stay, the most important ones}; a group that
    is absent stays whole. fuse: which neighbouring linear convolutions become one once residuals are removed, as in
    `remove_residuals`; "always" is MobileNetV1's form. network: `layers_digest` of the network that the plan is for; empty: any with
    these blocks. Raises ConfigError for a value that is none of these.

    >>> from rmprune.pruning.plan import SlimPlan
    >>> SlimPlan.from_dict({"schema": 1, "blocks": {"layer1.0": "merge"}, "widths": {"conv1": 8}}).blocks
    {'layer1.0': 'merge'}
    """

    blocks: Mapping[str, Choice] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    fuse: Literal["cheaper", "always", "never"] = "cheaper"
    network: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Mapping):
            raise ConfigError("a plan is a JSON object with the objects blocks and widths")
        for name, choice in self.blocks.items():
            if choice not in CHOICES:
                raise ConfigError(f"block {name}: {choice!r} is no choice; there are {', '.join(CHOICES)}")
        if not isinstance(self.widths, Mapping):
            raise ConfigError("widths is no object {group: channels that stay}")
        for name, width in self.widths.items():
            if type(width) is not int or width < 1:
                raise ConfigError(f"width of {name} is {width!r}; it must be a whole number, at least 1")
        for name in (*self.blocks, *self.widths):
            if not isinstance(name, str):
                raise ConfigError(f"{name!r} is no name of a block or of a channel group; give a text")
        if self.fuse not in _FUSE or not isinstance(self.network, str):
            raise ConfigError(
                f"fuse is {self.fuse!r} and network {self.network!r}; use one of {', '.join(_FUSE)}, and a text"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "schema": PLAN_SCHEMA,
            "network": self.network,
            "fuse": self.fuse,
            "blocks": dict(self.blocks),
            "widths": dict(self.widths),
        }

    @classmethod
    def from_dict(cls, found: Any) -> SlimPlan:
        """A plan from JSON; raises ConfigError that names the first field that is wrong."""
        if not isinstance(found, dict):
            raise ConfigError("a plan is a JSON object with the objects blocks and widths")
        unknown = found.keys() - {"schema", "network", "fuse", "blocks", "widths"}
        if unknown:
            raise ConfigError(f"a plan has no field {', '.join(sorted(map(repr, unknown)))}")
        if found.get("schema") != PLAN_SCHEMA or isinstance(found["schema"], bool):
            raise ConfigError(f"schema is {found.get('schema')!r}, this version reads {PLAN_SCHEMA}")
        return cls(**{name: value for name, value in found.items() if name != "schema"})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SlimPlan:
        """The plan in a JSON file, alone or under "plan". Raises ArtifactError where it cannot be read, ConfigError where it is no plan."""
        found = read_json(Path(path), missing="there is no such plan", damaged="write it anew")
        if isinstance(found, dict) and isinstance(found.get("plan"), dict):
            found = found["plan"]
        try:
            return cls.from_dict(found)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def check(self, model: nn.Module, options: Options) -> dict[str, Choice]:
        """The choice of every block of `model`, whose options these are, under their names there.

        A name may be that of a module that holds one block, or stands in one. Raises ConfigError for a plan of another network, a block
        that is not there, or a choice that a block does not have.
        """
        if self.network and self.network != (here := layers_digest(model)):
            raise ConfigError(f"the plan is for another network (its fingerprint is {self.network}, here it is {here})")
        names = _by_name(options)
        chosen: dict[str, Choice] = {}
        for block, choice in self.blocks.items():
            name = names.get(block, names.get(flat_name(block), _around(block, model, options)))
            if name is None:
                raise ConfigError(f"there is no block {block}; there are: {', '.join(options) or 'none'}")
            if options[name][choice]:
                raise ConfigError(f"block {block} cannot be {choice!r}: {options[name][choice]}")
            if chosen.setdefault(name, choice) != choice:
                raise ConfigError(f"block {block} is {choice!r}, but it is {name}, which is {chosen[name]!r}")
        return {name: chosen.get(name, "keep") for name in options}

    def units(self, structure: Structure, *, strict: bool = True) -> dict[str, int]:
        """How many units each of these groups keeps; the plan may call a group by any layer that puts out its channels and no others.

        Raises ConfigError for a group that is not there, or is too wide; unless `strict`, such widths are passed over.
        """
        made = [(flat_name(m.layer), g.name, m) for g in structure.groups for m in g.members if m.side == "out"]
        names = {layer: name for layer, name, member in made if member.index.numel() == member.size}
        names |= _by_name(structure.units)
        kept: dict[str, int] = {}
        for group, width in self.widths.items():
            name = names.get(group, names.get(flat_name(group)))
            if not strict and (name is None or width > structure.units[name]):
                continue
            if name is None:
                several = ", ".join(name for layer, name, _ in made if layer == flat_name(group))
                raise ConfigError(
                    f"{group} puts out channels of several groups, or such as stay; name a group: {several}"
                    if several
                    else f"there is no channel group {group} once the blocks are as planned; there are: {', '.join(structure.units)}"
                )
            if width > structure.units[name]:
                raise ConfigError(f"width of {group} is {width}; there are {structure.units[name]} to keep")
            if strict and kept.setdefault(name, width) != width:
                raise ConfigError(
                    f"width of {group} is {width}, but its channels are those of {name}, kept at {kept[name]}"
                )
            kept[name] = width
        return structure.units | kept
