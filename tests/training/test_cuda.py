"""On a GPU, where there is one: what `fake_device` stands in for elsewhere."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from training_nets import CONFIG, blobs, tiny_net

import rmprune
from rmprune.training import evaluate, fit
from rmprune.training import loop as training_loop

pytestmark = pytest.mark.cuda


def say_what_waits(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within a training step whatever waits for the GPU is an error."""
    whole = training_loop._Training.train_step

    def watched(self: Any, *batch: Any) -> None:
        try:
            say_what_waits("error")
            whole(self, *batch)
        finally:
            say_what_waits("default")

    monkeypatch.setattr(training_loop._Training, "train_step", watched)
    yield


def trained(device: str, *, graph: bool, precision: Any = "float32", epochs: int = 6) -> nn.Module:
    config = dataclasses.replace(CONFIG, epochs=epochs, precision=precision, cuda_graph=graph, distillation=0.5)
    return fit(tiny_net(0.0), blobs(), config, seed=0, device=device, teacher=tiny_net(0.0))


@pytest.mark.usefixtures("no_waiting")
def test_steps_do_not_wait() -> None:
    trained("cuda", graph=False, epochs=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replayed_step_is_the_step(precision: str) -> None:
    nets = [trained("cuda", graph=graph, precision=precision) for graph in (False, True)]
    accuracies = [evaluate(net, blobs().test, device="cuda").accuracy for net in nets]
    assert min(accuracies) > 0.95
    if precision == "float32":
        for net in nets:
            for own, other in zip(net.parameters(), trained("cpu", graph=False).parameters(), strict=True):
                torch.testing.assert_close(own.cpu(), other, rtol=0.05, atol=0.05)


def test_results_lie_on_the_gpu() -> None:
    net, x = rmprune.models.create("resnet8", num_classes=10, width=8).eval().cuda(), torch.randn(16, 3, 16, 16).cuda()
    plain = rmprune.remove_residuals(net, x).model
    pruned = rmprune.prune(plain, x, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.5))
    for found in (plain, pruned, rmprune.collapse_blocks(net, x).model):
        assert {t.device.type for t in (*found.parameters(), *found.buffers())} == {"cuda"} and found(x).is_cuda
