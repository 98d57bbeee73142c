"""deploy/ stands by itself: predict.py gives what PyTorch gives for the run's own images, validation images choose, int8 has to hold."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import few
from PIL import Image
from slim_runs import QUICK

import rmprune
from rmprune.config import DataConfig, DeployConfig, MeasureConfig, TrainConfig, TrainRunConfig
from rmprune.data.folder import FolderSplit
from rmprune.data.load import Dataset, load_dataset
from rmprune.data.splits import TensorSplit
from rmprune.errors import ArtifactError, ConfigError
from rmprune.pipelines import deploy
from rmprune.pipelines.slim import run_slim
from rmprune.pipelines.stages import open_data
from rmprune.pipelines.train import run_train
from rmprune.runs.records import networks, read_record, write_record

UNTRAINED = TrainConfig(epochs=0)
MEASURE = MeasureConfig(("eager",), (1,), (1,), seconds=0.0, min_rounds=3)
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys({hidden}))
sys.argv = {words}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


PYTORCH = ("torch", "torchvision", "rmprune")


def predict(folder: Path, *words: str, hidden: tuple[str, ...] = PYTORCH) -> str:
    """What predict.py prints in a process that has none of the hidden packages."""
    program = ALONE.format(hidden=hidden, words=[str(folder / "predict.py"), *words])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def photos(folder: Path, bits: int) -> DataConfig:
    """24 images of two classes, 26x20: colours, or grey of so many bits in 16."""
    random = np.random.default_rng(0)
    for i in range(24):
        path = folder / ("cracked <b>", "good|one")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if bits == 8:
            pixels = random.integers(0, 256, (20, 26, 3), dtype=np.uint8)
        else:
            pixels = random.integers(0, 2**bits, (20, 26), dtype=np.uint16)
        Image.fromarray(pixels).save(path)
    return DataConfig("imagefolder", folder, image_size=16, validation=0.3, workers=0, cache="none")


@pytest.mark.parametrize("kind", few(["digits", "colours", "12-bit"], "colours"))
def test_predict_gives_what_the_run_s_own_network_gives_for_an_image_file(kind: str, tmp_path: Path) -> None:
    data_config = DataConfig() if kind == "digits" else photos(tmp_path / "photos", 8 if kind == "colours" else 12)
    config = TrainRunConfig(
        "resnet8", width=4, data=data_config, train=UNTRAINED, measure=MEASURE, out=tmp_path / "run"
    )
    run_train(config, command="python -m rmprune train")
    folder = deploy.run_deploy(DeployConfig(tmp_path / "run"))
    data = open_data(config)
    file, arrays = one_test_file(data, tmp_path)
    chosen = json.loads((folder / "ranking.json").read_text())["chosen"]
    with torch.no_grad():
        expected = rmprune.load(tmp_path / "run" / chosen)(data.test.example(1))[0]
    likeliest = deploy.class_names(data)[int(expected.argmax())]
    lines = predict(folder, str(file), "--json").splitlines()
    if arrays:
        lines += predict(folder, *map(str, arrays), "--json", hidden=(*PYTORCH, "PIL")).splitlines()
    for said in map(json.loads, lines):
        assert torch.allclose(torch.tensor(said["outputs"][0]), expected, rtol=1e-4, atol=1e-5)
        assert next(iter(said["classes"])) == likeliest and sum(said["classes"].values()) == pytest.approx(1)
    assert len(lines) == 1 + len(arrays)
    facts = json.loads((folder / "model.json").read_text())
    assert facts["preprocessing"]["depth"] == (12 if kind == "12-bit" else 16)
    card = (folder / "README.md").read_text()
    assert "<b>" not in card and "validation images" in card and "AUC" in card


def test_a_run_on_photos_goes_on_and_is_judged_on_the_same_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = photos(tmp_path / "photos", 8), tmp_path / "run"
    config = TrainRunConfig("resnet8", width=4, data=data, train=UNTRAINED, measure=MEASURE, out=run)
    photo = tmp_path / "photos" / "good|one" / "1.png"
    other = photo.with_name("25.png")
    with monkeypatch.context() as patched:
        patched.setattr("rmprune.pipelines.train.finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_train(config, command="x")
    shutil.copy(photo, other)  # the parts would be drawn anew: what was trained on might be tested on
    with pytest.raises(
        ConfigError, match=r"run on other photos \(in .*photos some have come.* or choose another --out"
    ):
        run_train(config, command="x")
    other.unlink()
    (record,) = run_train(config, command="x")
    assert read_record(record)["photos"] == json.loads((run / "files.json").read_text())["photos"]
    photo.unlink()
    with pytest.raises(ConfigError, match=r"run on other photos .* or train on it as it is now"):
        deploy.run_deploy(DeployConfig(run))


def one_test_file(data: Dataset, folder: Path) -> tuple[Path, list[Path]]:
    """The first test image as a file, and as arrays."""
    if isinstance(data.test, FolderSplit):
        return Path(data.test.photos.paths[int(data.test.indices[0])]), []
    assert isinstance(data.test, TensorSplit)
    pixels = data.test.images[0, 0].numpy()
    Image.fromarray(pixels).save(folder / "digit.png")
    np.save(folder / "digit.npy", pixels)
    np.save(folder / "ready.npy", data.test.example(1)[0].numpy())
    return folder / "digit.png", [folder / "digit.npy", folder / "ready.npy"]


@pytest.fixture(scope="module")
def slimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    methods = replace(QUICK, out=out, measure=MEASURE, train=UNTRAINED, finetune=UNTRAINED, method=("rm", "residual"))
    run_slim(methods, command="x")
    return out


def changed(run: Path, **fields: dict[str, Any]) -> None:
    record = read_record(run)
    for name, values in fields.items():
        record[name] |= values
    write_record(run / "record.json", record)


def test_validation_images_and_the_budget_choose_and_test_images_do_not(slimmed: Path) -> None:
    record = read_record(slimmed)
    whole = record["original"]["macs"]
    changed(
        slimmed,
        pruned={"validation": {"accuracy": 0.8, "loss": 0.5}, "accuracy": 0.9, "macs": whole // 2},
        residual={"validation": {"accuracy": 0.9, "loss": 0.5}, "accuracy": 0.1, "macs": whole // 2},
    )
    first, second, *rest = deploy.ranked(slimmed, None)
    assert (first["path"], second["path"]) == ("residual", "pruned") and first["meets_budget"]
    assert sorted(entry["path"] for entry in rest) == ["dense", "plain"] and not any(e["candidate"] for e in rest)
    changed(slimmed, residual={"macs": whole // 2 + 1})
    assert [entry["path"] for entry in deploy.ranked(slimmed, None)[:2]] == ["pruned", "residual"]
    changed(slimmed, residual={"macs": whole // 2, "validation": {"accuracy": 0.8, "loss": 0.4}})
    assert deploy.ranked(slimmed, None)[0]["path"] == "residual"
    write_record(slimmed / "record.json", record)


def test_int8_that_loses_too_much_is_left_out(slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"onnxruntime": 0.9, "onnxruntime-int8": 0.88}
    monkeypatch.setattr(deploy, "candidate_accuracy", lambda candidate, split, backend: found[backend])
    data = load_dataset(QUICK.data)
    for limit, kept in ((0.019, False), (0.02, True)):
        folder = deploy.deploy(slimmed, data, tmp_path / "out", int8_loss=limit)
        assert (folder / "model-int8.onnx").exists() == kept
        assert ("There is no int8 form: on the 143" in (folder / "README.md").read_text()) != kept
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_predict_names_each_file_that_is_no_image_and_goes_on(
    slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = deploy.deploy(slimmed, load_dataset(QUICK.data), tmp_path / "out", int8_loss=0.0)
    arrays = {
        "ok": np.zeros((8, 8), np.uint8),
        "colour": np.zeros((8, 8, 3), np.uint8),
        "scalar": np.uint8(1),
        "nothing": np.zeros((0, 8, 8), np.uint8),
        "nan": np.full((1, 8, 8), np.nan, np.float32),
    }
    for name, values in arrays.items():
        np.save(tmp_path / name, values)
    np.savez(tmp_path / "two", ok=arrays["ok"])
    (tmp_path / "two.npz").rename(tmp_path / "two.NPY")
    (tmp_path / "photo.png").write_bytes(b"")
    names = ("colour.npy", "scalar.npy", "nothing.npy", "nan.npy", "two.NPY", "none.npy", "out", "photo.png", "ok.npy")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(sys, "argv", ["predict.py", *(str(tmp_path / name) for name in names)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(folder / "predict.py"), run_name="__main__")
    said = capsys.readouterr()
    assert stopped.value.code == 1 and said.out.startswith(f"{tmp_path / 'ok.npy'}: ") and said.out.count("\n") == 1
    lines = dict(zip(names, said.err.splitlines(), strict=False))
    assert all(line.startswith(f"{tmp_path / name}: ") for name, line in lines.items()) and len(lines) == 8
    for name in ("colour.npy", "scalar.npy", "nothing.npy"):
        assert f"uint8 of shape {arrays[name[:-4]].shape}, but the network takes" in lines[name]
    assert (
        "no numbers" in lines["nan.npy"]
        and "one array" in lines["two.NPY"]
        and "pip install pillow" in lines["photo.png"]
    )
    (folder / "model.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"model\.onnx and model\.json: KeyError"):
        runpy.run_path(str(folder / "predict.py"), run_name="__main__")


def test_predict_names_files_and_classes_that_cannot_be_written_in_one_line(slimmed: Path, tmp_path: Path) -> None:
    folder = deploy.deploy(slimmed, load_dataset(QUICK.data), tmp_path / "out", int8_loss=0.0)
    facts = json.loads((folder / "model.json").read_text())
    facts["classes"] = [f"{name} \u00fc" for name in facts["classes"]]
    (folder / "model.json").write_text(json.dumps(facts))
    np.save(tmp_path / "two\nlines.npy", np.zeros((8, 8), np.uint8))
    program = [sys.executable, str(folder / "predict.py"), str(tmp_path / "two\nlines.npy"), "none\n\u00fc.npy"]
    ended = subprocess.run(program, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 1
    assert ended.stdout.count(b"\n") == 1 and b"two?lines.npy: " in ended.stdout and rb" \xfc " in ended.stdout
    assert ended.stderr.count(b"\n") == 1 and ended.stderr.startswith(rb"none?\xfc.npy: ")


def test_measuring_again_renews_the_card_and_the_ranking(slimmed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(slimmed, tmp_path / "run")
    folder = deploy.deploy(run, load_dataset(QUICK.data), int8_loss=0.99)
    before = (folder / "model.json").read_bytes()
    (time,) = read_record(run)["pruned"]["latency"]
    slow = {"latency": [time | {"median_ms": 1234.0}]}
    changed(run, pruned=slow, residual=slow)
    deploy.renew_deployed(run)
    assert "1234 (" in (folder / "README.md").read_text() and (folder / "model.json").read_bytes() == before
    ranking = json.loads((folder / "ranking.json").read_text())["networks"]
    assert [entry["latency"][0]["median_ms"] for entry in ranking[:2]] == [1234] * 2


def test_measuring_again_keeps_what_deploying_found_out(slimmed: Path, tmp_path: Path) -> None:
    """Records of before do not say how networks do on validation images: deploying asks, and measuring does not forget."""
    run = shutil.copytree(slimmed, tmp_path / "run")
    record = read_record(run)
    for entry in networks(record).values():
        entry.pop("validation", None)
    write_record(run / "record.json", record)
    folder = deploy.deploy(run, load_dataset(QUICK.data))
    before = (folder / "ranking.json").read_bytes()
    deploy.renew_deployed(run)
    assert (folder / "ranking.json").read_bytes() == before and b'"validation": {}' not in before
    (folder / "model.json").write_text("{}")
    with pytest.raises(ArtifactError, match="deploy the run again"):
        deploy.renew_deployed(run)


def test_a_part_of_a_run_is_refused_by_name(slimmed: Path, tmp_path: Path) -> None:
    """A cell of a grid has settings and a record, and its dense network lies with the others of its seed."""
    cell = shutil.copytree(slimmed, tmp_path / "seed0" / "rm")
    for name in ("dense", "plain"):
        shutil.move(cell / name, cell.parent / name)
    with pytest.raises(ArtifactError, match=r"rm: is a part of .*seed0, where its original lies; deploy that"):
        deploy.ranked(cell, None)


def test_what_cannot_be_deployed_is_refused(slimmed: Path, tmp_path: Path) -> None:
    data = load_dataset(QUICK.data)
    with pytest.raises(ConfigError, match="no network 'coupled'; there are: "):
        deploy.deploy(slimmed, data, network="coupled")
    (tmp_path / "mine").write_text("")
    with pytest.raises(ArtifactError, match="left alone"):
        deploy.deploy(slimmed, data, tmp_path)
    with pytest.raises(ArtifactError, match=r"not the directory of one run.*; give one of .*run$"):
        deploy.run_deploy(DeployConfig(slimmed.parent))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not (slimmed / "deploy").exists()
