"""What the command line refuses in one line, before it trains (cases 16, 17 and 21)."""

from pathlib import Path

import pytest
import torch
from marks import few

from rmprune.cli import main
from rmprune.models.families import create_network


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on the error stream by a command that exits with status 2."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_images_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--model", "squeezenet1_1", "--method", "residual", "--ratio", "0.5", "--out", str(tmp_path / "run")]
    said = refused(["slim", *network], capsys)
    assert "error: the images are too small for the network: layer features" in said and said.count("\n") == 1


def test_train_refuses_a_network_without_residuals_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["train", "--model", "shufflenet_v2_x0_5", "--epochs", "2", "--out", str(tmp_path / "run")], capsys)
    assert (
        "there is no residual to remove" in said and "epoch" not in said and not (tmp_path / "run" / "dense").exists()
    )


def test_slim_by_rm_names_the_method_that_needs_no_residuals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["slim", "--model", "shufflenet_v2_x0_5", "--ratio", "0.3", "--out", str(tmp_path / "run")], capsys)
    assert "--method residual prunes the network as it is" in said and "epoch" not in said


@pytest.mark.long
def test_inspect_sends_nobody_to_convert_what_has_no_residuals(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "shufflenet_v2_x0_5", "--image-size", "32"])
    said = " ".join(capsys.readouterr().out.split())
    assert "next:" not in said and "--method residual prunes" in said


CONVERT = ["convert", "resnet18", "--width", "4", "--num-classes", "10", "--no-onnx"]


@pytest.mark.parametrize("kind", few(["compiled", "parallel", "old"], "compiled"))
def test_checkpoints_of_the_network_under_other_names(kind: str, tmp_path: Path) -> None:
    state = create_network("resnet18", num_classes=10, input_shape=(3, 80, 80), width=4).state_dict()
    prefix = {"compiled": "_orig_mod.", "parallel": "module.", "old": ""}[kind]
    kept = {prefix + k: v for k, v in state.items() if kind != "old" or "num_batches" not in k}
    torch.save(kept, tmp_path / "state.pth")
    main(
        [*CONVERT, "--image-size", "80", "--checkpoint", str(tmp_path / "state.pth"), "--out", str(tmp_path / "plain")]
    )
    assert (tmp_path / "plain").is_dir()


def test_a_checkpoint_of_other_sizes_is_told_by_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(
        create_network("resnet18", num_classes=10, input_shape=(3, 80, 80), width=4).state_dict(),
        tmp_path / "state.pth",
    )
    arguments = ["--image-size", "32", "--checkpoint", str(tmp_path / "state.pth"), "--out", str(tmp_path / "plain")]
    assert "conv1.weight (4x3x7x7 there, 4x3x3x3 here)" in refused([*CONVERT, *arguments], capsys)


@pytest.mark.parametrize("command", ["slim", "amc", "train"])
def test_a_directory_of_another_run_is_refused_before_the_data_are_looked_at(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budgets in time took minutes to check, only to end in this line."""
    (tmp_path / "notes.txt").write_text("mine")
    data = ["--dataset", "imagefolder", "--data-dir", str(tmp_path / "missing")] if command != "slim" else []
    said = refused([command, "--out", str(tmp_path), *data, *(["--ratio", "0.5"] if command == "slim" else [])], capsys)
    assert "not empty, and not a run of rmprune" in said and "can rm meet" not in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
