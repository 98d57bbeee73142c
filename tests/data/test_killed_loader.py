"""Loader processes that are killed, as the kernel does where memory runs out: one line, not a traceback, wherever it meets the program."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rmprune import cli
from rmprune.data import photos
from rmprune.data.batches import class_loss, own_loss, watch_passes
from rmprune.errors import LOADER_KILLED, loader_killed

QUICK = (
    "--model resnet8 --width 2 --dataset imagefolder --image-size 16 --epochs 1 --batch-size 4 --workers 1 --measure.backend eager "
    "--measure.seconds 0 --measure.min-rounds 1 --measure.threads 1 --measure.batch-size 1"
)


@pytest.mark.parametrize(
    ("reader", "flags"),
    [
        ("whole", "--cache none --augment imagenet"),  # of training
        ("__getitem__", "--cache none --augment imagenet"),  # of evaluation alone
        ("whole", "--cache memory"),  # of decoding
    ],
    ids=["training", "evaluation", "decoding"],
)
def test_it_is_one_line(
    reader: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(24):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 9 * i, np.uint8)).save(path)
    real = getattr(photos.Photos, reader)

    def read(self: photos.Photos, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    monkeypatch.setattr(photos.Photos, reader, read)
    monkeypatch.setattr(photos, "_AT_ONCE", 4)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "train",
                *QUICK.split(),
                *flags.split(),
                "--data-dir",
                str(tmp_path / "photos"),
                "--out",
                str(tmp_path / "run"),
            ]
        )
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.splitlines()[-1] == f"rmprune: error: {LOADER_KILLED}"
    assert "Traceback" not in said and "--workers 0" in LOADER_KILLED


class Stumbling(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise RuntimeError("a codec is missing")


def test_what_a_loader_process_raises_itself_is_not_taken_for_its_end() -> None:
    with pytest.raises(RuntimeError, match="a codec is missing") as raised:
        list(torch.utils.data.DataLoader(Stumbling(), num_workers=1))
    assert "DataLoader worker" in str(raised.value) and not loader_killed(raised.value)


class Told(nn.Module):
    """Computes when torch's signal handler raises."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_while_the_network_computes_it_is_not_the_network_s_fault() -> None:
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    for work in (
        lambda: watch_passes([(x, y)], Told(), []),
        lambda: own_loss(lambda model, batch: class_loss(model(batch[0]), batch[1]), Told(), (x, y)),
    ):
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            work()
