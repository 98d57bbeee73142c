"""Whole files or none: full disks, places that cannot be written, locks of living processes, clocks that jump."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import rmprune
from rmprune.config import DataConfig, MeasureConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.data.photos import Photos
from rmprune.errors import ArtifactError, ConfigError
from rmprune.pipelines.slim import run_slim
from rmprune.runs.directory import claim, tidy
from rmprune.runs.notes import remembered
from rmprune.runs.records import write_record
from rmprune.runs.writing import append_line, sweep_beside, whole, write_text
from rmprune.training.checkpoint import load_checkpoint, save_checkpoint


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own in memory; skips the test where this process may not mount one."""
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, leave: int = 0) -> None:
    """Use up the disk but for this many bytes."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(2**12)):
            pass
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - leave))


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 2)).eval()


def record(accuracy: float) -> dict:
    latency = {"backend": "eager", "device": "cpu", "threads": 1, "batch_size": 1}
    latency |= dict.fromkeys(("median_ms", "q1_ms", "q3_ms"), 1.0)
    one = {"accuracy": accuracy, "macs": 10, "params": 1, "latency": [latency] * 40}
    about = {"environment": {"versions": {}, "processor": "x", "threads": 1}, "removal": None}
    return {"schema": 1, "command": "x", "config": {}, "seed": 0, "method": "rm", "original": one, "a": one} | about


def save_state(path: Path, size: int) -> None:
    with whole(path) as work:
        save_file({"a": torch.zeros(size)}, work)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "text": lambda path, size: write_text(path, "x" * size * 100),
    "artifact": lambda path, size: rmprune.save(network(1 + size // 10), path, overwrite=True),
    "artifact and onnx": lambda path, size: rmprune.save(
        network(1 + size // 10), path, example_inputs=torch.zeros(1, 1, 8, 8), overwrite=True
    ),
    "onnx": lambda path, size: __import__("rmprune.onnx.export").onnx.export.export_onnx(
        network(1 + size // 10), torch.zeros(1, 1, 8, 8), path
    ),
    "checkpoint": lambda path, size: save_checkpoint(path, {"weights": torch.zeros(100 * size)}),
    "record": lambda path, size: write_record(path, record(0.5) | {"filler": "x" * 100 * size}),
    "notes": lambda path, size: remembered(path, str(size), lambda: "x" * 100 * size),
    "state": lambda path, size: save_state(path, 100 * size),
    "log": lambda path, size: append_line(path, "x" * size * 100),
}


def test_the_disk_has_what_is_written_before_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []

    def note(handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path.resolve())
        flushed.append((place.name, (tmp_path / "net").exists()))

    monkeypatch.setattr(os, "fsync", note)
    with whole(tmp_path / "net") as work:
        work.mkdir()
        (work / "weights").write_bytes(b"1")
    assert flushed == [("weights", False), (work.name, False), ("", True)]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_everything_written_has_the_mode_that_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_state(tmp_path / "state", 1)
        with whole(tmp_path / "run") as work:
            shutil.copytree(tempfile.mkdtemp(dir=tmp_path), work)
            save_file({"a": torch.zeros(1)}, work / "weights")
            (work / "text").write_text("x")
    finally:
        os.umask(before)
    found = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("state", "run", "run/weights", "run/text")}
    assert found == {name: (0o777 if name == "run" else 0o666) & ~umask for name in found}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        WRITERS[kind](disk / "run" / "thing", 1)
        fill(disk, leave=2**13)  # the new one begins and cannot end
        before = contents(disk)
        with pytest.raises(
            ArtifactError, match=r"thing.*: cannot be written \(.*(No space left|only).*free some space"
        ):
            WRITERS[kind](disk / "run" / "thing", 1000)
        assert contents(disk) == before
        (disk / "filler").unlink()
        WRITERS[kind](disk / "run" / "thing", 1000)
        assert [path.name for path in (disk / "run").iterdir()] == ["thing"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_place_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ArtifactError, match=r"cannot be written \(.*file: (File exists|Not a directory)\)"):
        WRITERS[kind](tmp_path / "file" / "thing", 1)
    assert contents(tmp_path) == {"file": b"here"}
    with mounted(tmp_path / "disk", "size=1m,ro") as disk, pytest.raises(ArtifactError, match="Read-only file system"):
        WRITERS[kind](disk / "thing", 1)


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a") as work:
        work.write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match="cannot be written"), whole(tmp_path / "a") as work:
        pass  # nothing was made
    assert contents(tmp_path) == {"a": b"old"}


def test_a_folder_takes_the_place_of_another_and_of_nothing(tmp_path: Path) -> None:
    for names in (("a", "b"), ("c",)):
        with whole(tmp_path / "x" / "folder") as work:
            work.mkdir()
            for name in names:
                (work / name).write_text(name)
    assert contents(tmp_path) == {"x/folder/c": b"c"} and len(list((tmp_path / "x").iterdir())) == 1


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no moment without it; where the file system cannot exchange two folders, the old one steps aside."""
    for name, exchange in (("new", None), ("newer", lambda one, other: False)):
        with whole(tmp_path / "folder") as work:
            work.mkdir()
            (work / name).write_text("")
            if exchange is None:
                (tmp_path / "folder").mkdir()
                (tmp_path / "folder" / "old").write_text("")
                monkeypatch.setattr(Path, "rename", lambda *names: pytest.fail("the old one was moved away"))
            else:
                monkeypatch.undo()
                monkeypatch.setattr("rmprune.runs.writing._exchange", exchange)
        assert contents(tmp_path) == {f"folder/{name}": b""}


def test_what_stepped_aside_comes_back_when_its_writer_was_killed(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / ".b.01234567.old" / "file", "old")
    write_text(tmp_path / "a" / ".b.01234567.tmp" / "file", "half")
    tidy(tmp_path)
    assert contents(tmp_path) == {"a/b/file": b"old", ".lock": b""}
    write_text(tmp_path / "a" / ".b.89abcdef.old" / "file", "older")
    with claim(tmp_path / "run", CONFIG, records=[tmp_path / "none"], networks=(), overwrite=False):
        write_text(tmp_path / "run" / ".c.89abcdef.tmp", "being written")
        tidy(tmp_path / "run")
        tidy(tmp_path)  # a grid, of which this is a cell
        assert (tmp_path / "run" / ".c.89abcdef.tmp").exists()
    assert "a/.b.89abcdef.old/file" not in contents(tmp_path) and (tmp_path / "a" / "b" / "file").read_text() == "old"


def test_what_killed_writers_of_one_file_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.01234567.tmp", ".ab.01234567.tmp", ".a.b.01234567.tmp", "b/.a.01234567.tmp"):
        write_text(tmp_path / name, "half")
    sweep_beside(tmp_path / "a")
    assert contents(tmp_path).keys() == {".ab.01234567.tmp", ".a.b.01234567.tmp", "b/.a.01234567.tmp"}


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_text(tmp_path / "a", "caf\udce9")
    assert not any(tmp_path.iterdir())


def test_a_line_after_one_that_was_cut_short_stands_alone(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.jsonl"
    append_line(log, '{"epoch": 1}')
    log.write_bytes(log.read_bytes() + b'{"epo')
    append_line(log, '{"epoch": 2}')
    assert log.read_text().splitlines() == ['{"epoch": 1}', '{"epo', '{"epoch": 2}']


# ------------------------------------------------------------------------------------------------------- whole runs

CONFIG = SlimConfig(
    model="resnet8",
    width=2,
    data=DataConfig(dataset="digits", train_images=64),
    train=TrainConfig(epochs=1, warmup_epochs=0),
    finetune=TrainConfig(epochs=1, warmup_epochs=0),
    prune=PruneConfig(macs_ratio=(0.7,), round_to=1),
    measure=MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(1,), seconds=0.0, min_rounds=1),
    method=("rm",),
)


@pytest.mark.long
def test_slim_on_a_full_disk_ends_with_one_error_and_goes_on_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmprune.pipelines.slim.check_budgets", lambda *_: None)  # which writes nothing
    with mounted(tmp_path / "disk", "size=4m") as disk:
        config = replace(CONFIG, out=disk / "run")
        for leave in (2**12, 2**15, 2**17):  # at config.toml, at the checkpoint, at an artifact
            fill(disk, leave)
            with pytest.raises(ArtifactError, match="No space left"):
                run_slim(config, command="x")
            assert not [path for path in (disk / "run").rglob("*") if path.name.endswith((".tmp", ".old"))]
            (disk / "filler").unlink()
        (path,) = run_slim(config, command="x")
        assert json.loads(path.read_text())["method"] == "rm"


def test_photos_decoded_onto_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written through a mapping ends the process there (SIGBUS)."""
    paths = [str(tmp_path / f"{grey}.png") for grey in range(9)]
    for grey, path in enumerate(paths):
        Image.new("RGB", (256, 256), (grey,) * 3).save(path)
    with mounted(tmp_path / "disk", "size=2m") as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        fill(disk, leave=2**20)
        with pytest.raises(ArtifactError, match=r"npy: cannot be written \(No space left"):
            Photos(paths, 256, 8).decode_all("disk", 0)
        (disk / "filler").unlink()
        photos = Photos(paths, 256, 8)
        photos.decode_all("disk", 0)
        assert [int(square.max()) for square in photos] == list(range(9))
        assert [path.suffix for path in disk.rglob("*") if path.is_file()] == [".npy"]


def test_a_lock_of_a_living_process_and_one_that_a_dead_process_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run, CONFIG, records=[run / "record.json"], networks=(), overwrite=False):
        pass
    hold = f"import filelock, time; lock = filelock.FileLock({str(run / '.lock')!r}); lock.acquire(); print('held', flush=True)"
    hold += "; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = contents(run)
        try:
            with pytest.raises(
                ConfigError, match=r"run: another process is at this run; wait for it, or choose another"
            ):
                run_slim(replace(CONFIG, out=run), command="x")
        finally:
            other.kill()
        assert contents(run) == before
    with claim(run, CONFIG, records=[run / "record.json"], networks=(), overwrite=False):
        pass  # the lock went with its process


def test_what_a_killed_writer_left_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    def begin() -> None:
        with claim(tmp_path / "run", CONFIG, records=[tmp_path / "none"], networks=(), overwrite=False):
            pass

    write_text(tmp_path / "run" / ".config.toml.01234567.tmp", "half")  # the first file of a run
    begin()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.toml"}
    kill = f"import os, pathlib; from rmprune.runs.writing import whole; work = whole(pathlib.Path({str(tmp_path)!r}) / 'run' / 'a' / 'b')"
    kill += ".__enter__(); work.write_text('half'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", kill]).returncode == -9
    (tmp_path / "run" / ".mine.tmp").write_text("here")
    assert len(list((tmp_path / "run" / "a").iterdir())) == 1
    begin()
    assert not any((tmp_path / "run" / "a").iterdir()) and (tmp_path / "run" / ".mine.tmp").exists()


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from next year, and a clock that runs back from 2040 to 1980: no age or date of a file decides anything."""
    years = iter(range(2040, 1980, -1))
    monkeypatch.setattr(time, "time", lambda: (next(years, 1980) - 1970) * 3.15e7)
    write_record(tmp_path / "record.json", record(0.5))
    save_checkpoint(tmp_path / "c.pt", {"step": 1})
    for path in tmp_path.iterdir():
        os.utime(path, (2.5e9, 2.5e9))
    write_record(tmp_path / "record.json", record(0.75))
    save_checkpoint(tmp_path / "c.pt", {"step": 2})
    config = replace(CONFIG, out=tmp_path / "run")
    with claim(config.directory, config, records=[tmp_path / "none"], networks=(), overwrite=False):
        pass
    for path in config.directory.iterdir():
        os.utime(path, (2.5e9, 2.5e9))
    with claim(config.directory, config, records=[tmp_path / "none"], networks=(), overwrite=False):
        pass
    assert json.loads((tmp_path / "record.json").read_text())["original"]["accuracy"] == 0.75
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 2
