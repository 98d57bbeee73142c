"""Folders of photographs: layouts, parts, kinds of files, the cache, augmentation, and what is refused."""

import csv
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_device import pretended_gpu
from PIL import Image

from rmprune.config import DataConfig
from rmprune.data import depth, photos
from rmprune.data.depth import bit_depth
from rmprune.data.folder import FolderSplit, lightly_augmented
from rmprune.data.listing import list_photos
from rmprune.data.load import Dataset, load_dataset
from rmprune.data.splits import HALF, Statistics, draw_part
from rmprune.errors import ConfigError, DataError, RmpruneError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return photos.cache_folder(None)


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make(root: Path, counts: dict[str, int]) -> Path:
    """{"train/cat": 8}: so many images in that folder."""
    for place, count in counts.items():
        for i in range(count):
            save(root / place / f"{i}.png", seed=sum(place.encode()) + i)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, {"train/cat": 8, "train/dog": 8, "val/cat": 3, "val/dog": 3})


def config(folder: Path, **settings: object) -> DataConfig:
    return DataConfig(
        dataset="imagefolder", data_dir=folder, image_size=16, **({"validation": 0.25, "workers": 0} | settings)
    )


def opened(folder: Path, **settings: object) -> Dataset:
    return load_dataset(config(folder, **settings))


def names(data: Dataset) -> list[set[str]]:
    """The files of training, validation and test."""
    parts: list[set[str]] = []
    for split in (data.train, data.validation, data.test):
        assert isinstance(split, FolderSplit)
        parts.append({"/".join(Path(split.photos.paths[i]).parts[-3:]) for i in split.indices.tolist()})
    return parts


@pytest.mark.parametrize("augment", ["imagenet", "mirrors", "turns"])
def test_a_folder_of_photos(folder: Path, augment: str) -> None:
    data = opened(folder, augment=augment)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 6)
    assert data.num_classes == 2 and data.input_shape == (3, 16, 16) and data.classes == ("cat", "dog")
    state = torch.get_rng_state()
    whole = list(data.train.batches(4, shuffle_seed=1, augment=True))
    rest = list(data.train.batches(4, shuffle_seed=1, augment=True, start=1))
    assert torch.equal(state, torch.get_rng_state())
    assert [tuple(x.shape) for x, _ in whole] == [(4, 3, 16, 16)] * 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(whole[0][0], next(data.train.batches(4, shuffle_seed=1))[0])
    assert not torch.equal(whole[0][0], next(data.train.batches(4, shuffle_seed=2, augment=True))[0])
    assert len(data.train.batches(6).__next__()[1].unique()) == 2  # mixed: the first images are of both classes


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"": 10}, (12, 4, 4)),  # none named: all are drawn
        ({"train": 8, "test": 3}, (12, 4, 6)),
        ({"train": 8, "val": 3}, (12, 4, 6)),  # val/ alone is the test, as ImageNet's
        ({"train": 8, "val": 2, "test": 3}, (16, 4, 6)),
    ],
)
def test_parts_are_named_or_drawn(tmp_path: Path, parts: dict[str, int], sizes: tuple[int, int, int]) -> None:
    make(tmp_path, {f"{part}/{label}".strip("/"): count for part, count in parts.items() for label in ("cat", "dog")})
    data = opened(tmp_path)
    train, validation, test = names(data)
    assert (
        (len(train), len(validation), len(test)) == sizes and not train & validation and not (train | validation) & test
    )
    if "train" in parts:
        assert {name.split("/")[0] for name in test} == {"test" if "test" in parts else "val"}
    again, other = names(opened(tmp_path)), names(opened(tmp_path, split_seed=5))
    assert again == [train, validation, test] and other[2] == test
    assert (other[1] == validation) == (sizes[0] == 16)


def listed(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return Path("labels.csv")


def test_a_csv_with_groups(tmp_path: Path) -> None:
    make(tmp_path, {"pictures": 40})
    kinds = ["good", "bad", "bad", "odd"]
    rows = [{"file": f"pictures/{i}.png", "kind": kinds[i // 2 % 4], "part": f"p{i // 2}"} for i in range(40)]
    labels = listed(tmp_path, rows)
    data = opened(tmp_path, labels=labels, image_column="file", label_column="kind", group_column="part")
    assert data.classes == ("bad", "good", "odd")
    group = {row["file"]: row["part"] for row in rows}
    found = [{group["/".join(name.split("/")[1:])] for name in part} for part in names(data)]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert all(len(part) == len(found[number]) * 2 for number, part in enumerate(names(data)))
    for split in (data.train, data.validation, data.test):
        assert isinstance(split, FolderSplit) and len(split.labels.unique()) == 3


def test_groups_are_as_stratified_as_they_allow() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    groups = [f"g{int(number)}" for number in torch.randint(0, 150, (600,), generator=generator)]
    chosen = draw_part(labels, 0.2, 3, groups)
    inside, outside = (
        {g for g, there in zip(groups, chosen.tolist(), strict=True) if there is part} for part in (True, False)
    )
    assert not inside & outside
    assert all(abs(float(chosen[labels == c].double().mean()) - 0.2) < 0.03 for c in range(3))
    assert torch.equal(chosen, draw_part(labels, 0.2, 3, groups)) and not torch.equal(
        chosen, draw_part(labels, 0.2, 4, groups)
    )


def test_a_csv_names_the_parts_and_folders_the_classes(tmp_path: Path) -> None:
    make(tmp_path, {"cat": 6, "dog": 6})
    parts = ["train", "train", "train", "train", "valid", "test"]
    rows = [{"image": f"{label}/{i}.png", "split": parts[i]} for label in ("cat", "dog") for i in range(6)]
    data = opened(tmp_path, labels=listed(tmp_path, rows))
    assert data.classes == ("cat", "dog") and [len(part) for part in names(data)] == [8, 2, 2]


@pytest.mark.parametrize("above", ["", "images/"])
@pytest.mark.parametrize("val", ["val", "Test"])
def test_where_a_csv_names_no_parts_the_folders_do(
    tmp_path: Path, above: str, val: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They were drawn across both."""
    make(tmp_path, {f"{above}train": 16, f"{above}{val}": 4})
    rows = [
        {"image": f"{above}{part}/{i}.png", "label": "xy"[i % 2], "cell": f"{part}{i // 4}"}
        for part, count in (("train", 16), (val, 4))
        for i in range(count)
    ]
    with caplog.at_level("INFO"):
        data = opened(tmp_path, labels=listed(tmp_path, rows))
    train, validation, test = ({Path(name).parent.name for name in part} for part in names(data))
    assert (train, validation, test) == ({"train"}, {"train"}, {val}) and len(data.test) == 4
    assert f"labels.csv: no column 'split': {' and '.join(sorted(['train/', f'{val}/']))} name the parts" in caplog.text
    rows[0]["cell"] = rows[-1]["cell"]
    with pytest.raises(DataError, match=r"group '.*0' is in train and in .*; put all its images into one by the CSV's"):
        opened(tmp_path, labels=listed(tmp_path, rows), group_column="cell")
    for row in rows[16:]:
        row["label"] = "x"
    with pytest.raises(DataError, match=r"has no image of 'y'; name the parts in the CSV's column 'split'"):
        opened(tmp_path, labels=listed(tmp_path, rows))


@pytest.mark.parametrize(
    ("folders", "warned"),
    [(("train", "val", "more"), "more/0.png"), (("val", "test"), "there is no train/"), (("train", "b"), "")],
)
def test_where_some_photos_lie_in_no_part_all_parts_are_drawn(
    tmp_path: Path, folders: tuple[str, ...], warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, dict.fromkeys(folders, 4))
    rows = [{"image": f"{name}/{i}.png", "label": "xy"[i % 2]} for name in folders for i in range(4)]
    photos_of = list_photos(config(tmp_path, labels=listed(tmp_path, rows))).photos
    assert {photo.part for photo in photos_of} == {""}
    assert ("parts are drawn from all images alike" in caplog.text) == bool(warned) and warned in caplog.text


def test_a_column_of_parts_has_any_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`subset` was passed over, and parts drawn across those that it names."""
    rows = [
        {"image": name, "class": name.split("/")[1], "subset": part}
        for name, part in zip(FILES, ("train", "TRAIN", "test", "Test"), strict=True)
    ]
    with caplog.at_level("INFO"):
        found = list_photos(config(folder, labels=listed(folder, rows)))
    assert [photo.part for photo in found.photos] == ["train", "train", "test", "test"]
    assert "column 'subset' is taken for 'split'" in caplog.text


def test_a_column_may_be_called_as_a_photo(folder: Path) -> None:
    rows = [{"image": name, "label": name.split("/")[1], "mean.png": "0.5"} for name in FILES]
    assert len(list_photos(config(folder, labels=listed(folder, rows))).photos) == 4


@pytest.mark.parametrize(
    "names", [("1", "1.0", "01", "\uff11"), ("M\u00fcller", "Mu\u0308ller", " m\u00fcller"), ("a 1", "A  1 ", "a\t1")]
)
def test_groups_that_read_alike_are_one(folder: Path, names: tuple[str, ...]) -> None:
    rows = [f"train/{kind}/{i}.png,{kind},{names[i % len(names)]}" for kind in ("cat", "dog") for i in range(6)]
    (folder / "a.csv").write_text("\n".join(["image,label,part", *rows, "val/cat/0.png,cat,2", "val/dog/0.png,dog,"]))
    listed = list_photos(config(folder, labels=Path("a.csv"), group_column="part")).photos
    assert len({photo.group for photo in listed[:12]}) == 1
    assert len({photo.group for photo in listed}) == 3 and listed[-1].group == ""


@pytest.mark.parametrize(("second", "warned"), [("Cat", True), ("cat ", True), ("cats", False)])
def test_classes_of_one_name_in_two_spellings_are_said(
    tmp_path: Path, second: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(list_photos(config(make(tmp_path, {"cat": 1, second: 1, "dog ": 1, "1": 1, "1.0": 1}))).classes) == 5
    assert (f"classes {min('cat', second)!r} and {max('cat', second)!r} are two" in caplog.text) == warned
    assert "classes '1' and '1.0' are two" in caplog.text and "dog" not in caplog.text


COLUMNS = "File_Name{0}Class{0}Part{0}Split\n{1}{0}cat{0}p{0}Train\n{2}{0}dog{0}q{0}Training\n{3}{0}cat{0}r{0}TEST\n{4}{0}dog{0}s{0}test\n"
FILES = ["train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"]


@pytest.mark.parametrize(
    "written",
    [
        COLUMNS.format(";", *FILES).encode("utf-16"),
        COLUMNS.format("\t", *FILES).replace("\n", "\r\n").encode("utf-8-sig"),
        ("sep=;\r\n" + COLUMNS.format(";", *FILES) + ";;;\r\n").replace("cat;", "K\xe4tzchen;").encode("cp1252"),
        COLUMNS.format(",", *(f'"{name}"' for name in FILES)).replace("cat,", '"cat, the first",').encode(),
        COLUMNS.format(", ", *(name.replace("/", "\\").upper() for name in FILES)).encode(),
        COLUMNS.format("|", *(name.removesuffix(".png") for name in FILES)).encode(),
    ],
    ids=["utf-16, semicolons", "tabs", "Excel", "quoted", "Windows", "no endings"],
)
def test_a_csv_of_any_program(folder: Path, written: bytes) -> None:
    (folder / "a.csv").write_bytes(written)
    listed, classes = list_photos(config(folder, labels=Path("a.csv"), group_column="part"))
    assert [Path(photo.path).relative_to(folder).as_posix() for photo in listed] == FILES
    assert [photo.group for photo in listed] == ["p", "q", "r", "s"] and classes[1 - classes.index("dog")] != "dog"
    assert [photo.part for photo in listed] == ["train", "train", "test", "test"]


@pytest.mark.parametrize("change", ["come", "gone", "class", "part", "size", "name"])
def test_other_photos_are_known_by_their_digest(folder: Path, change: str) -> None:
    before, photo = opened(folder).photos, folder / "train" / "cat" / "3.png"
    moved = shutil.copytree(folder, folder.with_name(f"{folder.name}-moved"))
    assert before == opened(folder).photos == opened(moved).photos
    if change == "come":
        save(folder / "train" / "cat" / "8.png", seed=1)
    elif change == "size":
        Image.new("RGB", (20, 24)).save(photo)
    else:
        places = {"gone": ".3.png", "class": "../dog/x.png", "part": "../../val/cat/x.png", "name": "x.png"}
        photo.rename(photo.parent / places[change])
    assert opened(folder).photos != before


def test_what_systems_leave_in_folders_is_no_photo(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = list_photos(config(folder))
    for name in (
        "train/__MACOSX/cat/._0.png",
        "train/cat/._0.png",
        "train/.git/a.png",
        "train/cat/.ipynb_checkpoints/0.png",
    ):
        save(folder / name, 0)
    (folder / "val" / "cat" / "Thumbs.db").touch()
    with caplog.at_level("INFO"):
        assert list_photos(config(folder)) == before
    assert "left out, no images that are read: 1 .db" in caplog.text
    save(folder / "train" / "cat" / "9.GIF", 0)
    assert len(list_photos(config(folder)).photos) == len(before.photos) + 1


@pytest.mark.parametrize("names", [("Train", "Validation"), ("training", "valid"), ("train", "TEST")])
def test_parts_are_named_in_several_ways(folder: Path, names: tuple[str, str]) -> None:
    for part, name in zip(("train", "val"), names, strict=True):
        (folder / part).rename(folder / name)
    listed, classes = list_photos(config(folder))
    assert {photo.part for photo in listed} == {"train", "test" if "TEST" in names else "val"} and classes == (
        "cat",
        "dog",
    )


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    assert list_photos(config(make(tmp_path, {"training": 1, "match": 1}))).classes == ("match", "training")


def test_what_stands_beside_parts_changes_nothing(folder: Path) -> None:
    """Another folder made classes of Train/ and Val/; unlabelled images in Test/ kept all from being read."""
    before = [photo._replace(path="") for photo in list_photos(config(folder)).photos]
    save(folder / "samples" / "x.png", 0)
    save(folder / "Test" / "x.png", 0)
    save(folder / "validation" / "x.png", 0)
    assert [photo._replace(path="") for photo in list_photos(config(folder)).photos] == before
    for part in ("train", "val"):
        (folder / part).rename(folder / part.capitalize())
    assert [photo._replace(path="") for photo in list_photos(config(folder)).photos] == before


@pytest.mark.parametrize(
    "header", ["image,label,box x|y|w|h", 'image,"label;x;y;z"', "file;a,b,c;label", "\n\nimage;label"]
)
def test_signs_in_other_columns_are_no_separators(folder: Path, header: str) -> None:
    sign = ";" if header.strip().startswith(("file", "image;")) else ","
    cells = ["train/cat/0.png", "train/dog/0.png"], ["cat", "dog"]
    width = len(next(csv.reader([header.strip()], delimiter=sign)))
    rows = [sign.join([image, *[label] * (width - 1)]) for image, label in zip(*cells, strict=True)]
    (folder / "a.csv").write_text("\n".join([header, *rows]))
    listed = list_photos(
        config(folder, labels=Path("a.csv"), label_column="label" if "x;y" not in header else "label;x;y;z")
    )
    assert listed.classes == ("cat", "dog") and len(listed.photos) == 2


def test_paths_in_a_csv_are_taken_as_they_stand_and_through_links(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder / "train" / " a.png", 1)
    save(folder / "train" / "a.png", 2)
    shutil.move(folder / "val", folder.with_name("elsewhere"))
    (folder / "linked").symlink_to(folder.with_name("elsewhere"), target_is_directory=True)
    (folder / "a.csv").write_text("image,target\ntrain/ a.png,m\nlinked/cat/0, n\n")
    with caplog.at_level("INFO"):
        listed = list_photos(config(folder, labels=Path("a.csv")))
    assert [Path(photo.path).name for photo in listed.photos] == [" a.png", "0.png"] and listed.classes == ("m", "n")
    assert "column 'target' is taken for 'label'" in caplog.text


def test_paths_in_a_csv_may_lead_out_of_the_folder(folder: Path) -> None:
    root = folder / "train"
    (root / "a.csv").write_text(f"image,label\n../val/cat/0.png,m\n{folder / 'val' / 'dog' / '1.png'},n\n")
    listed = list_photos(config(root, labels=Path("a.csv")))
    assert [Path(photo.path).resolve().relative_to(folder.resolve()).as_posix() for photo in listed.photos] == [
        "val/cat/0.png",
        "val/dog/1.png",
    ]


def test_a_photo_in_two_parts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path, {"train/a": 4, "train/zebra": 4, "val/a": 2, "val/zebra": 2})
    opened(folder)
    assert "in two parts" not in caplog.text
    shutil.copy(folder / "train" / "a" / "0.png", folder / "val" / "a" / "again.png")
    opened(folder)
    assert "1 photo is in two parts" in caplog.text and "again.png" in caplog.text


def square(path: Path) -> torch.Tensor:
    return photos.Photos([str(path)], 4, bit_depth([str(path)]))[0]


def test_palettes_transparency_and_turned_photos(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = 255
    photo = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    photo.save(tmp_path / "turned.png", exif=exif)
    photo.convert("P").save(tmp_path / "palette.png")
    photo.convert("P").save(tmp_path / "clear.png", transparency=bytes(range(256)))
    photo.convert("RGBA").save(tmp_path / "transparent.webp", lossless=True)
    upright = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(square(tmp_path / "turned.png"), torch.rot90(upright, -1, (1, 2)))
    assert torch.equal(square(tmp_path / "palette.png"), upright) and torch.equal(
        square(tmp_path / "clear.png"), upright
    )
    assert torch.equal(square(tmp_path / "transparent.webp"), upright)


def batches(data: Dataset) -> Iterator[torch.Tensor]:
    for split in (data.train, data.validation, data.test):
        yield from (x for x, _ in split.batches(4))
        yield from (x for x, _ in split.batches(4, shuffle_seed=2, augment=True))


@pytest.mark.parametrize("augment", ["imagenet", "light"])
def test_a_cache_changes_nothing_but_time(
    folder: Path, augment: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = list(batches(opened(folder, augment=augment, cache="none")))
    helped = list(batches(opened(folder, augment=augment, cache="memory", workers=1)))
    written = list(batches(opened(folder, augment=augment, cache="disk")))
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(plain, helped, written, strict=True))
    (file,) = (cache / "photos").iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos.Photos, "_decoded", None)  # nothing is decoded again
        opened(folder, augment=augment, cache="disk")
    file.write_bytes(file.read_bytes()[:-5])  # a damaged one is made anew, and so is that of a changed photo
    save(folder / "val" / "cat" / "1.png", seed=99)
    changed = list(batches(opened(folder, augment=augment, cache="disk")))
    assert not all(torch.equal(x, y) for x, y in zip(plain, changed, strict=True))
    assert len(list((cache / "photos").iterdir())) == 2


def test_where_there_is_room_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 4096
    monkeypatch.setattr(photos.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    monkeypatch.setattr(photos.os, "sysconf", lambda name: 8192 if "PAGES" in name else 1)
    assert [photos.room_for(size, tmp_path / "none" / "yet") for size in (2048, 2049, 4096, 4097)] == [
        "disk", "memory", "memory", "none",
    ]  # fmt: skip


def test_light_augmentation_moves_mirrors_and_turns() -> None:
    numbered = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    seen: dict[str, Counter[tuple[int, int]]] = {kind: Counter() for kind in ("light", "mirrors", "turns")}
    for kind, counted in seen.items():
        for seed in range(200):
            window = lightly_augmented(numbered, 7, torch.Generator().manual_seed(seed), kind)[0].int()
            assert window.shape == (7, 7)
            counted[int(window[0, 1] - window[0, 0]), int(window[1, 0] - window[0, 0])] += (
                1  # along the row, down the column
            )
    assert set(seen["light"]) == {(1, 8), (-1, 8)}
    assert set(seen["mirrors"]) == {(1, 8), (-1, 8), (1, -8), (-1, -8)}
    assert set(seen["turns"]) == {(x * a, y * b) for a in (1, -1) for b in (1, -1) for x, y in ((1, 8), (8, 1))}
    assert all(min(counted.values()) > 100 / len(counted) for counted in seen.values())
    edge = lightly_augmented(numbered, 8, torch.Generator().manual_seed(1), "light")
    assert edge.shape == (1, 8, 8) and set(edge.flatten().tolist()) <= set(range(64))


@pytest.mark.parametrize("augment", ["none", "light", "mirrors", "turns"])
@pytest.mark.parametrize("crop", [1.0, 0.6])
def test_a_gpu_that_holds_the_photos_makes_the_same_batches(folder: Path, augment: str, crop: float) -> None:
    split, passes = opened(folder, augment=augment, crop=crop).train, []
    order = {"shuffle_seed": 3, "augment": True, "shard": (1, 2)}
    with pretended_gpu() as places:
        for device in ("cpu", "cuda"):
            found = []
            for batch in split.batches(4, device=device, **order):
                assert all(t.device.type == device for t in batch)
                found.append([t.cpu() for t in batch])
                places.noted.clear()
            passes.append(found)
        batches = split.batches(4, device="cuda", **order)
        next(batches)
        before = len(places.noted)
        assert (
            before and list(batches) and len(places.noted) == before
        )  # between batches nothing is waited for or copied
    assert len(passes[0]) == 3 and all(
        torch.equal(a, b) for one in zip(*passes, strict=True) for a, b in zip(*one, strict=True)
    )


def test_a_gpu_that_lacks_the_room_holds_no_photos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = opened(folder).train.photos
    with pretended_gpu():
        assert held.on(torch.device("cuda")).device.type == "cuda" and pickle.loads(pickle.dumps(held))._held is None
        held._held = None
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * held.squares.nbytes - 1, 2**40))
        assert held.on(torch.device("cuda")) is None


def test_statistics_are_those_of_the_weights_or_of_the_settings(folder: Path) -> None:
    expected = Statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    data = load_dataset(config(folder), expected)
    pixels = next(opened(folder, normalization="half").test.batches(6))[0] * 0.5 + 0.5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in expected)
    assert data.statistics == expected and opened(folder, normalization="half").statistics == HALF
    assert torch.allclose(next(data.test.batches(6))[0], (pixels - mean) / std, atol=1e-5)


def test_classes_that_count_alike(tmp_path: Path) -> None:
    data = opened(make(tmp_path, {"train/cat": 8, "train/dog": 24, "test/cat": 2, "test/dog": 2}), balance=True)
    assert data.class_weights is not None
    assert torch.allclose(data.class_weights, torch.tensor([2.0, 2 / 3]))
    assert opened(tmp_path).class_weights is None


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_damaged_image_is_named(folder: Path, workers: int, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "_AT_ONCE", 2)
    monkeypatch.setattr(depth, "_LOOKED_AT", 1)
    whole = (folder / "val" / "cat" / "1.png").read_bytes()
    (folder / "val" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png is missing or damaged .*kinds that are read: .*JPEG, ") as caught:
        list(opened(folder, workers=workers, cache=cache).test.batches(2))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()  # left alive, they took ten seconds to be told at some later time


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_of_any_name_is_named_in_one_line(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "_AT_ONCE", 2)
    monkeypatch.setattr(depth, "_LOOKED_AT", 1)
    (folder / "val" / "dog" / "9\nDataError: x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^/.*/9\?DataError: x\.png is missing or damaged .it is empty"):
        opened(folder, workers=workers, cache="memory")


def csv_of(text: str):
    def write(folder: Path) -> dict[str, object]:
        (folder / "a.csv").write_text(text)
        return {"labels": Path("a.csv")}

    return write


SPLIT_CELL = "train/cat/0.png,train,7\ntrain/dog/0.png,train,8\nval/cat/0.png,test,7\nval/dog/0.png,test,9\n"
CAT, DOG = "train/cat/0.png,cat\n", "train/dog/0.png,dog\n"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "val" / "cat").rename(f / "val" / "cow"), "differ in classes"),
        (lambda f: (f / "train" / "cow").mkdir(), "cow"),
        (lambda f: make(f, {"train/cow": 2, "val/cow": 1}) and {"validation": 0.9}, "'cow' has no image left for training"),
        (lambda f: {"data_dir": f / "val" / "cat"}, "CLASS/image.jpg"),
        (lambda f: {"data_dir": None}, "--data-dir"),
        (lambda f: (f / "train").rename(f / "learn"), "no train/"),
        (lambda f: make(f / "one", {"cat": 4}) and {"data_dir": f / "one"}, "all images are of one class, 'cat'"),
        (lambda f: Image.new("RGB", (1, 99)).save(f / "train" / "cat" / "9.png"), "1x99 pixels"),
        (lambda f: Image.new("F", (9, 9)).save(f / "train" / "cat" / "9.tif"), "32-bit floats"),
        (lambda f: Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(f / "train" / "cat" / "9.tif"), "from 70000 to 70000"),
        (lambda f: Image.fromarray(np.full((9, 9), -5, np.int32)).save(f / "train" / "cat" / "9.tif"), "from -5 to -5"),
        (lambda f: {"labels": Path("none.csv")}, "none.csv: cannot be read"),
        (csv_of(""), "no rows"),
        (csv_of("image,label\n"), "no rows"),
        (csv_of("picture,label\n" + CAT), "no column 'image'; there are: picture, label"),
        (csv_of("image,label\n" + CAT + CAT + DOG), "stands in two rows"),
        (csv_of("image,label\n" + CAT + DOG + "train/dog/../cat/0.png,dog\n"), "one calls it 'train/cat/0.png'"),
        (csv_of("image,label\n" + CAT + DOG + "train/dog/1.png,\n"), "column 'label' is empty"),
        (csv_of("file,path,label\na," + CAT + "b," + DOG), "several columns could be the image; there are: file, path, label"),
        (lambda f: csv_of("image,label\n" + CAT + DOG)(f) | {"label_column": "kind"}, "no column 'kind'; there are: image, label"),
        (csv_of("image,label,label\n" + CAT), "two columns are called 'label'"),
        (lambda f: (f / "a.csv").write_bytes(b"PK\3\4\0\0") and {"labels": Path("a.csv")}, "a spreadsheet or archive"),
        (lambda f: save(f / "train" / "cat" / "0.jpg", 1) or csv_of("image,label\ntrain/CAT/0,cat\n" + DOG)(f), "several files"),
        (lambda f: (f / "train" / "cat" / "9.jpg").write_text("<html>404"), "it is a text that begins with '<html>404'"),
        (lambda f: os.mkfifo(f / "train" / "cat" / "9.jpg"), "not a regular file"),
        (lambda f: [os.mkfifo(f / part / "cat" / "9.jpg") for part in ("train", "val")], "not a regular file"),
        (lambda f: (f / "train" / "cat" / "9.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF"), "%!PS"),
        (lambda f: [(f / part / "cat").rename(f / part / "c\udcff") for part in ("train", "val")], "a name that is no Unicode"),
        (lambda f: shutil.copytree((f / "val").rename(f / "Valid"), f / "validation"), "Valid/ and validation/ are one part"),
        (lambda f: [(f / "train").rename(f / "Train"), (f / "val").rename(f / "Meta")], "Train/ holds folders and stands beside"),
        (lambda f: make(f / "one" / "all", {"cat": 2, "dog": 2}) and {"data_dir": f / "one"}, "if its folders are the classes"),
        (csv_of("image,label\n" + CAT + "train/dog/77.png,dog\n"), "no such file"),
        (csv_of("image,label\n" + CAT + "train/dog/0.png\n"), "row 3 has another number of columns"),
        (csv_of("image,label\n" + CAT), "one class"),
        (csv_of("image,split\ntrain/cat/0.png,learn\ntrain/dog/0.png,test\n"), "split 'learn'"),
        (lambda f: csv_of("image,label\n" + CAT + DOG)(f) | {"group_column": "cell"}, "no column 'cell'"),
        (
            lambda f: csv_of("image,split,cell\n" + SPLIT_CELL)(f) | {"group_column": "cell"},
            "group '7' is in train and in test",
        ),
        (
            lambda f: (
                csv_of("image,cell\n" + "".join(f"train/{c}/{i}.png,7\n" for c in ("cat", "dog") for i in range(3)))(f)
                | {"group_column": "cell"}
            ),
            "leaves no image to train on; column 'cell' makes too few groups",
        ),
        (csv_of(CAT + DOG), "its first line has a photo, 'train/cat/0.png'; begin it with a line of names: image,label"),
        (csv_of("image,label\n" + CAT + "/train/dog/0.png,dog\n"), "train/dog/0.png; the CSV names paths below --data-dir"),
        (csv_of("image,label,set,use\n" + CAT[:-1] + ",train,val\n" + DOG[:-1] + ",test,train\n"), "columns 'set' and 'use' name parts"),
        (lambda f: Image.new("1", (14_000, 14_000)).save(f / "train" / "cat" / "9.png"), "9.png is larger than photos that are read"),
        (lambda f: [p.unlink() for p in f.rglob("*.png") if p.name != "0.png" and p.parent.parent.name == "train"], "there are too few"),
        (lambda f: {"group_column": "cell"}, "give it with --labels"),
        (lambda f: {"transforms": "mine.py:augment"}, "mine.py:augment would be executed"),
        (lambda f: {"augment": "heavy"}, "augment is 'heavy'; use one of none, light"),
    ],
)  # fmt: skip
def test_what_is_refused_before_training(folder: Path, spoil, told: str) -> None:
    settings = spoil(folder)
    with pytest.raises((DataError, ConfigError), match=told.replace(".", r"\.")) as caught:
        load_dataset(
            DataConfig(
                **{"dataset": "imagefolder", "data_dir": folder, "workers": 0}
                | (settings if isinstance(settings, dict) else {})
            )
        )
    assert isinstance(caught.value, RmpruneError) and "\n" not in str(caught.value)


def test_augment_was_a_switch(folder: Path) -> None:
    kinds = [replace(config(folder), augment=value).augmentation for value in (True, False, "turns")]
    assert kinds == ["imagenet", "none", "turns"]
    assert [DataConfig(augment=value).augmentation for value in (True, False)] == ["light", "none"]
    with pytest.raises(ConfigError, match="for an imagefolder"):
        DataConfig(augment="imagenet")


@pytest.mark.parametrize("to", ["..", "."])
def test_a_circle_of_links_counts_no_photo_twice(folder: Path, to: str) -> None:
    kind = next(path for path in sorted(folder.rglob("*")) if path.is_dir() and any(path.glob("*.png")))
    (kind / "round").symlink_to(to)
    with pytest.raises(DataError, match="are one folder by a link"):
        load_dataset(DataConfig("imagefolder", data_dir=folder))


@pytest.mark.parametrize("labels", [None, Path("a.csv")])
def test_a_folder_that_cannot_be_read_is_named(
    folder: Path, labels: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(at: str | Path) -> object:
        if Path(at) == folder / "val" / "cat":
            raise PermissionError(13, "Permission denied", str(at))
        return real(at)

    (folder / "a.csv").write_text("image,label\n" + CAT.replace("cat", "CAT", 1) + DOG)  # so that all is looked through
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"val/cat: cannot be read \(Permission denied\)"):
        list_photos(config(folder, labels=labels))


def test_one_photo_has_one_class(folder: Path) -> None:
    first, other = [path for path in sorted((folder / "train").iterdir()) if path.is_dir()][:2]
    (other / "again.png").symlink_to(next(first.glob("*.png")).resolve())
    with pytest.raises(DataError, match="are one file by a link"):
        load_dataset(DataConfig("imagefolder", data_dir=folder))


def test_listing_asks_folders_and_no_photo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stat for each of a million photos takes longer than reading their names."""
    asked: list[str] = []
    real = os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, *given, **named: asked.append(str(path)) or real(path, *given, **named))
        found = list_photos(config(folder))
    assert found.photos and not {photo.path for photo in found.photos} & set(asked)


def test_file_systems_that_number_all_files_alike_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSE does without use_ino; only where two numbers are equal are files themselves compared."""
    monkeypatch.setattr("rmprune.data.listing.number_of", lambda entry, device: 2**32 - 1)
    assert len({photo.label for photo in list_photos(config(folder)).photos}) > 1


def test_a_link_that_leads_nowhere_is_named(folder: Path) -> None:
    kind = next(path for path in sorted((folder / "train").iterdir()) if path.is_dir())
    (kind / "gone.png").symlink_to("nowhere.png")
    listed = photos.Photos([photo.path for photo in list_photos(config(folder)).photos], 8, 8)
    with pytest.raises(DataError, match=r"gone\.png cannot be read \(No such file"):
        listed.decode_all("disk", 0)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ([*map(str, range(12))], [*map(str, range(12))]),
        (["10", "-1", "2"], ["-1", "2", "10"]),
        (["10.0", "9.0"], ["9.0", "10.0"]),
        (["10", "9", "cat"], ["10", "9", "cat"]),
    ],
)
def test_class_numbers_of_a_csv_are_numbered_as_numbers(names: list[str], classes: list[str], tmp_path: Path) -> None:
    """As a network trained on them elsewhere knows them. Folders are ordered by text, as torchvision does."""
    make(tmp_path, {"images": len(names)})
    rows = [f"images/{number}.png,{name}" for number, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    listing = list_photos(config(tmp_path, labels="labels.csv"))
    assert list(listing.classes) == classes
    assert [listing.classes[photo.label] for photo in listing.photos] == names
