"""Every call computes where the network is: on a GPU that is not there (fake_device), with the CPU's results, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amc_spaces import v1
from fake_device import GPU, pretended_gpu
from marks import few
from pruning_nets import chain, images, randomise, residual
from torch import Tensor, nn

import rmprune
from rmprune.amc.scoring import Scorer, ScoringSettings, importance_order
from rmprune.amc.space import Limits, Space
from rmprune.graph.tf32 import tf32
from rmprune.measure.candidate import Candidate, Setting
from rmprune.measure.torch_backends import eager
from rmprune.pruning import Budget, find_structure, prune_coupled
from rmprune.pruning.compensate import mean_inputs
from rmprune.pruning.coupled import loss_gradients
from rmprune.pruning.groups import macs
from rmprune.pruning.importance import IMPORTANCES, MEASURED, score_groups

HALF = Budget(macs_ratio=0.5)
Batches = list[tuple[Tensor, Tensor]]


def batches(count: int) -> Batches:
    return [(images(8, seed=s), torch.arange(8) % 5) for s in range(count)]


def scored(model: nn.Module, x: Tensor, data: Batches) -> nn.Module:
    """The network of an AMC policy, with the statistics that it was scored with."""
    structure = find_structure(model, x)
    space = Space(
        structure, macs, 0.5 * sum(macs(layer, layer.cin, layer.cout) for layer in structure.layers), Limits()
    )
    order = importance_order(IMPORTANCES["magnitude"](model, structure, None))
    scorer = Scorer(model, space, order, x, *data[0], ScoringSettings(dtype=torch.float64))
    widths = tuple(max(1, group.units // 2) for group in space.groups)
    built = scorer.build(widths)
    assert 0 <= scorer.accuracy(widths) <= 1
    return built


def short() -> nn.Module:
    """A block whose shortcut is the identity, and one whose shortcut is a convolution."""
    whole = residual()
    return nn.Sequential(*whole[:3], *whole[4:])


def pruned(**settings: Any) -> Callable[[nn.Module, Tensor, Batches], nn.Module]:
    return lambda model, x, data: rmprune.prune(model, x, budget=HALF, data=data, **settings)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Batches], nn.Module]]] = {
    "removal": (short, lambda model, x, data: rmprune.remove_residuals(model, x).model),
    "collapse": (short, lambda model, x, data: rmprune.collapse_blocks(model, x).model),
    "fitted": (chain, pruned(reconstruct=True)),
    "coupled": (short, lambda model, x, data: prune_coupled(model, x, importance="taylor", budget=HALF, data=data)),
    "amc": (lambda: torch.manual_seed(0) and randomise(v1()).double().eval(), scored),
    "batch_norm": (chain, pruned(importance="batch_norm")),
}


def on_gpu(call: Callable[[nn.Module, Tensor, Batches], nn.Module], model: nn.Module) -> nn.Module:
    """The result there, brought back; the network is left alone."""
    with pretended_gpu():
        model = model.to("cuda")
        before = copy.deepcopy(model)
        found = call(model, images(8).to("cuda"), [(x.to("cuda"), y.to("cuda")) for x, y in batches(1)])
        assert {t.device for net in (found, model) for t in (*net.parameters(), *net.buffers())} == {GPU}
        assert same(model, before)
        return found.cpu()


def same(first: nn.Module, second: nn.Module) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("name", few(CALLS, "removal"))
def test_results_are_the_cpu_s(name: str) -> None:
    build, call = CALLS[name]
    assert same(call(build(), images(8), batches(1)), on_gpu(call, build()))


PUBLIC = {name: CALLS[name] for name in ("removal", "collapse", "fitted", "coupled", "batch_norm")}


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_is_rounded_whatever_the_program_allows(name: str) -> None:
    build, call = PUBLIC[name]
    with tf32(True, "cuda"), pretended_gpu() as places:
        model, x = build().float().to("cuda"), images(8).float().to("cuda")
        model(x)
        assert places.rounded
        places.rounded.clear()
        call(model, x, [(x, batches(1)[0][1].to("cuda"))])
        assert not places.rounded
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("name", MEASURED)
def test_scores_are_the_cpu_s(name: str) -> None:
    structure = find_structure(chain(), images(2))
    expected = score_groups(name, chain(), structure, batches(1))
    with pretended_gpu():
        found = score_groups(name, chain().to("cuda"), structure, [(x.to("cuda"), y.to("cuda")) for x, y in batches(1)])
        there = {group: scores.cpu() for group, scores in found.items()}
    assert all(torch.equal(scores, there[group]) for group, scores in expected.items())


@pytest.mark.parametrize("name", MEASURED)
def test_nothing_is_copied_for_each_batch(name: str) -> None:
    """Labels alone are looked at: a wrong one would be a fault within a GPU's kernel."""
    structure, noted = find_structure(chain(), images(2)), []
    for count in (1, 3):
        with pretended_gpu() as places:
            data = [(x.to("cuda"), y.to("cuda")) for x, y in batches(count)]
            model = chain().to("cuda")
            places.noted.clear()
            score_groups(name, model, structure, data)
            noted.append([note for note in places.noted if "batches.py" not in note[1]])
    assert len(noted[0]) == len(noted[1])


def test_means_come_back_once() -> None:
    with pretended_gpu() as places:
        data = [(x.to("cuda"), y.to("cuda")) for x, y in batches(3)]
        model = chain().to("cuda")
        places.noted.clear()
        means = mean_inputs(model, ["3", "6"], data)
        assert [what for what, _ in places.noted] == ["copy: to cpu"] * 2
    assert all(torch.equal(mean, means[name]) for name, mean in mean_inputs(chain(), ["3", "6"], batches(3)).items())


def test_what_is_measured_lies_on_the_device() -> None:
    net, x = chain().float(), images(2).float()
    with pretended_gpu() as places:
        prepared = eager(Candidate("net", net.to("cuda"), x.to("cuda")), Setting("cuda", 1, 4))
        places.noted.clear()
        assert isinstance(y := prepared(), Tensor) and y.device == GPU and len(y) == 4 and not places.noted
        found = prepared.outputs(x)
    assert torch.allclose(found, chain().float()(x), atol=1e-5)


def test_gradients_of_one_network_serve_all_its_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, data = residual(), images(), batches(2)
    once = prune_coupled(model, x, importance="taylor", budget=HALF, data=data)
    gradients = loss_gradients(model, data)
    monkeypatch.setattr("rmprune.pruning.coupled.loss_gradients", lambda *_: pytest.fail("computed again"))
    again = prune_coupled(model, x, importance="taylor", budget=HALF, gradients=gradients)
    assert torch.equal(once(x), again(x))
