"""Wrote the files beside it, with the code of 0.1.0 (commit 8c083e2): `cd CHECKOUT && python .../write.py OUT`.

Kept to show what the files are; today's code cannot run it (modules have moved since) and need not. The weights of the artifacts are
small whole numbers and the deviations of their batch norms powers of two, so that every processor computes the same outputs, bit for bit.
Of the two runs only what a test reads is kept.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import rmprune
from rmprune.cli import main
from rmprune.config import DataConfig, TrainConfig
from rmprune.data import load_dataset
from rmprune.pruning import Budget, GradualPruner
from rmprune.pruning.gradual import State
from rmprune.training import fit, loop

EPS = 2.0**-10


def whole(model: nn.Module) -> nn.Module:
    """The network with whole numbers in its layers, and batch norms that add and multiply exactly."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPS
            module.running_mean.copy_(torch.randint(-3, 4, module.running_mean.shape, generator=draw))
            module.running_var.copy_(4.0 ** torch.randint(0, 2, module.running_var.shape, generator=draw) - EPS)
            module.num_batches_tracked.fill_(7)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-2, 3, parameter.shape, generator=draw))
    return model


class Residual(nn.Module):
    """A block with a function, a method and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.relu(self.block(x) + x)
        return self.fc(x.mean((2, 3)).flatten(1))


class Tied(nn.Module):
    """One weight in two layers, one layer called twice, a frozen parameter, one read directly, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.first(x)))) * self.scale + self.shift


def networks() -> dict[str, nn.Module]:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1, groups=4),
        nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    timm = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 2, 3))
    return {
        "plain": whole(plain).eval(),
        "residual": whole(Residual()).double().eval(),
        "timm": whole(timm).eval(),
        "channels-last": whole(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)))
        .to(memory_format=torch.channels_last)
        .eval(),
        "tied": whole(Tied()).train(),
    }


def artifacts(out: Path) -> None:
    tensors, facts = {}, {}
    for name, model in networks().items():
        x = torch.randint(-4, 5, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
        x = x.to(next(model.parameters()).dtype)
        rmprune.save(model, out / name, extra={"name": name})
        with torch.no_grad():
            tensors[f"{name}.input"], tensors[f"{name}.output"] = x, model(x).contiguous()
        facts[name] = {
            "training": model.training,
            "state": {key: [list(t.shape), str(t.dtype), list(t.stride())] for key, t in model.state_dict().items()},
            "frozen": [key for key, p in model.named_parameters() if not p.requires_grad],
        }
    save_file(tensors, out / "outputs.safetensors")
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def checkpoints(out: Path) -> None:
    """A training of two epochs of four steps, stopped after step 6; by itself, and with cuts after steps 2 and 4."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU()
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10))
    rmprune.save(network, out / "start")
    data = load_dataset(DataConfig(train_images=64, batch_size=16))
    config = TrainConfig(epochs=2, precision="float32", learning_rate=0.01)
    for name in ("train", "pruned"):

        def train(stop: int | None, file: Path | None, name: str = name) -> nn.Module:
            hook = Stop(network, data.train.example(1), stop, cuts=name == "pruned")
            return fit(network, data, config, seed=0, hook=hook, checkpoint=file, label=name, progress=False)

        with contextlib.suppress(KeyboardInterrupt):
            train(6, out / f"{name}.pt")
        end = {key: tensor.contiguous() for key, tensor in train(None, None).state_dict().items()}
        save_file(end, out / f"{name}-end.safetensors")


class Stop(GradualPruner):
    """Stops the training after a step; where it cuts, as the pruner does."""

    def __init__(self, network: nn.Module, x: Tensor, stop: int | None, *, cuts: bool) -> None:
        super().__init__(network, x, Budget(ratio=0.5, min_channels=2), prune_epochs=1, every=2)
        self.stop, self.done = stop, not cuts

    def __call__(self, state: State) -> None:
        super().__call__(state)
        if state.step == self.stop:
            raise KeyboardInterrupt


SLIM = (
    "slim --model resnet8 --width 2 --device cpu --train-images 64 --batch-size 16 --epochs 1 --finetune.epochs 2 --ratio 0.5 "
    "--method rm,residual --round-to 1 --precision float32 --finetune.precision float32 "
    "--measure.backend eager --measure.batch-size 1 --measure.seconds 0 --measure.threads 1"
)


def runs(out: Path) -> None:
    """A finished run (its config and record) and the same stopped while it fine-tuned its second method."""
    main([*SLIM.split(), "--out", str(out / "finished")])
    step, taken = loop._Run.train_step, 0

    def stopping(self: loop._Run, *batch: Tensor) -> None:
        nonlocal taken
        taken += self.label == "residual"
        if taken == 6:
            raise KeyboardInterrupt
        step(self, *batch)

    loop._Run.train_step = stopping
    with contextlib.suppress(SystemExit):
        main([*SLIM.split(), "--out", str(out / "interrupted")])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    artifacts(target / "artifacts")
    checkpoints(target / "checkpoints")
    runs(target / "runs")
