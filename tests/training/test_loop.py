"""The loop: it learns, continues exactly, follows its hook, and refuses what it must."""

import copy
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmprune.config import DataConfig, SparsityConfig, TrainConfig
from rmprune.data.load import Dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit
from rmprune.errors import ArtifactError, ConfigError, RmpruneError
from rmprune.models.families import create
from rmprune.pruning import Budget
from rmprune.pruning.gradual import GradualPruner
from rmprune.training import TrainState, evaluate, fit, make_optimizer
from rmprune.training.checkpoint import load_checkpoint, save_checkpoint
from rmprune.training.optimizer import learning_rate, parameter_groups, total_learning_rate
from rmprune.training.precision import autocast, compute_dtype, processor_has_bfloat16
from rmprune.training.sparsity import ProximalL1, batch_norm_scales, fraction_zero
from rmprune.training.teacher import distillation_loss

CONFIG = TrainConfig(epochs=3, warmup_epochs=0.5, precision="float32")


def blobs(config: DataConfig | None = None) -> Dataset:
    """Two classes of 8x8 images, bright above or bright below: easy to tell apart, with noise."""
    config = config or DataConfig(batch_size=16)

    def split(count: int, seed: int) -> TensorSplit:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        images = torch.randint(0, 120, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
        images[labels == 0, :, :4] += 100
        images[labels == 1, :, 4:] += 100
        return TensorSplit(Images(images, labels), torch.tensor([110.0]), torch.tensor([60.0]), may_flip=False)

    return Dataset("blobs", 2, (1, 8, 8), split(88, 0), split(40, 1), split(40, 2), config)


def tiny_net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),  # draws from the global generator: exact resumption must restore it
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def records(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


class Stop:
    """A hook that interrupts after so many steps, and passes on to another hook before."""

    def __init__(self, after: int, inner: object = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.after, self.inner, self.error = after, inner, error

    def __call__(self, state: TrainState) -> None:
        if self.inner:
            self.inner(state)  # type: ignore[operator]
        if state.step == self.after:
            raise self.error


# ------------------------------------------------------------------------------------------------- learning and logs


def test_it_learns_and_leaves_the_argument_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data, model = blobs(), tiny_net()
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "rmprune"):
        trained = fit(
            model, data, dataclasses.replace(CONFIG, epochs=6), seed=0, log=tmp_path / "log.jsonl", label="dense"
        )
    assert same(model, before) and torch.equal(random_state, torch.get_rng_state())
    assert not trained.training
    assert evaluate(trained, data.test).accuracy > 0.95 > evaluate(before.eval(), data.test).accuracy
    lines = records(tmp_path / "log.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "label",
        "train_loss",
        "train_accuracy",
        "validation_accuracy",
        "learning_rate",
        "images_per_second",
        "seconds",
    }
    assert wanted <= lines[0].keys() and lines[0]["label"] == "dense"
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["validation_accuracy"] == evaluate(trained, data.validation).accuracy
    assert len(caplog.records) == 6 and "epoch 6/6" in caplog.text


def test_the_seed_decides():
    first, again, other = (fit(tiny_net(), blobs(), CONFIG, seed=seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)


def test_bfloat16_and_memory_order_change_only_the_rounding():
    plain = fit(tiny_net(0.0), blobs(), dataclasses.replace(CONFIG, channels_last=False), seed=0)
    for change in ({"channels_last": True}, {"precision": "bfloat16"}):
        other = fit(tiny_net(0.0), blobs(), dataclasses.replace(CONFIG, **change), seed=0)
        x = blobs().test.example(8)
        assert other[0].weight.dtype == torch.float32
        torch.testing.assert_close(other(x), plain(x), atol=0.3, rtol=0.3)


def test_no_epochs_is_no_training():
    model = tiny_net()
    assert same(fit(model, blobs(), dataclasses.replace(CONFIG, epochs=0), seed=0), model)


def test_evaluate_limits_and_restores_the_mode():
    data, model = blobs(), tiny_net().train()
    model[1].eval()
    result = evaluate(model, data.test, batch_size=7, limit=10)
    assert model.training and not model[1].training
    x, y = next(data.test.batches(10))
    output = model.eval()(x)
    assert result.accuracy == pytest.approx(float((output.argmax(1) == y).float().mean()))
    assert result.loss == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------- checkpoints, Ctrl-C


@pytest.mark.parametrize("after", [1, 5, 7, 15])  # first step; the last of epoch 1; mid-epoch; the very last
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, after: int):
    hook = ProximalL1(SparsityConfig(strength=0.5))
    whole = fit(tiny_net(), blobs(), CONFIG, seed=3, hook=hook, log=tmp_path / "whole.jsonl")
    path, log = tmp_path / "checkpoint" / "dense.pt", tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=3, hook=Stop(after, hook), checkpoint=path, log=log)
    assert load_checkpoint(path)["step"] == after
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=3, hook=hook, checkpoint=path, log=log)
    assert same(whole, resumed)
    facts = ("epoch", "train_loss", "train_accuracy", "validation_accuracy", "validation_loss", "learning_rate")
    for a, b in zip(records(tmp_path / "whole.jsonl"), records(log), strict=True):
        assert {key: a[key] for key in facts} == {key: b[key] for key in facts}
    assert [path.name for path in path.parent.iterdir()] == ["dense.pt"]


def test_a_crash_resumes_from_the_last_timed_checkpoint(tmp_path: Path):
    config = dataclasses.replace(CONFIG, checkpoint_seconds=1e-9)
    path = tmp_path / "c.pt"
    with pytest.raises(ZeroDivisionError):
        fit(tiny_net(), blobs(), config, seed=3, hook=Stop(8, error=ZeroDivisionError), checkpoint=path)
    assert load_checkpoint(path)["step"] == 7
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=3, checkpoint=path)  # another checkpoint_seconds is no other run
    assert same(resumed, fit(tiny_net(), blobs(), CONFIG, seed=3))


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    path, log = tmp_path / "c.pt", tmp_path / "log.jsonl"
    first = fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=path, log=log)
    again = fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=path, log=log, hook=Stop(0))
    assert same(first, again) and len(records(log)) == 3


def test_ctrl_c_waits_for_the_step(tmp_path: Path, request: pytest.FixtureRequest):
    """A real signal in the middle of a step: the checkpoint is of a whole step, and goes on exactly."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))

    class Signal(nn.Module):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.training and Signal.armed:
                Signal.armed = False
                os.kill(os.getpid(), signal.SIGINT)
            return x

    def net() -> nn.Module:
        return nn.Sequential(*tiny_net(), Signal())

    def arm(state: TrainState) -> None:
        Signal.armed = state.step == 6

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(net(), blobs(), CONFIG, seed=0, checkpoint=path, hook=arm)
    assert load_checkpoint(path)["step"] == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = fit(net(), blobs(), CONFIG, seed=0, checkpoint=path)
    assert same(resumed, fit(net(), blobs(), CONFIG, seed=0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"label": "finetune"}, "stage is train there, finetune here"),
        ({"config": dataclasses.replace(CONFIG, epochs=4)}, "epochs is 3 there, 4 here"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}, "network differs"),
        ({"data": blobs(DataConfig(batch_size=8))}, "batch_size is 16 there, 8 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict, word: str):
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Stop(2), checkpoint=path)
    before = path.read_bytes()
    call = {"model": tiny_net(), "data": blobs(), "config": CONFIG, "seed": 0} | change
    with pytest.raises(ArtifactError, match=word):
        fit(**call, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "code"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"format": 1, "net": tiny_net()}, path)  # pickled code: must not run
    with pytest.raises(ArtifactError, match=r"c\.pt is damaged"):
        load_checkpoint(path)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match="no space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------- the hook


def cut(state: TrainState) -> None:
    """After step 7 keep the first three channels of the first convolution."""
    if state.step == 7:
        old = state.model
        new = copy.deepcopy(old)
        new[0] = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        new[1] = nn.BatchNorm2d(3)
        new[4] = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        with torch.no_grad():
            new[0].weight.copy_(old[0].weight[:3])
            new[4].weight.copy_(old[4].weight[:, :3])
            new[4].bias.copy_(old[4].bias)
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(new[1], name).copy_(getattr(old[1], name)[:3])
        state.model = new
        state.optimizer = make_optimizer(new, state.config)


def test_a_hook_may_replace_the_model(tmp_path: Path):
    seen = []

    def hook(state: TrainState) -> None:
        assert state.model[0].weight.grad is not None
        cut(state)
        seen.append((state.step, state.epoch, state.model[0].out_channels))

    whole = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=hook)
    assert whole[0].out_channels == 3
    assert seen[0] == (1, 0, 6) and seen[4] == (5, 0, 6) and seen[6] == (7, 1, 3) and seen[-1] == (15, 2, 3)
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Stop(9, cut), checkpoint=path)
    assert load_checkpoint(path)["architecture"] is not None
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=cut, checkpoint=path)
    assert same(whole, resumed)
    x = blobs().test.example(5)
    assert torch.equal(whole(x), resumed(x))


def test_pruning_while_training_goes_on_exactly(tmp_path: Path):
    torch.manual_seed(0)
    model = create("resnet8", num_classes=2, in_channels=1, width=4)

    class Pruner(GradualPruner):
        stop = -1

        def __call__(self, state: TrainState) -> None:
            super().__call__(state)
            if state.step == self.stop:
                raise KeyboardInterrupt

    def pruner(stop: int) -> Pruner:
        hook = Pruner(model, blobs().train.example(2), Budget(ratio=0.4), prune_epochs=2, every=2)
        hook.stop = stop
        return hook

    whole = fit(model, blobs(), CONFIG, seed=0, hook=pruner(-1))
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(model, blobs(), CONFIG, seed=0, hook=pruner(7), checkpoint=path)
    assert load_checkpoint(path)["architecture"] is not None
    assert same(whole, fit(model, blobs(), CONFIG, seed=0, hook=pruner(-1), checkpoint=path))
    assert sum(p.numel() for p in whole.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def test_a_replaced_model_gets_an_optimizer(tmp_path: Path):
    def hook(state: TrainState) -> None:
        if state.step == 2:
            state.model = copy.deepcopy(state.model).eval()

    trained = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=hook)
    assert evaluate(trained, blobs().test).accuracy > 0.9  # it went on learning, in training mode


def test_the_state_of_a_hook_goes_into_the_checkpoint(tmp_path: Path):
    class Counter:
        steps = 0

        def __call__(self, state: TrainState) -> None:
            self.steps += 1
            assert self.steps == state.step
            if state.step == self.stop:
                raise KeyboardInterrupt

        def __init__(self, stop: int) -> None:
            self.stop = stop

        def state_dict(self) -> dict:
            return {"steps": self.steps}

        def load_state_dict(self, state: dict) -> None:
            self.steps = state["steps"]

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Counter(4), checkpoint=path)
    hook = Counter(-1)
    fit(tiny_net(), blobs(), CONFIG, seed=0, hook=hook, checkpoint=path)
    assert hook.steps == 15


def test_sparse_training_yields_exact_zeros():
    sparse = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=ProximalL1(SparsityConfig(strength=1.3)))
    dense = fit(tiny_net(), blobs(), CONFIG, seed=0)
    assert fraction_zero(batch_norm_scales(sparse)) > 0.2 > fraction_zero(batch_norm_scales(dense)) == 0


# ------------------------------------------------------------------------------------------- optimizer, losses, errors


def test_biases_and_norms_do_not_decay():
    model = create("resnet8", num_classes=2, width=4)
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"conv1", "conv2", "0", "fc"}
    assert all("bn" in names[id(p)] or names[id(p)].endswith((".bias", "downsample.1.weight")) for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 2


def test_momentum_may_lie_in_another_memory_order():
    """A hook that slices momentum need not keep the order; torch's fused SGD would step wrongly without a word."""
    results = []
    for order in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = nn.Conv2d(6, 4, 3, bias=False).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, CONFIG)
        optimizer.state[model.weight] = {"momentum_buffer": torch.randn(4, 6, 3, 3).contiguous(memory_format=order)}
        model(torch.randn(2, 6, 8, 8)).square().sum().backward()
        optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(*results)


def test_the_schedule_warms_up_and_ends_low():
    config = TrainConfig(epochs=4, learning_rate=0.2, warmup_epochs=1)
    rates = [learning_rate(config, step, 10) for step in range(40)]
    assert rates[0] == pytest.approx(0.02) and rates[9] == pytest.approx(0.2) == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.002
    assert total_learning_rate(config, 10) == pytest.approx(sum(rates))
    constant = dataclasses.replace(config, schedule="constant", warmup_epochs=0)
    assert {learning_rate(constant, step, 10) for step in range(40)} == {0.2}
    assert learning_rate(dataclasses.replace(config, warmup_epochs=99), 39, 10) == pytest.approx(0.2)


def test_one_step_is_that_of_plain_torch():
    """Against a step written out by hand: loss with smoothing, clipping, Nesterov, decay on convolutions only."""
    data = blobs(DataConfig(batch_size=88, augment=False))
    config = TrainConfig(
        epochs=1, warmup_epochs=0, label_smoothing=0.1, clip_norm=0.05, precision="float32", weight_decay=0.1
    )
    model = tiny_net(0.0)
    trained = fit(model, data, config, seed=0)
    model.train()
    x, y = next(data.train.batches(88, shuffle_seed=0))
    nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.05
    for (name, p), q in zip(model.named_parameters(), trained.parameters(), strict=True):
        step = p.grad * 0.05 / (norm + 1e-6) + (0.1 * p.detach() if p.ndim > 1 else 0)
        torch.testing.assert_close(q.detach(), p.detach() - 0.1 * 1.9 * step, atol=2e-6, rtol=1e-5, msg=name)


def test_a_loss_that_is_not_finite_says_what_to_do(tmp_path: Path):
    path = tmp_path / "c.pt"

    def poison(state: TrainState) -> None:
        if state.step == 7:
            state.model[0].weight.data.fill_(float("nan"))

    with pytest.raises(RmpruneError, match=r"step 8 of 15.*lower learning_rate"):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=poison, checkpoint=path)
    assert load_checkpoint(path)["step"] == 5


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    path = tmp_path / "c.pt"

    def poison(state: TrainState) -> None:
        if state.step == 10:
            state.model[0].weight.data.fill_(float("nan"))

    with pytest.raises(RmpruneError, match="no longer finite"):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=poison, checkpoint=path)
    assert load_checkpoint(path)["step"] == 5


def test_distillation_follows_the_teacher():
    data, config = blobs(), dataclasses.replace(CONFIG, distillation=1.0, epochs=6)
    teacher = tiny_net()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    before = copy.deepcopy(teacher)
    student = fit(tiny_net(0.0), data, config, seed=0, teacher=teacher)
    assert same(teacher, before) and teacher.training

    def distance(model: nn.Module) -> float:
        x = data.test.example(40)
        with torch.no_grad():
            return float(distillation_loss(model.eval()(x), before.eval()(x), 4.0))

    assert distance(student) < 0.5 * distance(fit(tiny_net(0.0), data, CONFIG, seed=0))
    with pytest.raises(ConfigError, match="no teacher"):
        fit(tiny_net(), data, config, seed=0)


class Asked(nn.Sequential):
    """A teacher that counts, over all its copies, what it is asked."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        Asked.times += 1
        return super().forward(x)


def test_a_teacher_is_asked_once_about_the_batches_of_a_seed(tmp_path: Path):
    data, config = blobs(), dataclasses.replace(CONFIG, distillation=0.5)
    teacher, memory = Asked(*tiny_net()), tmp_path / "memory"

    def train(**changed: Any) -> tuple[nn.Module, int]:
        Asked.times = 0
        settings: dict[str, Any] = {"data": data, "seed": 0, "teacher": teacher, "teacher_memory": memory} | changed
        return fit(tiny_net(), config=config, **settings), Asked.times

    alone, _ = train(teacher_memory=None)
    first, all_of_them = train()
    again, none = train()
    assert same(alone, first) and same(alone, again)
    assert (all_of_them, none) == (15, 0) and len(list(memory.iterdir())) == 3
    assert train(seed=1)[1] == 15
    assert train(data=blobs(DataConfig(batch_size=16, augment=False)))[1] == 15
    teacher[0].weight.data += 1
    assert train()[1] == 15


def test_a_damaged_or_unfinished_memory_of_a_teacher_is_made_anew(tmp_path: Path):
    data, config = blobs(), dataclasses.replace(CONFIG, distillation=0.5)
    settings: dict[str, Any] = {"seed": 0, "teacher": Asked(*tiny_net()), "teacher_memory": tmp_path / "memory"}
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), data, config, hook=Stop(7), checkpoint=path, **settings)
    (kept,) = (tmp_path / "memory").iterdir()  # the first epoch; the second was interrupted
    kept.write_bytes(b"damaged")
    whole = fit(tiny_net(), data, config, **settings)
    assert len(list((tmp_path / "memory").iterdir())) == 3 and kept.read_bytes() != b"damaged"
    Asked.times = 0
    assert same(fit(tiny_net(), data, config, checkpoint=path, **settings), whole) and Asked.times == 0


def test_distillation_loss_is_zero_for_equals_and_scales_with_temperature():
    logits, other = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert abs(float(distillation_loss(logits, logits, 4.0))) < 1e-6
    p, q = (other / 2).softmax(1), (logits / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(logits, other, 2.0), expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_precision():
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) == torch.float32 and compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if processor_has_bfloat16() else torch.float32)


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"schedule": "linear"},
        {"precision": "float16"},
        {"clip_norm": 0.0},
        {"distillation": 1.5},
    ],
)
def test_settings_outside_their_range(field: dict):
    with pytest.raises(ConfigError, match=next(iter(field))):
        TrainConfig(**field)


def test_tensorboard_needs_a_log_and_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(CONFIG, tensorboard=True)
    with pytest.raises(ConfigError, match="log"):
        fit(tiny_net(), blobs(), config, seed=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'rmprune\[all\]'"):
        fit(tiny_net(), blobs(), config, seed=0, log=tmp_path / "log.jsonl")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rmprune.training.journal._REFRESH_SECONDS", 0.0)
    fit(tiny_net(), blobs(), dataclasses.replace(CONFIG, epochs=1), seed=0, label="dense")
    shown = capsys.readouterr()
    assert "dense" in shown.err and "images/s" in shown.err and not shown.out


# -------------------------------------------------------------------------------------------------- several processes

_SCRIPT = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from pathlib import Path
from test_loop import fit_without_batch_norms
trained = fit_without_batch_norms(Path({out!r}))
torch.save(trained.state_dict(), os.path.join({out!r}, "rank" + os.environ["RANK"] + ".pt"))
"""


def fit_without_batch_norms(out: Path) -> nn.Module:
    """Batch norms see their own process's images only, so with them two processes are not one."""
    model = nn.Sequential(*[module for module in tiny_net(0.0) if not isinstance(module, nn.BatchNorm2d)])
    config = TrainConfig(epochs=2, precision="float32", learning_rate=0.02)
    return fit(model, blobs(), config, seed=0, log=out / "log.jsonl", checkpoint=out / "c.pt")


def test_two_processes_train_like_one(tmp_path: Path):
    alone = tmp_path / "alone"
    expected = fit_without_batch_norms(alone).state_dict()
    here = Path(__file__).parent
    code = _SCRIPT.format(tests=str(here), root=str(here.parents[1]), out=str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=shared | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, atol=1e-5, rtol=1e-4)
    facts = ("epoch", "train_accuracy", "validation_accuracy")
    both = zip(records(alone / "log.jsonl"), records(tmp_path / "log.jsonl"), strict=True)
    assert all([a[key] for key in facts] == [b[key] for key in facts] for a, b in both)


def test_on_a_cpu_autocast_trains_strided_depthwise_layers_in_float32():
    """oneDNN's bfloat16 gradient of these is several times slower; every other layer computes in bfloat16."""
    x = torch.randn(2, 8, 9, 9)
    for stride, groups, wide in ((2, 8, True), (1, 8, False), (2, 1, False)):
        layer = nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=False)
        with autocast("bfloat16", torch.device("cpu")):
            output = layer(x)
            with torch.no_grad():
                assert layer(x).dtype == torch.bfloat16
        exact = torch.equal(output, layer(x).to(torch.bfloat16))
        assert output.dtype == torch.bfloat16 and exact == wide
        output.float().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
