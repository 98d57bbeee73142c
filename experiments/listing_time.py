"""How long listing a folder of photos takes beside torchvision's ImageFolder: seconds of the processor, the best of three.

python experiments/listing_time.py        # 100,000 empty files in 100 classes, made in a temporary folder
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from torchvision.datasets import ImageFolder

from rmprune.config import DataConfig
from rmprune.data.listing import list_photos


@dataclass(frozen=True)
class Settings:
    """How many files."""

    classes: int = 100
    each: int = 1000


def best(work: Callable[[], object]) -> float:
    """Seconds of the processor."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as place:
        for number in range(settings.classes):
            folder = Path(place) / f"class{number:04}"
            folder.mkdir()
            for photo in range(settings.each):
                (folder / f"{photo:06}.jpg").touch()
        ours = best(lambda: list_photos(DataConfig(dataset="imagefolder", data_dir=Path(place))))
        theirs = best(lambda: ImageFolder(place))
        print(
            f"{settings.classes * settings.each} files: {ours:.2f} s, torchvision {theirs:.2f} s, {ours / theirs:.1f} times"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
