"""Plans: read and checked, the options of every kind of block, and carried out on every kind of network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import few
from slim_runs import convolutions
from torch import nn

import rmprune
from rmprune.errors import ArtifactError, ConfigError, UnsupportedModel
from rmprune.methods.table import STARTS
from rmprune.pruning.carry_out import carry_out, carry_out_blocks, widths_of
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.options import block_names, block_options
from rmprune.pruning.plan import CHOICES, Options, SlimPlan, flat_name, layers_digest
from rmprune.pruning.surgery import shrink

NAMES = ("resnet8", "preact_resnet8", "inverted")
X = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.arange(48) % 10)]


class Inverted(nn.Module):
    """x + its inverted residual branch, three times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential()
        for cin, cout, kernel in ((width, 3 * width, 1), (3 * width, 3 * width, 3), (3 * width, width, 1)):
            self.branch.append(
                nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=cin if kernel > 1 else 1, bias=False)
            )
            self.branch.append(nn.BatchNorm2d(cout))
            self.branch.append(nn.ReLU6() if cout > width else nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Held(nn.Module):
    """x + what it holds."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.held(x)


def create(name: str) -> nn.Module:
    if name != "inverted":
        return rmprune.models.create(name, num_classes=10, in_channels=1, width=4)
    between = (nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    stem = (nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(*stem, Inverted(8), *between, Inverted(16), *head)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """With batch norms that fresh ones would hide bugs behind."""
    torch.manual_seed(0)
    found = {}
    for name in NAMES:
        found[name] = create(name).train()
        with torch.no_grad():
            for _ in range(3):
                found[name](X + torch.rand(1))
        found[name].eval()
    return found


@pytest.mark.parametrize("name", few(NAMES, "resnet8"))
def test_every_choice_that_is_offered_can_be_had(name: str, networks: dict[str, nn.Module]) -> None:
    model = networks[name]
    options = block_options(model, X[:2])
    before, sizes = rmprune.count_macs(model, X[:1]), {}
    for choice in CHOICES:
        blocks = {block: choice for block, own in options.items() if not own[choice]}
        network, facts = carry_out_blocks(model, blocks, lambda count: X[:count])
        gone = [report.name for report in rmprune.plan_removal(network, X[:2])] if choice != "keep" else []
        assert network(X).shape == (48, 10)
        sizes[choice] = convolutions(network)
        if choice in ("keep", "remove", "fuse"):
            assert torch.allclose(network(X), model(X), atol=1e-4)
        else:
            assert rmprune.count_macs(network, X[:1]) < before and set(facts["collapsed"]) == set(blocks)
            assert all(explained <= 1 for explained in facts["collapsed"].values())
        assert len(gone) == (
            len(options) if choice == "collapse" else len(options) - len(blocks) if choice != "keep" else 0
        )
    assert (sizes["fuse"] < sizes["remove"]) == (name == "inverted")
    assert not any(own["keep"] or own["remove"] or own["drop"] for own in options.values())
    refused = {block: own["merge"] for block, own in options.items() if own["merge"]}
    assert set(refused) == ({"7"} if name == "inverted" else set())
    for block, reason in refused.items():
        assert "times its branch's MACs" in reason
        with pytest.raises(UnsupportedModel, match=f"{block}: one 3x3 convolution"):
            carry_out_blocks(model, {block: "merge"}, lambda count: X[:count])


def test_options_that_are_asked_for_alone_are_the_same(networks: dict[str, nn.Module]) -> None:
    model, settings = networks["inverted"], {"linear": False, "alone": False}
    every = block_options(model, X[:2], **settings)
    for wanted in sorted({rule.prefer for rule in STARTS.values()}):
        asked = {block: {choice: own[choice] for choice in {"remove", *wanted}} for block, own in every.items()}
        assert block_options(model, X[:2], **settings, wanted=wanted) == asked, wanted


def test_a_block_that_holds_another_goes_only_with_it() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(Held(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Held(inner), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    options = block_options(model, X[:2])
    assert list(options) == ["2.held.0", "2"] and not options["2.held.0"]["remove"]
    assert "another residual that stays; it can go only with that one" in options["2"]["remove"]
    with pytest.raises(UnsupportedModel, match="another residual"):
        carry_out(model, SlimPlan({"2": "remove"}), DATA)
    network, _ = carry_out(model, SlimPlan(dict.fromkeys(options, "remove")), DATA)
    assert torch.allclose(network(X), model(X), atol=1e-4)


def test_a_dropped_block_vanishes_where_its_shortcut_is_the_identity(networks: dict[str, nn.Module]) -> None:
    network, _ = carry_out_blocks(networks["resnet8"], {"layer1.0": "drop"}, lambda count: X[:count])
    kinds = [type(module).__name__ for module in network.modules()]
    before = [type(module).__name__ for module in networks["resnet8"].modules()]
    assert (
        kinds.count("Conv2d") == before.count("Conv2d") - 2 and kinds.count("ReLU") == 5
    )  # its activation is idle, too
    net = networks["resnet8"]
    net.layer1[0].bn2.weight.data.zero_()  # type: ignore[index]
    net.layer1[0].bn2.bias.data.zero_()  # type: ignore[index]
    network, facts = carry_out_blocks(net, {"layer1.0": "drop"}, lambda count: X[:count])
    assert torch.allclose(network(X), net(X), atol=1e-5) and facts["collapsed"]["layer1.0"] == pytest.approx(1)


@pytest.mark.parametrize("name", few(NAMES, "inverted"))
def test_a_plan_of_every_choice_is_carried_out_to_its_widths(
    name: str, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    model = networks[name]
    blocks = dict(zip(block_options(model, X[:2]), ("merge", "drop", "remove", "keep"), strict=False))
    whole, facts = carry_out(model, SlimPlan(blocks, network=layers_digest(model)), DATA)
    plan = SlimPlan.from_dict(facts["plan"])
    assert plan.blocks == blocks and plan.network == layers_digest(model)
    half = SlimPlan(blocks, {group: (units + 1) // 2 for group, units in plan.widths.items()}, network=plan.network)
    (tmp_path / "plan.json").write_text(json.dumps({"method": "rm", "plan": half.to_dict()}))
    assert SlimPlan.read(tmp_path / "plan.json") == half  # as it stands in a record
    network, facts = carry_out(model, half, DATA)
    assert facts["plan"]["widths"] == dict(half.widths) and 0 < facts["cut_error"] < 1e-9
    assert rmprune.count_macs(network, X[:1]) < 0.5 * rmprune.count_macs(whole, X[:1])
    assert network(X).shape == (48, 10) and bool(torch.isfinite(network(X)).all())


WRONG = [
    ({"schema": 2}, "schema is 2, this version reads 1"),
    ([], "a plan is a JSON object"),
    ({"schema": 1, "block": {}}, "no field 'block'"),
    ({"schema": 1, "blocks": {"layer1.0": "melt"}}, "'melt' is no choice; there are keep, remove"),
    ({"schema": 1, "blocks": {"layer1.0": []}}, "is no choice"),
    ({"schema": 1, "blocks": {"layer9.0": "drop"}}, "no block layer9.0; there are: layer1.0, layer2.0, layer3.0"),
    ({"schema": 1, "widths": {"conv1": 0}}, "width of conv1 is 0"),
    ({"schema": 1, "widths": {"conv1": True}}, "width of conv1 is True"),
    ({"schema": 1, "widths": {"conv1": 5}}, "width of conv1 is 5; there are 4"),
    ({"schema": 1, "widths": {"conv9": 2}}, "no channel group conv9"),
    ({"schema": 1, "widths": {"conv1": 2, "layer1.0.conv2": 3}}, "its channels are those of conv1, kept at 2"),
    ({"schema": 1, "widths": {"layer1.0.conv2": 4, "conv1": 2}}, "its channels are those of conv1, kept at 4"),
    ({"schema": 1, "blocks": {"layer1.0": "drop", "layer1_0": "keep"}}, "is layer1.0, which is 'drop'"),
    ({"schema": 1, "fuse": "often"}, "fuse is 'often'"),
    ({"schema": 1, "network": "0123456789abcdef"}, "for another network"),
]


@pytest.mark.parametrize(
    "wrong", [{"blocks": {"1": "zap"}}, {"blocks": 3}, {"widths": {"1": 2.5}}, {"fuse": None}, {"blocks": {1: "drop"}}]
)
def test_plans_in_code_are_checked_as_those_in_files(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).rstrip("s")):
        SlimPlan(**wrong)


@pytest.mark.parametrize(("found", "message"), WRONG)
def test_what_is_no_plan_of_this_network_is_refused(
    found: object, message: str, networks: dict[str, nn.Module]
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        carry_out(networks["resnet8"], SlimPlan.from_dict(found), DATA)
    assert "\n" not in str(refused.value)


def test_blocks_whose_names_differ_in_a_dot_are_two() -> None:
    options = {name: dict.fromkeys(CHOICES, "") for name in ("a.b", "a_b")}
    assert SlimPlan({"a.b": "drop"}).check(nn.Identity(), options) == {"a.b": "drop", "a_b": "keep"}


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such plan"):
        SlimPlan.read(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"schema": 1')
    with pytest.raises(ArtifactError, match="write it anew"):
        SlimPlan.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"schema": 1, "widths": 3}')
    with pytest.raises(ConfigError, match=r"x\.json: widths is no object"):
        SlimPlan.read(tmp_path / "x.json")


def test_a_plan_of_a_network_is_one_of_its_artifact(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    rmprune.save(networks["resnet8"], tmp_path / "net", example_inputs=X[:1])
    assert layers_digest(rmprune.load(tmp_path / "net")) == layers_digest(networks["resnet8"])
    assert layers_digest(networks["resnet8"]) != layers_digest(networks["preact_resnet8"])


def test_a_plan_knows_its_blocks_in_an_artifact_which_calls_them_otherwise(tmp_path: Path) -> None:
    model = rmprune.models.create("mobilenet_v2_digits", num_classes=10, in_channels=1, width=0.5).eval()
    rmprune.save(model, tmp_path / "net", example_inputs=X[:1])
    saved = rmprune.load(tmp_path / "net")
    for network, block, other in ((model, "features.3.conv", "features.3"), (saved, "features.3", "features.3.conv")):
        options: Options = {name: dict.fromkeys(CHOICES, "") for name in block_names(network, X[:2])}
        assert other in options and SlimPlan({block: "drop"}).check(network, options)[other] == "drop"
        for wrong in ("features", "features.3.nothing", "features.2", "feat"):
            with pytest.raises(ConfigError, match=f"there is no block {wrong};"):
                SlimPlan({wrong: "drop"}).check(network, options)


class Joined(nn.Module):
    """A layer whose channels meet those of two others, one behind the other: they lie in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.two = nn.Conv2d(1, 9, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(1, 5, 3)
        self.head = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.both(x) + torch.cat([self.one(x), self.two(x)], 1)).relu().mean((2, 3)))


class Padded(nn.Module):
    """A layer of whose channels the first meet those of another, and the last meet zeros, and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.head = nn.Conv2d(1, 9, 3), nn.Conv2d(1, 4, 3), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = nn.functional.pad(self.one(x), (0, 0, 0, 0, 0, 5))
        return self.head((self.both(x) + one).relu().mean((2, 3)))


@pytest.mark.parametrize("build", [Joined, Padded])
def test_plans_of_layers_whose_channels_lie_apart(build: type[nn.Module]) -> None:
    """Each name is one group; what is written down gives the same network again, and `whole` names no layer that was cut."""
    model, data = build().eval(), [(X, torch.arange(48) % 3)]
    structure = find_structure(model, X)
    for name in structure.units:
        network, facts = carry_out(model, SlimPlan({}, {name: 2}), data, reconstruct=False)
        assert facts["plan"]["widths"] == {flat_name(n): 2 if n == name else k for n, k in structure.units.items()}
        again, _ = carry_out(model, SlimPlan.from_dict(facts["plan"]), data, reconstruct=False)
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
        )
        gone = {
            m.layer: (structure.units[name] - 2) * m.index.shape[1]
            for m in structure.group(name).members
            if m.side == "out"
        }
        kept = network.rmprune_facts["kept"]  # type: ignore[union-attr]
        assert {n: model.get_submodule(n).out_channels - len(kept[n]) for n in gone} == gone  # type: ignore[operator, arg-type]
    if "both" not in structure.units:
        with pytest.raises(ConfigError, match="several groups, or such as stay; name a group: one"):
            carry_out(model, SlimPlan({}, {"both": 3}), data)
    pruned = rmprune.prune(model, X, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.8))
    assert set(pruned.rmprune_facts["whole"]) == {"head"}  # type: ignore[arg-type]


def test_widths_of_a_layer_whose_channels_lie_in_two_groups() -> None:
    model = Joined().eval()
    structure = find_structure(model, X)
    assert sorted(structure.units.values()) == [4, 5] and all("both" in g.producers for g in structure.groups)
    units = {name: count - 2 for name, count in structure.units.items()}
    keep = {name: torch.arange(structure.units[name]) < count for name, count in units.items()}
    found = widths_of(structure, shrink(model, keep, structure)[0])
    assert found == {flat_name(name): count for name, count in units.items()}
