import re
from pathlib import Path

import pytest

from rmprune import cli
from rmprune.config import (
    AmcConfig,
    ConvertConfig,
    DataConfig,
    NetworkConfig,
    PruneConfig,
    SlimConfig,
    TrainConfig,
    TrainRunConfig,
)
from rmprune.config.toml import differences, from_toml, to_toml
from rmprune.errors import ConfigError
from rmprune.pruning.plan import SlimPlan

KINDS = {"slim": SlimConfig, "amc": AmcConfig, "train": TrainRunConfig}


def config(**settings) -> SlimConfig:
    return SlimConfig(prune=PruneConfig(macs_ratio=(0.5, 0.25)), **settings)


def test_toml_there_and_back(tmp_path: Path) -> None:
    first = config(
        width=32,
        method=("rm", "coupled"),
        data=DataConfig(dataset="fashion-mnist", data_dir=Path("x/y")),
        skip_infeasible=True,
    )
    (tmp_path / "config.toml").write_text(to_toml(first))
    assert from_toml(SlimConfig, tmp_path / "config.toml") == first


def test_where_to_run_is_no_setting() -> None:
    assert "out" not in to_toml(config(out=Path("elsewhere"), overwrite=True))
    assert differences(config(), config(out=Path("elsewhere"))) == []
    assert differences(config(), config(skip_infeasible=True)) == []  # an interrupted run may go on with it
    assert differences(config(search_minutes=1.0), config()) == []  # the default when runs of before began
    assert differences(config(), config(data=DataConfig(batch_size=32))) == ["data.batch_size: 64 -> 32"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht = 32\n[prune]\nratio = [0.5]", "unknown setting 'widht'; did you mean 'width'"),
        ("[data]\ndatset = 'digits'", "unknown setting 'data.datset'; did you mean 'data.dataset'"),
        ("width = 'wide'\n[prune]\nratio = [0.5]", "width"),
        ("width = ", "cannot be read as TOML"),
        ("[prune]\nratio = [1.5]", "ratio is 1.5; it must lie between 0 and 1"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_toml(SlimConfig, file)


def test_one_value_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('method = "rm"\n[prune]\nratio = 0.5\n')
    read = from_toml(SlimConfig, tmp_path / "c.toml")
    assert read.method == ("rm",) and read.prune.ratio == (0.5,)


def test_a_setting_switched_off_stays_off(tmp_path: Path) -> None:
    first = config(finetune=TrainConfig(clip_norm=None))
    (tmp_path / "config.toml").write_text(to_toml(first))
    assert from_toml(SlimConfig, tmp_path / "config.toml") == first


def test_a_mark_of_byte_order_before_a_text_is_none_of_it(tmp_path: Path) -> None:
    """As editors of Windows write it."""
    (tmp_path / "c.toml").write_text('\ufeffmodel = "resnet8"\n[prune]\nratio = 0.5\n', encoding="utf-8")
    assert from_toml(SlimConfig, tmp_path / "c.toml").model == "resnet8"
    (tmp_path / "plan.json").write_text('\ufeff{"schema": 1, "widths": {"conv1": 8}}', encoding="utf-8")
    assert SlimPlan.read(tmp_path / "plan.json").widths == {"conv1": 8}


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        from_toml(SlimConfig, Path("nowhere.toml"))


def test_whole_numbers_are_fine_for_fractions(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[prune]\nratio = [0.5]\ncut_fraction = 1\n")
    assert from_toml(SlimConfig, tmp_path / "c.toml").prune.cut_fraction == 1.0


def test_a_stage_in_part_keeps_the_run_s_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[prune]\nratio = [0.5]\n[finetune]\nepochs = 3\n")
    read, default = from_toml(SlimConfig, tmp_path / "c.toml"), config()
    assert read.finetune.epochs == 3 != default.finetune.epochs
    assert read.finetune.distillation == default.finetune.distillation == 0.5 != TrainConfig().distillation
    assert read.finetune.learning_rate == default.finetune.learning_rate


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "experiments").rglob("*.toml")), ids=lambda f: f.stem
)
def test_every_published_experiment_can_be_read(file: Path) -> None:
    kind = next(kind for command, kind in KINDS.items() if f"rmprune {command} --config" in file.read_text())
    assert from_toml(kind, file).data.dataset


@pytest.mark.parametrize("weights", ["flag", "file"])
def test_a_start_from_weights_has_gentle_defaults_that_everything_set_comes_before(
    tmp_path: Path, weights: str
) -> None:
    settings = "macs_ratio = 0.5\n[finetune]\nlearning_rate = 0.5\n"
    (tmp_path / "a.toml").write_text(
        ('weights = "imagenet"\n' if weights == "file" else "") + settings.replace("macs", "[prune]\nmacs")
    )
    arguments = ["--config", str(tmp_path / "a.toml"), "--epochs", "3"]
    config = cli._parse(SlimConfig, arguments + ["--weights", "imagenet"] * (weights == "flag"), "slim")
    assert (config.train.epochs, config.train.learning_rate, config.train.head_rate) == (3, 0.01, 5.0)
    assert (config.finetune.epochs, config.finetune.learning_rate, config.finetune.distillation) == (15, 0.5, 0.5)
    bare = cli._parse(SlimConfig, ["--weights", "imagenet", "--epochs", "3", "--ratio", "0.5"], "slim")
    assert (bare.train, bare.sparsity) == (config.train, config.sparsity) and bare.sparsity.strength == 0.2
    assert cli._parse(SlimConfig, ["--ratio", "0.5"], "slim") == SlimConfig(prune=PruneConfig(ratio=(0.5,)))


@pytest.mark.parametrize("word", ["None", "none", "NONE"])
def test_weights_switched_off_by_a_flag_leave_no_trace(tmp_path: Path, word: str) -> None:
    file, plain = tmp_path / "w.toml", config()
    for weights, words in (("imagenet", ["--weights", word]), ("imagenet", [f"--weights={word}"]), (word, [])):
        file.write_text(f'weights = "{weights}"\n[prune]\nmacs_ratio = [0.5, 0.25]\n')
        for more in ([], ["--weights", "own.pt"] * bool(words)):
            assert cli._parse(SlimConfig, ["--config", str(file), *more, *words], "slim") == plain
    assert cli._parse(SlimConfig, ["--weights", word, "--macs-ratio", "0.5,0.25"], "slim") == plain


def test_none_is_none_for_every_flag_that_may_be_unset_and_a_choice_where_that_is_listed(tmp_path: Path) -> None:
    words = "--clip-norm none --finetune.clip_norm=None --width NONE --data-dir none --augment none --cache none"
    found = cli._parse(SlimConfig, ["--ratio", "0.5", *words.split()], "slim")
    assert (found.train.clip_norm, found.finetune.clip_norm, found.width, found.data.data_dir) == (None,) * 4
    assert (found.data.augment, found.data.cache) == ("none", "none")
    (tmp_path / "c.toml").write_text('width = "None"\n[data]\naugment = "none"\n[prune]\nratio = 0.5\n')
    read = from_toml(SlimConfig, tmp_path / "c.toml")
    assert (read.width, read.data.augment) == (None, "none")


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_takes_several_values_away(tmp_path: Path, word: str) -> None:
    (tmp_path / "c.toml").write_text(to_toml(config(choices=("keep", "drop"), method=("auto",))))
    arguments = ["--config", str(tmp_path / "c.toml"), "--ratio", "0.5"]
    with pytest.raises(ConfigError, match=r"give one kind of budget.*\(--ratio none or --macs-ratio none takes"):
        cli._parse(SlimConfig, arguments, "slim")
    found = cli._parse(SlimConfig, [*arguments, "--macs-ratio", word, "--method", word, f"--choices={word}"], "slim")
    assert found == SlimConfig(prune=PruneConfig(ratio=(0.5,)))
    (tmp_path / "c.toml").write_text(f'method = "{word}"\n[prune]\nmacs_ratio = "{word}"\nratio = 0.5\n')
    assert from_toml(SlimConfig, tmp_path / "c.toml") == found
    with pytest.raises(ConfigError, match="budget is empty"):
        cli._parse(AmcConfig, ["--budget", word], "amc")


def test_augment_took_no_value(tmp_path: Path) -> None:
    given = [
        ["--augment"],
        ["--no-augment"],
        ["--augment", "--epochs", "3"],
        ["--augment", "light"],
        ["--augment=none"],
        [],
    ]
    found = [cli._parse(TrainRunConfig, words, "train").data.augment for words in given]
    assert found == [True, False, True, "light", "none", True]
    (tmp_path / "a.toml").write_text("[data]\naugment = false\n")
    assert from_toml(TrainRunConfig, tmp_path / "a.toml").data.augmentation == "none"


def test_flags_give_what_the_file_lacks(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = "resnet8"\n')
    expected = SlimConfig(model="resnet8", prune=PruneConfig(latency_ratio=(0.3,)))
    assert cli._parse(SlimConfig, ["--config", str(file), "--latency-ratio", "0.3"], "slim") == expected
    with pytest.raises(ConfigError, match=r"c\.toml: there is no budget"):
        cli._parse(SlimConfig, ["--config", str(file)], "slim")
    with pytest.raises(ConfigError, match=r"c\.toml and the flags: seeds is 0"):
        cli._parse(SlimConfig, ["--config", str(file), "--ratio", "0.5", "--seeds", "0"], "slim")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[network]\nmodel = "resnet8"\n', ["--out", "x"]),
        ("[network]\nimage_size = 32\n", ["resnet8", "--out", "x"]),
        ('out = "x"\n', ["resnet8"]),
    ],
)
def test_what_is_required_may_come_from_a_flag(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    found = cli._parse(ConvertConfig, ["--config", str(file), *words], "convert")
    assert (type(found.network), found.network.model, found.out) == (NetworkConfig, "resnet8", Path("x"))
    with pytest.raises(ConfigError, match="Missing from"):
        cli._parse(ConvertConfig, ["--config", str(file)], "convert")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[train]\nschedule = "cosinus"\n', "train.schedule is 'cosinus'; use 'cosine' or 'constant'"),
        ('[prune]\nratio = 0.5\ncost = "watts"\n', "prune.cost is 'watts'; use 'macs' or 'time'"),
        ("[removal]\nranges = 3\n", "removal.ranges is 3; use 'provable' or 'calibrated'"),
        ('[train]\nepochs = "many"\n', 'wrong value type for field "train.epochs" - should be "int"'),
    ],
)
def test_a_wrong_choice_is_said_with_those_there_are(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=f"c.toml: {re.escape(said)}"):
        from_toml(SlimConfig, tmp_path / "c.toml")


@pytest.mark.parametrize(
    "flags, method",
    [
        ("--macs-ratio 0.5", "auto"),
        ("--latency-ratio 0.5 --memory-ratio 0.7", "auto"),
        ("--macs-ratio 0.5 --gradual", "rm"),
        ("--latency-ratio 0.5 --no-reconstruct", "rm"),
        ("--memory-ratio 0.5", "rm"),
        ("--ratio 0.5", "rm"),
        ("--macs-ratio 0.5 --method inner", "inner"),
    ],
)
def test_the_method_where_none_is_named_goes_by_the_budget(flags: str, method: str) -> None:
    assert cli._parse(SlimConfig, flags.split(), "slim").method == (method,)


def test_auto_does_not_cut_while_training() -> None:
    with pytest.raises(ConfigError, match="leave out --gradual, or take another --method"):
        cli._parse(SlimConfig, ["--macs-ratio", "0.5", "--gradual", "--method", "rm,auto"], "slim")
