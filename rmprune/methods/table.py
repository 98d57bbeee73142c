"""The ways to slim a trained network that a run can compare: a rule for its blocks, a criterion for its widths. Prunes nothing."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rmprune.errors import ConfigError
from rmprune.pruning.plan import Choice
from rmprune.runs.records import RENAMED


class BlockRule(NamedTuple):
    """A choice for every residual block: the first of `prefer` that it has. `half`: the first only for that half of the blocks that
    one convolution fits best. `fuse`: what removal then fuses, in the place of what the settings say."""

    prefer: tuple[Choice, ...]
    half: bool = False
    fuse: Literal["always"] | None = None


STARTS: dict[str, BlockRule] = {
    "dense": BlockRule(("keep",)),
    "plain": BlockRule(("remove", "keep")),
    "fused": BlockRule(("fuse", "remove", "keep"), fuse="always"),
    "collapsed": BlockRule(("merge", "remove", "keep")),
    "collapsed-residual": BlockRule(("collapse", "keep")),
    "half-collapsed": BlockRule(("merge", "keep"), half=True),
    "half-collapsed-residual": BlockRule(("collapse", "keep"), half=True),
}
"""{directory in which a run keeps the network that methods prune: what its blocks are}; "dense" is the trained network itself."""


class Method(NamedTuple):
    """What is chosen. `start`: the network that it prunes, of STARTS. `settings`: what it fixes of PruneConfig.

    `widths`: any channel goes, those inside blocks alone, or the same fraction of every layer. `candidates`: methods of which the one
    goes on whose network, cut to the budget, has the least loss on validation images before any fine-tuning (`rmprune.methods.choose`).
    `faster`: once the network is pruned, those residuals are removed whose removal then makes it faster. `scratch`: nothing is pruned.
    `depth`: blocks are dropped.
    `isomorphic`: Torch-Pruning ranks channels among those of groups of the same form alone.
    """

    about: str
    start: str = "dense"
    widths: Literal["free", "inner", "uniform"] = "free"
    pruner: Literal["ours", "torch-pruning"] = "ours"
    settings: Mapping[str, Any] = MappingProxyType({})
    candidates: tuple[str, ...] = ()
    faster: bool = False
    scratch: bool = False
    depth: bool = False
    isomorphic: bool = False

    @property
    def reads_removal(self) -> bool:
        """Whether the settings of a removal say anything about what it makes."""
        return bool(self.candidates) or self.faster or self.depth or STARTS[self.start].prefer != ("keep",)


METHODS: dict[str, Method] = {
    "rm": Method(
        "RM, then any channel of the plain network by the settings given (by default one cut, its layers fitted anew)",
        start="plain",
    ),
    "rm-v1": Method(
        "RM and fusing everywhere, also where that has more MACs (inverted residuals become MobileNetV1's form), then as rm",
        start="fused",
    ),
    "rm-collapse": Method(
        "each block's branch fitted by one convolution, which RM merges with the shortcut without reserving a channel: "
        "a plain chain of half the depth; then as rm",
        "collapsed",
    ),
    "mixed-collapse": Method(
        "the same for that half of the blocks that one convolution fits best; the others keep their residuals",
        "half-collapsed",
    ),
    "residual-collapse": Method(
        "the same blocks of one convolution with their residuals kept: the share of rm-collapse that RM is responsible for",
        "collapsed-residual",
    ),
    "residual-half-collapse": Method(
        "the same half of the blocks with all residuals kept: the share of mixed-collapse that RM is responsible for",
        "half-collapsed-residual",
    ),
    "mixed-auto": Method(
        "residual, mixed-collapse, rm-collapse or rm: each is cut to the budget, and the one with the least loss on validation images "
        "before fine-tuning goes on",
        candidates=("residual", "mixed-collapse", "rm-collapse", "rm"),
    ),
    "rm-slimming": Method(
        "the paper's path: RM, one cut by batch-norm scale under one global threshold",
        start="plain",
        settings={"gradual": False, "reconstruct": False, "importance": "batch_norm", "rank": "importance"},
    ),
    "mixed": Method(
        "as residual, then RM, exactly, for those residuals whose removal makes the pruned network faster", faster=True
    ),
    "coupled": Method(
        "residuals kept, one cut by Torch-Pruning's group-aware batch-norm scale",
        pruner="torch-pruning",
        settings={"gradual": False, "importance": "batch_norm"},
    ),
    "coupled-taylor": Method(
        "residuals kept, one cut by Torch-Pruning's group-aware Taylor importance",
        pruner="torch-pruning",
        settings={"gradual": False, "importance": "taylor"},
    ),
    "coupled-isomorphic": Method(
        "the same, channels ranked among groups of the same form alone (isomorphic pruning)",
        pruner="torch-pruning",
        settings={"gradual": False, "importance": "taylor"},
        isomorphic=True,
    ),
    "coupled-norm": Method(
        "residuals kept, one cut by Torch-Pruning's group norm (L2 of all weights of a group)",
        pruner="torch-pruning",
        settings={"gradual": False, "importance": "magnitude"},
    ),
    "residual": Method("residuals kept, otherwise exactly as rm: the share of the result that RM is responsible for"),
    "inner": Method("residuals kept and streams untouched (as in ThiNet), otherwise as rm", widths="inner"),
    "uniform": Method(
        "residuals kept, the same fraction of every layer, its best channels by the importance given, one cut, its layers fitted anew",
        widths="uniform",
        settings={"gradual": False},
    ),
    "scratch": Method(
        "the network at a smaller width, the largest within the budget, trained from nothing for all epochs of training and fine-tuning",
        scratch=True,
    ),
    "depth": Method(
        "blocks dropped and every width kept: those that lose least when dropped alone, as few as the budget asks for",
        depth=True,
    ),
    "auto": Method(
        "a choice for every block and a width for every group, looked for under the budget: a surrogate proposes plans, validation images "
        "choose among them and the presets before fine-tuning",
        candidates=("residual", "rm", "rm-v1", "rm-collapse", "uniform"),
    ),
    "plan": Method("the plan in a file (--plan): its choice for each block, its width for each channel group"),
}


def network_name(method: str, compared: Collection[str]) -> str:
    """What a run that compares these methods calls the network of one of them: `pruned` where it is the usual one, else as the method."""
    return "pruned" if method == "rm" or (method == "auto" and set(compared) == {"auto"}) else method


def find_methods(names: tuple[str, ...]) -> dict[str, Method]:
    """The methods of these names, each under the name that was asked for: a run of before a renaming goes on as it began.

    Raises ConfigError for a name that does not exist.
    """
    for name in names:
        if RENAMED.get(name, name) not in METHODS:
            raise ConfigError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return {name: METHODS[RENAMED.get(name, name)] for name in names}
