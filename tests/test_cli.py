import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from record_examples import example

from rmprune.cli import COMMANDS, main
from rmprune.config import TrainRunConfig
from rmprune.runs.directory import Finished
from rmprune.runs.records import write_record
from rmprune.runs.writing import write_text
from rmprune.training.interrupt import DeferredInterrupt


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def test_help_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--help") == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert command in overview
        assert status(command, "--help") == 0
        assert "--" in capsys.readouterr().out


SLIM = ("slim", "--ratio", "0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slimm",), "unknown command 'slimm'; did you mean slim?"),
        (("help",), "unknown command 'help'; there are: slim"),
        (("slim",), "there is no budget; give --ratio"),
        (("slim", "--ratio", "1.5"), "ratio is 1.5; it must lie between 0 and 1"),
        (("slim", "--ratio", "0"), "ratio is 0.0; it must lie between 0 and 1"),
        (("slim", "--ratio", "0.5", "--macs-ratio", "0.5"), "give one kind of budget"),
        ((*SLIM, "--model", "resnet21"), "resnet2"),
        ((*SLIM, "--dataset", "digit"), "there is no data set 'digit'; there are: digits, fashion-mnist"),
        ((*SLIM, "--dataset", "fashion-mnist", "--data-dir", "nowhere"), "the data folder nowhere does not exist"),
        ((*SLIM, "--method", "free"), "unknown method 'free'; there are: rm, "),
        ((*SLIM, "--checkpoint", "none.pt"), "there is no such checkpoint"),
        ((*SLIM, "--device", "tpu"), "'tpu'"),
        (
            (
                "slim",
                "--macs-ratio",
                "0.5",
                "--round-to",
                "1",
                "--min-fraction",
                "0.9",
                "--width",
                "4",
                "--method",
                "rm",
            ),
            "min_fraction=0.9 forbids it",
        ),
        (("slim", "--config", "none.toml"), "there is no such config file"),
        (("slim", "--config=none.toml"), "there is no such config file"),
        (("slim", "--config", "."), "cannot be read as TOML"),
        (("slim", "--ratio", "nan"), "ratio is nan; it must lie between 0 and 1"),
        (("slim", "--ratio", "0.5,0.50"), "give every value once"),
        ((*SLIM, "--seed", "-1"), "seed is -1; it must lie between 0 and"),
        ((*SLIM, "--split-seed", str(10**30)), "it must lie between 0 and"),
        ((*SLIM, "--checkpoint-seconds", "inf"), "checkpoint_seconds is inf; give a finite number"),
        ((*SLIM, "--distillation", "0.5"), "set --finetune.distillation"),
        ((*SLIM, "--measure.backend", "eager,tpu"), "backend 'tpu' is unknown"),
        ((*SLIM, "--measure.device", "cuda:99"), "cuda:99"),
        ((*SLIM, "--width", "1000000"), "out of memory"),
        (("train", "--distillation", "0.5"), "there is no teacher here"),
        (("train", "--model", "preact_resnet18", "--width", "-4"), "width is -4; it must be at least 1"),
        (("train", "--seed", "-1"), "seed is -1; it must lie between 0 and"),
        (("amc", "--episodes", "25"), "all 25 episodes are random"),
        (("report",), "there is nothing to report"),
        (("measure",), "there is nothing to measure"),
        (("inspect", "resnet5o"), "resnet50"),
        (("report", "nowhere"), "nowhere"),
        (("measure", "nowhere"), "nowhere"),
        (("measure", "nowhere", "--image-size", "64"), "image_size is for ONNX files"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_damaged_data_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "data" / f"{part}-ubyte.gz").write_bytes(b"\x1f\x8b damaged")
    assert status(*SLIM, "--dataset", "fashion-mnist", "--data-dir", "data") == 2
    error = capsys.readouterr().err
    assert "ubyte.gz" in error and "dataset-fashion-mnist" in error


def test_convert_and_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plain"
    main(("convert", "resnet20", "--width", "4", "--image-size", "16", "--out", str(out), "--check"))
    assert {file.name for file in out.iterdir()} == {"architecture.json", "model.safetensors", "model.onnx"}
    printed = capsys.readouterr().out
    assert "9 residuals removed, 0 kept" in printed and "ONNX Runtime differs" in printed
    assert status("convert", "resnet20", "--out", str(out)) == 2  # nothing is overwritten unasked
    before = (out / "model.safetensors").read_bytes()
    assert status("convert", str(out), "--out", f"{out}/../plain", "--overwrite") == 2  # nor the network itself
    assert (out / "model.safetensors").read_bytes() == before and "would be lost" in capsys.readouterr().err


@pytest.mark.long
def test_an_artifact_takes_no_settings_of_named_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plain"
    flags = ("--width", "4", "--in-channels", "1", "--num-classes", "10")
    main(("convert", "resnet20", *flags, "--image-size", "16", "--out", str(out)))
    for flag, value in (("--width", "8"), ("--num-classes", "5"), ("--checkpoint", "w.pt"), ("--in-channels", "2")):
        assert status("inspect", str(out), flag, value) == 2
        assert f"{flag} cannot change" in capsys.readouterr().err
    main(("inspect", str(out), "--image-size", "32"))  # with the artifact's one channel


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("command", "said"), [("slim", "is saved"), ("measure", "nothing was changed")])
def test_an_interruption_says_what_is_left(
    command: str,
    said: str,
    number: signal.Signals,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(arguments: list[str]) -> None:
        if command == "slim":
            with DeferredInterrupt() as between:  # SIGTERM waits for the end of a step, too
                signal.raise_signal(number)
                assert between.requested
            raise KeyboardInterrupt
        signal.raise_signal(number)

    monkeypatch.setitem(COMMANDS, command, interrupted)
    assert status(command, "runs/a", "--overwrite") == expected
    error = capsys.readouterr().err
    assert said in error and f"python -m rmprune {command} runs/a" in error
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.long
def test_inspect_shows_what_a_bottleneck_costs(capsys: pytest.CaptureFixture[str]) -> None:
    main(("inspect", "resnet50", "--width", "8", "--image-size", "32"))
    printed = capsys.readouterr().out
    assert "layer1.0" in printed and "removable" in printed and "convert resnet50" in printed


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "rmprune", "nothing"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "unknown command" in done.stderr


@pytest.mark.parametrize("words", [("--help",), ("slim", "--help")])
def test_a_reader_who_has_gone_is_no_error(words: tuple[str, ...]) -> None:
    gone, out = os.pipe()
    os.close(gone)
    done = subprocess.run([sys.executable, "-m", "rmprune", *words], stdout=out, stderr=subprocess.PIPE, timeout=120)
    os.close(out)
    assert done.returncode == 141 and not done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/data"), "Permission denied: '/data'"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "take a smaller width, batch size"),
        (MemoryError(), "take a smaller width, batch size"),
    ],
)
def test_what_the_machine_lacks_is_one_clear_error(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "train", fails)
    assert status("train") == 2
    assert words in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: list[str]) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(COMMANDS, "train", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(("train",))


def test_inspect_says_what_stays_and_why_and_convert_what_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(("inspect", "resnet8", "--width", "4", "--keep", "layer1.0"))
    printed = capsys.readouterr().out
    assert "stays (" in printed and "stays" in printed.split("next: ")[0]
    main(("convert", "resnet8", "--width", "4", "--keep", "layer1.0", "--out", str(tmp_path / "plain")))
    printed = capsys.readouterr().out
    assert "2 residuals removed, 1 kept" in printed and "kept layer1.0: " in printed
    assert (
        status("inspect", str(tmp_path)) == 2
        and "no artifact itself; give one of those in it" in capsys.readouterr().err
    )
    assert status("inspect", "resnet8", "--image-size", "0") == 2 and "at least 1" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_report_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(config: TrainRunConfig, **settings: Any) -> list[Path]:
        raise Finished("this run is finished")

    made: list[Path] = []
    monkeypatch.setattr("rmprune.pipelines.train.run_train", finished)
    monkeypatch.setattr("rmprune.report.build.build_report", lambda paths, out, command: made.extend(paths) or [])
    record = write_record(tmp_path / "record.json", example())
    main(["train", "--out", str(tmp_path)])
    assert made == [record]
    write_text(tmp_path / "report" / "command.txt", "")
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path)])


@pytest.mark.parametrize("world", ["2", "x"])
def test_what_torchrun_sets_and_torchrun_did_not(
    world: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert status("--version") == 2
    error = capsys.readouterr().err
    assert "without what torchrun sets beside it" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["slim", "--help"], ["report", "nowhere"]])
def test_what_needs_no_torch_does_not_import_it(words: list[str]) -> None:
    code = f"""import sys
from rmprune import cli
try:
    cli.main({words!r})
except SystemExit:
    print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_asking_the_package_for_what_it_lacks_runs_no_command() -> None:
    import rmprune

    assert not hasattr(rmprune, "__main__") and not hasattr(rmprune, "nothing")
    assert rmprune.pruning.prune is rmprune.prune
