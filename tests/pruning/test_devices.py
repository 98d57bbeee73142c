"""Importances and fits compute where the network is: on a pretended GPU, where mixing in a tensor of another device is an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import chain, images, residual
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmprune.pruning import find_structure, prune_coupled
from rmprune.pruning.budget import Budget
from rmprune.pruning.calibration import Calibrator, Cut
from rmprune.pruning.coupled import loss_gradients
from rmprune.pruning.importance import Importance, TaylorSum, activation, batch_norm, magnitude, taylor, taylor_squared
from rmprune.pruning.one_shot import mean_inputs
from rmprune.pruning.program import read_program
from rmprune.pruning.reconstruct import reconstruct as fit_weights
from rmprune.pruning.refit import Fitting

GPU = torch.device("mps", 0)


@contextmanager
def pretended(build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """A network on a device that is not there. Its tensors have a place and no values; those made on the CPU stay there."""
    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield on_gpu(model)


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
@pytest.mark.parametrize("score", [activation, magnitude, batch_norm])
def test_importances(build: Callable[[], nn.Module], score: Importance) -> None:
    structure = STRUCTURES[build]
    with pretended(build) as model:
        scores = score(model, structure, batches(2))
    assert {n: len(s) for n, s in scores.items()} == structure.units


def test_taylor_scores() -> None:
    """Where gradients are taken the meta device stands for another one."""
    model, structure, meta = chain().to("meta"), STRUCTURES[chain], torch.device("meta")
    for score in (taylor, taylor_squared):
        assert {s.device for s in score(model, structure, batches(2)).values()} == {meta}
    scores = TaylorSum(structure)
    for x, y in batches(2):
        F.cross_entropy(model(x.to(meta)), y.to(meta)).backward()
        assert scores.update(model)
    assert {s.device for s in scores.scores.values()} == {meta}


def test_means_gradients_and_fits() -> None:
    with pretended(chain) as model:
        assert {t.device.type for t in mean_inputs(model, ["3", "6"], batches(2)).values()} == {"cpu"}
        weight, patches, wanted = (torch.empty(s, device=GPU) for s in ((6, 4, 3, 3), (50, 4, 9), (50, 6)))
        assert {t.device for t in fit_weights(weight, patches, wanted, 1)} == {GPU}


@pytest.mark.parametrize("reconstruct", [False, True])
def test_calibration(reconstruct: bool) -> None:
    structure, x = STRUCTURES[chain], images(4)
    program = read_program(chain(), structure, x).unshared()
    settings = Fitting(torch.float64, reconstruct, samples=64, own_statistics=False)
    keep = {name: torch.arange(units) % 2 == 0 for name, units in structure.units.items()}
    model, x = chain().to("meta"), x.to("meta")
    calibrator, first = Calibrator(model, structure, settings), program.ops[0].name
    calibrator.measure_reference(program, x)
    fitted = calibrator.fit(program, {first: x}, Cut.of(model, structure, keep))
    weights = [fit.weight for fit in fitted.values() if fit.weight is not None]
    assert {w.device for w in weights} == {torch.device("meta")} and [len(w) for w in weights] == [4, 6, 8, 5]


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
