"""Groups of channels: what they are in chains and branching networks, and what is refused."""

import time

import pytest
import torch
from pruning_nets import Block, chain, conv, images, measured_macs, mobile_chain, randomise, residual
from torch import nn
from torch_pruning_reader import dependency_structure
from torchvision.models.swin_transformer import SwinTransformer

from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.measure import count_macs
from rmprune.pruning import Budget, prune, prune_coupled
from rmprune.pruning.dead import _check
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.graph import find_structure as find_structure_of_0_1
from rmprune.pruning.groups import outputs, total_cost
from rmprune.pruning.prove import check_outputs, prove_groups
from rmprune.pruning.surgery import shrink


def test_chain_groups_and_costs() -> None:
    model, x = chain(), images()
    structure = find_structure(model, x)
    assert structure.units == {"0": 8, "3": 12, "6": 16}
    assert structure.frozen == {"11": "its channels are the network's output"}
    assert [m.layer for m in structure.group("3").members] == ["3", "4", "6"]
    assert total_cost(structure) == measured_macs(model, x)


def test_depthwise_tied_grouped_by_position_and_flattened() -> None:
    structure = find_structure(mobile_chain(), images())
    assert structure.units == {"0": 8, "6": 4, "9": 6}  # 12 and 18 channels in positions of 3 groups
    assert {m.layer for m in structure.group("0").members} == {"0", "1", "3", "4", "5", "6"}
    assert structure.group("6").members[0].index.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    last = next(m for m in structure.group("9").members if m.layer == "12")
    assert last.index.shape == (6, 3 * 16)
    assert last.index[1, :17].tolist() == [*range(16, 32), 7 * 16]


def test_residual_streams_are_single_groups() -> None:
    model, x = residual(), images()
    structure = find_structure(model, x)
    streams = {frozenset(g.producers) for g in structure.groups if len(g.producers) > 1}
    assert streams == {frozenset({"0.0", "1.conv2"}), frozenset({"2.conv2", "2.shortcut.0", "3.conv2"})}
    assert total_cost(structure) == measured_macs(model, x)
    assert model.training is False and all(p.grad is None for p in model.parameters())


def test_sums_written_as_one_call_tie_what_they_add() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(conv(3, 4) for _ in range(4))
            self.last = conv(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b, c, d = (layer(x) for layer in self.layers)
            return self.last(torch.lerp(torch.addcmul(a, b, torch.sigmoid(c)), d, 0.3).addcdiv(a, b.square() + 1))

    structure = find_structure(Mixed().eval(), images())
    assert [len(group.producers) for group in structure.groups] == [4] and [*structure.frozen] == ["last"]


@pytest.mark.parametrize("build", [chain, mobile_chain, residual])
def test_description_follows_the_cut(build: object) -> None:
    """shrunk(keep) describes what shrink(keep) returns."""
    model, x = build(), images()  # type: ignore[operator]
    structure = find_structure(model, x)
    generator = torch.Generator().manual_seed(1)
    keep = {}
    for group in structure.groups:
        keep[group.name] = torch.rand(group.units, generator=generator) < 0.6
        keep[group.name][0] = True
    smaller, _ = shrink(model, keep, structure)
    described, found = structure.shrunk(keep), find_structure(smaller, x)
    assert described.units == found.units
    assert described.layers == found.layers
    assert total_cost(described) == measured_macs(smaller, x)
    for group in described.groups:
        again = found.group(group.name)
        for member in group.members:
            match = next(m for m in again.members if (m.layer, m.side) == (member.layer, member.side))
            assert torch.equal(member.index.sort(1).values, match.index.sort(1).values) and member.size == match.size


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(3, 8), nn.GroupNorm(1, 8), conv(8, 4)
        self.c = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3)))


def test_channels_that_a_norm_mixes_are_frozen_with_the_reason() -> None:
    structure = find_structure(Normalised().double(), images())
    assert structure.units == {"b": 4}
    assert structure.frozen["a"] == "norm (GroupNorm) normalises over channels"


def test_the_name_of_0_1_is_still_there() -> None:
    assert find_structure_of_0_1 is find_structure


def test_a_layer_used_twice_keeps_its_channels_and_what_reads_them() -> None:
    shared = conv(4, 4)
    model = nn.Sequential(conv(3, 4), shared, nn.ReLU(), shared, conv(4, 6), nn.ReLU(), conv(6, 2)).double()
    structure = find_structure(model, images())
    assert structure.units == {"4": 6} and "used twice" in structure.frozen["1"]
    assert total_cost(structure) == count_macs(model, images())
    assert prove_groups(model, structure, images()) < 1e-9


class Auxiliary(nn.Module):
    """`says`: what training mode does beside; `unused` is read by nothing."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.says, self.a, self.b, self.c = says, conv(3, 6), conv(6, 8), conv(8, 4)
        self.aux, self.own, self.unused = conv(6, 2), nn.Parameter(torch.ones(8, 1, 1)), conv(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        first = torch.relu(self.a(x))
        second = torch.relu(self.b(first))
        out = self.c(second)
        if not self.training or self.says == "nothing":
            return out
        assert self.says != "fails", "training mode takes targets"
        return out, self.aux(first.detach()) if self.says == "layer" else second * self.own


@pytest.mark.parametrize(
    ("says", "stays"), [("layer", {"a"}), ("parameter", {"b"}), ("nothing", set()), ("fails", set())]
)
def test_channels_that_training_alone_reads_stay(says: str, stays: set[str], caplog: pytest.LogCaptureFixture) -> None:
    model = Auxiliary(says).double().eval()
    pruned = prune(model, images(), importance="magnitude", budget=Budget(ratio=0.5))
    whole = {name: why for name, why in pruned.rmprune_facts["whole"].items() if "only training runs" in why}
    assert whole.keys() == stays and all("(Auxiliary, aux, unused)" in why for why in whole.values())
    assert pruned.b.out_channels < 8 or says == "parameter"
    if says == "fails":
        assert "does not run Auxiliary, aux, unused, and training mode could not be tried" in caplog.text
    else:
        pruned.train()(images())
        assert not caplog.records


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = conv(3, 6), conv(6, 6), conv(6, 4), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        self.relu(y + self.b(y))
        return self.c(y)


def test_layers_whose_results_nobody_reads_have_a_place_in_the_order() -> None:
    assert find_structure(Unread().double(), images()).units == {"a": 6}


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(UnsupportedModel, match="no channel can be pruned"):
        find_structure(nn.Sequential(conv(3, 4), nn.ReLU()).double(), images())


def test_network_whose_output_is_a_stream_keeps_it() -> None:
    model = nn.Sequential(conv(3, 8), Block(8, 8)).double().eval()
    structure = find_structure(model, images())
    assert structure.units == {"1.conv1": 8}


class Backbone(nn.Module):
    """Returns two feature maps, of which the later stage reads the first as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Sequential(conv(8, 12), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(conv(12, 10), nn.BatchNorm2d(10), nn.ReLU(), conv(10, 16), nn.BatchNorm2d(16))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        first = self.first(self.stem(x))
        return {"maps": [first, self.second(first)]}


def test_channels_that_are_returned_stay_although_they_are_read_too() -> None:
    model, x = randomise(Backbone()).double().eval(), images()
    assert set(find_structure(model, x).units) == {"stem.0", "second.0"}
    for pruned in (
        prune(model, x, importance="magnitude", budget=Budget(macs_ratio=0.6)),
        prune_coupled(model, x, importance="magnitude", budget=Budget(macs_ratio=0.6)),
    ):
        assert count_macs(pruned, x[:1]) <= 0.6 * count_macs(model, x[:1])
        assert [tuple(y.shape[1:]) for y in outputs(pruned, x)] == [(12, 8, 8), (16, 8, 8)]


def test_a_fold_that_changes_a_returned_map_is_no_longer_silent() -> None:
    model, x = randomise(Backbone()).double().eval(), images()
    smaller = shrink(model, {"first.0": torch.arange(12) > 0}, dependency_structure(model, x))[0]
    with pytest.raises(NotEquivalent):
        _check(model, smaller, x)
    with pytest.raises(UnsupportedModel, match="shape"):
        check_outputs(model, smaller, x)


@pytest.mark.long
def test_shifted_windows_are_read_in_seconds_and_cut_right() -> None:
    """torchvision's swin_t, small: its tracing and grouping never ended once."""
    began = time.process_time()
    torch.manual_seed(0)
    net = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=3).eval()
    pruned = prune(net, torch.randn(1, 3, 32, 32), importance="magnitude", budget=Budget(macs_ratio=0.7))
    assert 0 < pruned.rmprune_facts["cut_error"] < 1e-10
    assert time.process_time() - began < 20
