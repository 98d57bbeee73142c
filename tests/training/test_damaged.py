"""Checkpoints of a training that are damaged or made to do harm: refused before memory is taken, and nothing is lost."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from torch import Tensor, nn

from rmprune.errors import ArtifactError
from rmprune.measure.memory import PeakMemory
from rmprune.training import fit
from rmprune.training.checkpoint import architecture_of


def larger(content: dict[str, Any]) -> None:
    """An architecture of 16 GiB for the same weights."""
    content["architecture"] = json.dumps(
        json.loads(
            content["architecture"]
            .replace('"out_features": 3', f'"out_features": {2**24}')
            .replace('"in_features": 64', '"in_features": 256')
        )
    )


def damaged_constant(content: dict[str, Any]) -> None:
    content["architecture"] = architecture_of(WithConstant())


Edit = Callable[[dict[str, Any]], Any]
EDITS: dict[str, Edit] = {
    "no weights": lambda c: c.pop("model"),
    "no fingerprint": lambda c: c.pop("fingerprint"),
    "a fingerprint that is a list": lambda c: c.update(fingerprint=[1]),
    "a step that is no number": lambda c: c.update(step=float("inf")),
    "a step before the first": lambda c: c.update(step=-1),
    "a step after the last": lambda c: c.update(step=3),
    "sums of another length": lambda c: c.update(totals=torch.zeros(2, dtype=torch.float64)),
    "sums that are complex": lambda c: c.update(totals=torch.zeros(3, dtype=torch.complex128)),
    "a time before the start": lambda c: c.update(seconds=-1.0),
    "a momentum of another shape": lambda c: c["optimizer"].update({"1.weight": {"momentum_buffer": torch.ones(2)}}),
    "a momentum that is a text": lambda c: c["optimizer"].update({"1.weight": {"momentum_buffer": "x"}}),
    "weights without values": lambda c: c["model"].update({"1.weight": torch.ones(3, 64, device="meta")}),
    "sparse weights": lambda c: c["model"].update({"1.weight": torch.eye(64)[:3].to_sparse()}),
    "weights that only look large": lambda c: c["model"].update({"1.weight": torch.ones(1, 1).expand(2**20, 2**20)}),
    "an architecture that is a number": lambda c: c.update(architecture=3),
    "an architecture that is no JSON": lambda c: c.update(architecture="[" * 10_000),
    "an architecture larger than the weights": larger,
    "an architecture with a constant that is not there": damaged_constant,
    "a format that is a tensor": lambda c: c.update(format=torch.ones(2)),
    "a hook's state that is none": lambda c: c.update(hook={"steps": float("inf")}),
    "random numbers' state of another length": lambda c: c.update(random=torch.zeros(3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_checkpoint_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    content = torch.load(fuzz.training()[3], weights_only=True)
    EDITS[name](content)
    torch.save(content, tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    with PeakMemory() as peak, pytest.raises(ArtifactError, match=r"c\.pt .*delete it to start again"):
        fuzz.read_checkpoint(tmp_path / "c.pt")
    assert (tmp_path / "c.pt").read_bytes() == before and peak.mib < 200


class WithConstant(nn.Module):
    """Adds a buffer that its state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 2)
        self.register_buffer("shift", torch.tensor([1.0, -1.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) + self.shift


class Stopped(fuzz.Shrink):
    """Puts a network with a constant in place, and is interrupted at the next step."""

    stop = True

    def __call__(self, state: Any) -> None:
        self.steps += 1
        if self.steps == 1:
            torch.manual_seed(1)
            state.model = WithConstant()
        elif self.steps == 2 and self.stop:
            signal.raise_signal(signal.SIGINT)  # waits for the end of the step


def test_the_constants_of_a_network_that_a_hook_made_come_back(tmp_path: Path) -> None:
    model, data, config, _ = fuzz.training()
    straight, stopped = Stopped(), Stopped()
    straight.stop = False
    expected = fit(copy.deepcopy(model), data, config, seed=0, progress=False, hook=straight)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, config, seed=0, progress=False, hook=stopped, checkpoint=tmp_path / "c.pt")
    again = Stopped()
    again.stop = False
    found = fit(model, data, config, seed=0, progress=False, hook=again, checkpoint=tmp_path / "c.pt")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(found(x), expected(x))
