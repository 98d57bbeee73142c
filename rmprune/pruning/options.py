"""What each residual block of a network may become, and why not: chosen from the graph, as removal chooses. Fits and builds nothing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from rmprune.config import REMOVAL, RemovalConfig
from rmprune.graph.foreign import plain_module
from rmprune.graph.inputs import Inputs, as_given
from rmprune.graph.network import Network, flat_name
from rmprune.graph.obstacle import Obstacle, or_none
from rmprune.graph.ranges import annotate_ranges
from rmprune.pruning.collapse import read_additions
from rmprune.pruning.groups import Structure
from rmprune.pruning.one_convolution import Fit, collapsible, new_layers, replace_branch
from rmprune.pruning.plan import CHOICES, Choice, Options
from rmprune.removal import plan_removal
from rmprune.removal.blocks import Block, find_block
from rmprune.removal.rewrite import remove_all
from rmprune.removal.settings import RemovalSettings

_ALONE = "no linear layer stands beside it that it could be multiplied with"


def block_options(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    linear: bool = True,
    alone: bool = True,
    removal: RemovalConfig = REMOVAL,
    wanted: Collection[Choice] = CHOICES,
) -> Options:
    """{block: {choice: "" where it can be had, or why it cannot}}, blocks from front to back: of the choices `wanted` and "remove".

    A block is fused where removal (of all others, too) leaves a linear layer beside another; dropped where branch and shortcut can be
    told apart; collapsed where one convolution can stand for its branch without more MACs (`linear`: also where that leaves the block
    without an activation); merged where, besides, RM then needs to reserve nothing, as in a block of one layer. `alone`: all other
    blocks are kept; False: they may be removed with it, as one that holds another needs. `removal`: how residuals go; a block in its
    `keep` only stays. Raises UnsupportedModel where torch.fx cannot follow the model.

    >>> from rmprune.pruning.options import block_options
    >>> model = rmprune.models.create("resnet8", num_classes=10, width=4).eval()
    >>> {choice: reason for choice, reason in block_options(model, torch.randn(2, 3, 8, 8))["layer1.0"].items() if reason}
    {'fuse': 'no linear layer stands beside it that it could be multiplied with'}
    """
    model, inputs = as_given(model, example_inputs)
    settings = vars(removal) | {"fuse": "never"}
    reports = plan_removal(model, inputs, **settings)
    names = [report.name for report in reports]
    fused = plan_removal(model, inputs, **settings, fused=names) if "fuse" in wanted else reports
    free = {report.name for report in reports if report.removable and not report.reserved}
    found: dict[str, dict[Choice, str]] = {
        report.name: dict.fromkeys(CHOICES, "")
        | {"remove": report.reason, "fuse": report.reason or ("" if report != other else _ALONE)}
        for report, other in zip(reports, fused, strict=True)
    }
    if alone or {"merge", "drop", "collapse"} & set(wanted):
        _try_shorter(found, *read_additions(model, inputs), free, linear, alone)
    for name, own in found.items():
        if {name, name.split("#")[0]} & set(removal.keep):
            own |= dict.fromkeys(("merge", "drop"), own["remove"])
    return {
        name: {choice: own[choice] for choice in own if choice in ("remove", *wanted)} for name, own in found.items()
    }


def _try_shorter(
    found: dict[str, dict[Choice, str]], network: Network, blocks: list[tuple[str, fx.Node]], free: set[str],
    linear: bool, alone: bool,
) -> None:  # fmt: skip
    """Notes in `found` which blocks cannot be dropped, collapsed or merged. `free`: those whose removal reserves nothing."""
    shorter: dict[str, Block] = {}
    for name, add in blocks:
        try:
            find_block(network, name, add)
        except Obstacle as obstacle:
            found[name] |= dict.fromkeys(("drop", "merge", "collapse"), str(obstacle))
            if alone and not found[name]["remove"]:
                found[name]["remove"] = found[name]["fuse"] = f"{obstacle}; it can go only with that one"
            continue
        try:
            shorter[name] = collapsible(network, name, add, linear)
        except Obstacle as obstacle:
            found[name] |= {"merge": "" if name in free else str(obstacle), "collapse": str(obstacle)}
    for block in shorter.values():
        replace_branch(network, block, Fit(new_layers(block), 0.0))
    annotate_ranges(network)
    for report in remove_all(network, RemovalSettings(found.keys() - shorter.keys(), fuse="never")):
        if report.name in shorter and (not report.removable or report.reserved):
            found[report.name]["merge"] = report.reason or f"RM would reserve {report.reserved} channels"


def block_names(model: nn.Module, images: Tensor) -> list[str]:
    """The residual blocks of a network, from front to back."""
    return [name for name, _ in read_additions(plain_module(model), (images,))[1]]


@dataclass(frozen=True)
class BlockLayers:
    """The layers of a block by their flat names: of its branch, and of the way that its shortcut takes."""

    branch: frozenset[str]
    way: frozenset[str]


def block_layers(model: nn.Module, images: Tensor) -> dict[str, BlockLayers]:
    """{block: its layers}, of the blocks that can be followed."""
    network, blocks = read_additions(plain_module(model), (images,))
    found = {}
    for name, add in blocks:
        block = or_none(find_block, network, name, add)
        if block is not None:
            branch, way = (
                frozenset(flat_name(str(node.target)) for node in nodes if node.op == "call_module")
                for nodes in (block.branch, block.way)
            )
            found[name] = BlockLayers(branch, way)
    return found


@dataclass(frozen=True)
class BlockMembers:
    """Where the layers of a network stand. block: {layer of a structure: the block it stands in}; inner: {group: the block that all its
    layers stand in}; way: layers of shortcuts.
    """

    structure: Structure
    block: Mapping[str, str]
    inner: Mapping[str, str]
    way: frozenset[str]

    @classmethod
    def of(cls, structure: Structure, layers: Mapping[str, BlockLayers]) -> "BlockMembers":
        known = {f"{flat_name(name)}_conv": name for name in layers}
        for name, parts in layers.items():
            known |= {f"{layer}{end}": name for layer in (*parts.branch, *parts.way) for end in ("", "_in", "_out")}
        block = {x.name: known[flat_name(x.name)] for x in structure.layers if flat_name(x.name) in known}
        touching: dict[str, set[str | None]] = {}
        for layer in structure.layers:
            for group, _ in (*layer.inputs, *layer.outputs):
                touching.setdefault(group, set()).add(block.get(layer.name))
        inner = {group: own for group, blocks in touching.items() if len(blocks) == 1 and (own := next(iter(blocks)))}
        ways = {layer for parts in layers.values() for layer in parts.way}
        return cls(structure, block, inner, frozenset(x.name for x in structure.layers if flat_name(x.name) in ways))

    def ports(self, name: str) -> tuple[set[str], set[str]]:
        """The groups that a block reads from outside, and that it puts out."""
        own = [layer for layer in self.structure.layers if self.block.get(layer.name) == name]
        return (
            {group for layer in own for group, _ in layer.inputs if group not in self.inner},
            {group for layer in own for group, _ in layer.outputs if group not in self.inner},
        )
