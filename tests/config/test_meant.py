"""What is offered for a flag or a key that is none, and that every offer is one."""

from pathlib import Path

import pytest

from rmprune.config import (
    AmcConfig,
    ConvertConfig,
    DeployConfig,
    GridConfig,
    InspectConfig,
    RemeasureConfig,
    SlimConfig,
    TrainRunConfig,
)
from rmprune.config.flags import parse
from rmprune.config.meant import meant, settings
from rmprune.config.toml import from_toml
from rmprune.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "word", "flag"),
    [
        (SlimConfig, "--measure.backends", "--measure.backend"),
        (SlimConfig, "--batch-sizes", "--measure.batch-size"),
        (SlimConfig, "--train.epochs", "--epochs"),
        (SlimConfig, "--prune.round-to", "--round-to"),
        (SlimConfig, "--lr", "--learning-rate"),
        (SlimConfig, "--finetune.lr", "--finetune.learning-rate"),
        (SlimConfig, "--finetune-epochs", "--finetune.epochs"),
        (SlimConfig, "--threads", "--measure.threads"),
        (SlimConfig, "--gpu", "--device"),
        (SlimConfig, "--batch", "--batch-size"),
        (SlimConfig, "--pretrained", "--weights"),
        (AmcConfig, "--macs-ratio", "--budget"),
        (InspectConfig, "--input-size", "--image-size"),
        (ConvertConfig, "-o", "--out"),
        (InspectConfig, "--model", None),
    ],
)
def test_the_flag_that_was_meant(kind: type, word: str, flag: str | None) -> None:
    found = meant(word, kind)
    assert found is not None and found.flag == flag


@pytest.mark.parametrize("word", ["--nope", "--x", "-h2", "--q.y"])
def test_nothing_is_offered_for_what_is_like_nothing(word: str) -> None:
    assert meant(word, SlimConfig) is None


@pytest.mark.parametrize(
    "kind",
    [SlimConfig, GridConfig, AmcConfig, TrainRunConfig, InspectConfig, ConvertConfig, RemeasureConfig, DeployConfig],
)
def test_every_flag_that_could_be_offered_is_one(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], "rmprune", "")
    shown = capsys.readouterr().out
    for each in settings(kind):
        assert each.flag is None or each.flag in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs = 3", "unknown setting 'epochs'; did you mean 'train.epochs'?"),
        ("macs_ratio = [0.5]", "unknown setting 'macs_ratio'; did you mean 'prune.macs_ratio'?"),
        ("[train]\nbatch_size = 3", "unknown setting 'train.batch_size'; did you mean 'data.batch_size'?"),
        ("[finetune]\nlr = 3", "unknown setting 'finetune.lr'; did you mean 'finetune.learning_rate'?"),
        ("[measure]\nbackend = 'eager'", "unknown setting 'measure.backend'; did you mean 'measure.backends'?"),
        ("[removal.form]\nx = 3", "form"),
        ("command = 'slim'", "unknown setting 'command'"),
    ],
)
def test_a_key_in_another_table(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "it.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_toml(SlimConfig, tmp_path / "it.toml")
    assert said in str(caught.value) and "\n" not in str(caught.value)
