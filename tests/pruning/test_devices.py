"""Importances and fits compute where the network is: on a pretended GPU, where mixing in a tensor of another device is an error."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import chain, images, residual
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmprune.pruning import find_structure, prune_coupled
from rmprune.pruning.budget import Budget
from rmprune.pruning.coupled import loss_gradients
from rmprune.pruning.importance import TaylorSum, activation, batch_norm, magnitude, taylor, taylor_squared
from rmprune.pruning.one_shot import mean_inputs
from rmprune.pruning.reconstruct import reconstruct

GPU = torch.device("cuda", 0)


@pytest.fixture
def pretended() -> Iterator[None]:
    """Tensors that have a device and no values; those made on the CPU stay there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in module._parameters.items():
            module._parameters[name] = None if value is None else nn.Parameter(torch.empty_like(value, device=GPU))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=GPU)
    return model


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(4), torch.zeros(4, dtype=torch.int64)) for _ in range(count)]


STRUCTURES = {build: find_structure(build(), images()) for build in (chain, residual)}


@pytest.mark.parametrize("build", [chain, residual])
@pytest.mark.parametrize("score", [taylor, taylor_squared, activation, magnitude, batch_norm])
def test_importances(build: object, score: object, pretended: None) -> None:
    structure = STRUCTURES[build]  # type: ignore[index]
    scores = score(on_gpu(build()), structure, batches(2))  # type: ignore[operator]
    assert {n: len(s) for n, s in scores.items()} == structure.units


def test_the_sum_of_training_gradients(pretended: None) -> None:
    model = on_gpu(chain())
    scores = TaylorSum(STRUCTURES[chain])
    for x, y in batches(2):
        F.cross_entropy(model(x.to(GPU)), y.to(GPU)).backward()
        assert scores.update(model)
    assert {s.device for s in scores.scores.values()} == {GPU}


def test_means_gradients_and_fits(pretended: None) -> None:
    model = on_gpu(chain())
    assert {t.device.type for t in mean_inputs(model, ["3", "6"], batches(2)).values()} == {"cpu"}
    assert {t.device for t in loss_gradients(model, batches(2)).values()} == {GPU}
    weight, patches, wanted = (torch.empty(s, device=GPU) for s in ((6, 4, 3, 3), (50, 4, 9), (50, 6)))
    assert {t.device for t in reconstruct(weight, patches, wanted, 1)} == {GPU}


def test_nothing_is_copied_back_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(count: int) -> int:
        made = []
        cpu = Tensor.cpu
        monkeypatch.setattr(Tensor, "cpu", lambda x: made.append(1) or cpu(x))
        model, structure = chain(), STRUCTURES[chain]
        for score in (taylor, taylor_squared, activation):
            score(model, structure, batches(count))
        mean_inputs(model, ["3", "6"], batches(count))
        monkeypatch.undo()
        return len(made)

    assert copies(1) == copies(4)


def test_gradients_of_one_network_serve_all_its_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, budget = residual(), images(), Budget(macs_ratio=0.5)
    data = [(images(8, seed=s), torch.arange(8) % 5) for s in range(2)]
    once = prune_coupled(model, x, importance="taylor", budget=budget, data=data)
    gradients = loss_gradients(model, data)
    monkeypatch.setattr("rmprune.pruning.coupled.loss_gradients", lambda *_: pytest.fail("computed again"))
    again = prune_coupled(model, x, importance="taylor", budget=budget, gradients=gradients)
    assert torch.equal(once(x), again(x))
