"""Training on a GPU that is not there (fake_device): everything lies on it, nothing in a step waits for it, and the result is the CPU's."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import GPU, Places, pretended_gpu
from marks import few, long
from torch import nn
from training_nets import CONFIG, Stop, blobs, same, tiny_net

from rmprune.config import SparsityConfig
from rmprune.errors import ConfigError
from rmprune.measure import cuda_graphs
from rmprune.pruning import Budget
from rmprune.pruning.gradual import GradualPruner
from rmprune.training import TrainState, evaluate, fit
from rmprune.training import loop as training_loop
from rmprune.training.precision import repeatable
from rmprune.training.sparsity import ProximalL1


@pytest.fixture
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "WARM_UP", 3)


def train(gpu: bool, **settings: Any) -> tuple[nn.Module, Places | None]:
    """The same training on the CPU or the pretended GPU; the trained network on the CPU."""
    change = settings.pop("change", {})
    config = dataclasses.replace(CONFIG, epochs=2, clip_norm=0.5, **change)
    if not gpu:
        return fit(tiny_net(0.0), blobs(), config, seed=0, **settings), None
    with pretended_gpu() as places:
        trained = fit(tiny_net(0.0), blobs(), config, seed=0, device="cuda", **settings)
        assert {t.device for t in (*trained.parameters(), *trained.buffers())} == {GPU}
        assert evaluate(trained, blobs().test, device="cuda").accuracy > 0.4
        return trained.cpu(), places


def pruner() -> GradualPruner:
    return GradualPruner(tiny_net(0.0), blobs().train.example(2), Budget(ratio=0.5), prune_epochs=1.0, every=2)


@pytest.mark.usefixtures("short_warm_up")
@pytest.mark.parametrize("graph", few([False, True], True))
@pytest.mark.parametrize("hook", [None, long(lambda: ProximalL1(SparsityConfig(strength=0.5))), pruner])
def test_it_trains_what_the_cpu_trains(graph: bool, hook: Any) -> None:
    first, _ = train(False, hook=hook and hook())
    trained, _ = train(True, hook=hook and hook(), change={"cuda_graph": graph})
    assert same(first, trained)


@pytest.mark.usefixtures("short_warm_up")
@pytest.mark.parametrize("graph", few([False, True], True))
def test_a_teacher_is_followed_there(graph: bool, tmp_path: Path) -> None:
    settings = {"teacher": tiny_net(0.0), "change": {"distillation": 0.5, "cuda_graph": graph}}
    first, _ = train(False, teacher_memory=tmp_path / "cpu", **settings)
    assert all(same(first, train(True, teacher_memory=tmp_path / "gpu", **settings)[0]) for _ in "12")


@pytest.mark.parametrize("hook", [long(None), long(lambda: ProximalL1(SparsityConfig(strength=0.5))), pruner])
def test_no_step_waits_or_copies(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[tuple[str, str]]] = []
    whole = training_loop._Training.train_step

    def watched(self: Any, *batch: Any) -> None:
        before = len(places_of_now[0].noted)
        whole(self, *batch)
        steps.append(places_of_now[0].noted[before:])

    monkeypatch.setattr(training_loop._Training, "train_step", watched)
    places_of_now: list[Places] = []
    with pretended_gpu() as places:
        places_of_now.append(places)
        config = dataclasses.replace(CONFIG, epochs=2, distillation=0.5, cuda_graph=False)
        fit(tiny_net(), blobs(), config, seed=0, device="cuda", hook=hook and hook(), teacher=tiny_net())
    busy = 4 if hook is pruner else 0  # a cut, and the step after it, which takes its indices over
    assert len(steps) == 10 and not any(steps[busy:]), steps


@pytest.mark.long
@pytest.mark.usefixtures("short_warm_up")
def test_it_goes_on_exactly(tmp_path: Path) -> None:
    whole, _ = train(True)
    with pytest.raises(KeyboardInterrupt):
        train(True, hook=Stop(7), checkpoint=tmp_path / "c.pt")
    assert same(whole, train(True, checkpoint=tmp_path / "c.pt")[0])


@pytest.mark.long
@pytest.mark.usefixtures("short_warm_up")
def test_what_cannot_be_recorded_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Asking(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) < 1e9 else x

    with pretended_gpu():
        before = torch.cuda.current_stream()
        fit(Asking(*tiny_net()), blobs(), CONFIG, seed=0, device="cuda")
        assert torch.cuda.current_stream() is before
    assert "not recorded as a CUDA graph: operation not permitted" in caplog.text


def test_deterministic_kernels_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for asked, device, found in ((True, "cuda", True), (False, "cuda", False), (True, "cpu", False)):
        with repeatable(asked, torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled() is found
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is (asked and device == "cuda")
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        assert not torch.are_deterministic_algorithms_enabled()
    refused = pytest.raises(ConfigError, match="no deterministic implementation; leave --deterministic out")
    with refused, repeatable(True, torch.device("cuda")):
        raise RuntimeError("max_pool2d_backward: there is no deterministic implementation\nand so on")


def test_another_gpu_is_the_current_one_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are the current GPU's: a graph recorded on the first would hold nothing of what the second does."""
    chosen: list[str] = []
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "device", lambda name: chosen.append(name) or contextlib.nullcontext())
        fit(tiny_net(), blobs(), dataclasses.replace(CONFIG, epochs=0), seed=0, device="cuda:1")
    assert chosen == ["cuda:1"]


def test_the_fake_would_notice() -> None:
    """A network left on the CPU, a factory without a device, and a look at the loss."""
    x = torch.randn(2, 1, 8, 8)
    with pretended_gpu() as places:
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            tiny_net()(x.to("cuda"))
        with pytest.raises(RuntimeError, match="two devices"):
            x.to("cuda") + torch.zeros(8)
        places.noted.clear()
        assert float(x.to("cuda").sum().cpu()) != 0 and x.to("cuda")[x.to("cuda") > 0].device == GPU
        assert [what for what, _ in places.noted][:3] == ["copy: to cuda", "copy: to cpu", "copy: to cuda"]
        assert "wait: nonzero" in str(places.noted) or "wait: index" in str(places.noted)
        with pytest.raises(TypeError, match="can't convert cuda"):
            x.to("cuda").numpy()


def test_a_hook_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    def look(state: TrainState) -> None:
        seen.extend(p.grad.device for p in state.model.parameters() if p.grad is not None)

    train(True, hook=look)
    assert set(seen) == {GPU}
