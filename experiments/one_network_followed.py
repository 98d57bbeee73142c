"""One network followed through `slim` to its artifact: which rooms and files it passes, and how often it goes from one to another.

    python experiments/one_network_followed.py      # prints; seconds

Trains, slims and measures a ResNet-8 on the digits by one method, and notes each function of rmprune that is handed a whole network (a
module of ten modules or more) as the next place it comes to. A change of room goes up where the room it comes to lies on a higher floor.
"""

import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

import rmprune
from rmprune.config import MeasureConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.pipelines.slim import run_slim

ROOT = Path(rmprune.__file__).parent
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from imports import floors, room_imports  # noqa: E402

WHOLE = 10  # modules


class Notes:
    """The files of rmprune in which a network arrived, in order, each once for a stay."""

    def __init__(self) -> None:
        self.files: list[Path] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(ROOT)):
            return
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        file = Path(code.co_filename).relative_to(ROOT)
        if any(map(whole, given)) and (not self.files or self.files[-1] != file):
            self.files.append(file)


def whole(given: Any) -> bool:
    """Whether it is a network, or as much of one as a block."""
    return isinstance(given, nn.Module) and "_modules" in vars(given) and len(list(given.modules())) >= WHOLE


def rooms(files: list[Path]) -> Iterator[str]:
    """The rooms of these files, each once for a stay."""
    last = None
    for file in files:
        if (room := file.parts[0].removesuffix(".py")) != last:
            yield room
        last = room


def main() -> None:
    """Slim one network, and print where it was."""
    notes, quick = Notes(), MeasureConfig(seconds=0, min_rounds=3)
    one = TrainConfig(epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        config = SlimConfig(
            model="resnet8", method=("rm",), train=one, finetune=one, prune=PruneConfig(ratio=(0.5,)), measure=quick,
            out=Path(folder) / "run",
        )  # fmt: skip
        sys.setprofile(notes)
        try:
            run_slim(config, command="")
        finally:
            sys.setprofile(None)
    floor = floors({room: set(others) for room, others in room_imports(ROOT).items()})
    way = list(rooms(notes.files))
    up = sum(floor[after] > floor[before] for before, after in pairwise(way))
    print(
        f"{len(set(notes.files))} files in {len(set(way))} rooms ({', '.join(dict.fromkeys(way))}); "
        f"{len(way) - 1} changes of room, {up} of them up; {len(notes.files) - 1} changes of file"
    )


if __name__ == "__main__":
    main()
