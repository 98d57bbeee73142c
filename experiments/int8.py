"""What int8 does to a network, to its forms without residuals, and to pruned ones: accuracy, and time, in each number format.

    python experiments/int8.py --models resnet20 resnet18:16 mobilenet_v2_small:0.5 --dataset fashion-mnist --train-images 12000
    python experiments/int8.py --probe experiments/int8-efficientnet-lite0.toml --macs-ratio 0.7 --calibration 128
    python experiments/int8.py --runs runs/solar-cells/lite0-0/seed0/latency_ratio-0.5
    python experiments/int8.py --times

NAME:WIDTH is trained here, once; --probe takes the pretrained weights of a config of slim and fits a new head to their features, no more;
a run's cell brings its trained network and its pruned ones. `plain-FORM` is the exact removal with copies
passed in that form (shift, pair, slice: with ranges of their own, so int8 may tell them apart; fused: neighbouring linear convolutions made
one), `pruned` the plain network cut to --macs-ratio of the trained one's MACs and trained on, `pruned-residual` the same with all residuals
kept. Accuracy is of the first --test-images test images, as the backend computes it.

Networks are kept under --keep, and what is there is not made again. --times measures these, and trains nothing: do it on an idle machine.
Writes accuracy.csv or times.csv (after each network), table.md and commands.txt under --out.
"""

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from torch import nn

import rmprune
from rmprune import artifact
from rmprune.config import DataConfig, RunConfig, SlimConfig, TrainConfig
from rmprune.config.toml import from_toml
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import RmpruneError
from rmprune.measure import accuracies, calibration_images, measure_latencies
from rmprune.measure.machine import environment
from rmprune.pipelines.measure import network_directory
from rmprune.pipelines.stages import make_dense, open_data
from rmprune.runs.directory import CONFIG_FILE
from rmprune.training import evaluate, fit

FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "shift": {"form": "shift"},
    "pair": {"form": "pair"},
    "slice": {"form": "slice"},
    "fused": {"fuse": "always"},
}


@dataclass(frozen=True)
class Settings:
    models: tuple[str, ...] = ()
    """NAME or NAME:WIDTH."""
    probe: Path | None = None
    """A config of slim, with weights."""
    runs: tuple[Path, ...] = ()
    """Cells of runs of slim, whose networks are taken as they are."""
    dataset: str = "digits"
    data_dir: Path | None = None
    train_images: int | None = None
    test_images: int = 5000
    calibration: int = 256
    """Training images that ranges are chosen by."""
    epochs: int = 8
    finetune_epochs: int = 4
    macs_ratio: float = 0.5
    seed: int = 0
    pruned: bool = True
    """Cut networks as well."""
    forms: tuple[str, ...] = tuple(FORMS)
    backends: tuple[str, ...] = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8")
    times: bool = False
    """Measure the time of the networks kept, all of one origin in turns."""
    threads: int = 1
    seconds: float = 0.7
    keep: Path = Path("runs/int8")
    out: Path = Path("reports/int8")


def kept(path: Path, make: Callable[[], nn.Module], x: torch.Tensor) -> nn.Module:
    """The network of this folder, made now where it is not there; with it the size of its images."""
    if not path.exists():
        artifact.save(make(), path, extra={"input_shape": list(x.shape[1:])})
    return artifact.load(path)


def trained(name: str, data: Dataset, settings: Settings) -> nn.Module:
    family, _, width = name.partition(":")
    torch.manual_seed(settings.seed)
    sized = {"width": float(width) if "." in width else int(width)} if width else {}
    net = rmprune.models.create(family, num_classes=data.num_classes, in_channels=data.input_shape[0], **sized)
    return tuned(net, data, TrainConfig(epochs=settings.epochs), settings)


def tuned(net: nn.Module, data: Dataset, train: TrainConfig, settings: Settings) -> nn.Module:
    return fit(net, data, train, seed=settings.seed, device=torch.device("cpu"), progress=False).eval()


def finetuned(net: nn.Module, data: Dataset, settings: Settings) -> nn.Module:
    tuning = TrainConfig(epochs=settings.finetune_epochs, learning_rate=0.02, warmup_epochs=0.0)
    return tuned(net, data, tuning, settings)


@torch.no_grad()
def headed(net: nn.Module, data: Dataset, settings: Settings) -> nn.Module:
    """The network with its last layer fitted to the features before it, by logistic regression on the training images."""
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    found: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].clone()))
    labels = [net(x) is None or y for x, y in data.train.batches(64)]
    hook.remove()
    x, y = torch.cat(found).double(), torch.cat(labels)
    fitted = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())  # features as they are: even weights suit int8
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(weight) == 1:  # of two classes the second's
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return net


Finish = Callable[[nn.Module, Dataset, Settings], nn.Module]


def pruned(net: nn.Module, whole: nn.Module, data: Dataset, settings: Settings, finish: Finish) -> nn.Module:
    """Cut once to the budget, counted against the `whole` network, its layers fitted anew, and finished."""
    x, batches = data.train.example(2), list(data.train.batches(128, limit=1024))
    budget = rmprune.Budget(macs_ratio=settings.macs_ratio, reference_macs=rmprune.count_macs(whole, x[:1]))
    return finish(
        rmprune.prune(net, x, importance="taylor", budget=budget, data=batches, reconstruct=True), data, settings
    )


def plain_forms(net: nn.Module, x: torch.Tensor, folder: Path, settings: Settings) -> dict[str, nn.Module]:
    """The network without residuals in each form; one that it does not take, or that is an earlier one, is left out, and said."""
    found: dict[str, nn.Module] = {}
    for form in settings.forms:
        name = f"plain-{form}"
        try:
            made = rmprune.remove_residuals(net, x, **FORMS[form]).model
        except RmpruneError as reason:
            print(f"{folder.name}, {form}: {str(reason)[:200]}")
            continue
        like = next((other for other, one in found.items() if str(one) == str(made)), None)
        if like is None:
            found[name] = kept(folder / name, lambda made=made: made, x)
        else:
            print(f"{folder.name}, {name}: the same layers as {like}")
    return found


def of_model(
    name: str, data: Dataset, settings: Settings, make: Callable[[], nn.Module], finish: Finish
) -> dict[str, nn.Module]:
    """A network and what is made of it."""
    folder, x = settings.keep / name.replace("/", "-").replace(":", "-"), data.train.example(16)
    net = kept(folder / "residual", make, x)
    normed = lambda: rmprune.remove_residuals(net, x, batch_norm=True).model  # noqa: E731
    found = {"residual": net, **plain_forms(net, x, folder, settings)}
    return (
        found
        if not settings.pruned
        else found
        | {
            "pruned-residual": kept(folder / "pruned-residual", lambda: pruned(net, net, data, settings, finish), x),
            "pruned": kept(folder / "pruned", lambda: pruned(normed(), net, data, settings, finish), x),
        }
    )


def of_run(cell: Path, name: str, data: Dataset, settings: Settings) -> dict[str, nn.Module]:
    """The networks of a cell, and its trained one without residuals in each form."""
    folder, x = settings.keep / name, data.train.example(16)

    def copied(source: str, target: str) -> dict[str, nn.Module]:
        try:
            directory = network_directory(cell, source)
        except RmpruneError:
            return {}
        return {target: kept(folder / target, lambda: artifact.load(directory), x)}

    (net,) = (found := copied("original", "residual")).values()
    found |= plain_forms(net, x, folder, settings)
    return found | copied("residual", "pruned-residual") | copied("pruned", "pruned")


def accuracy_rows(name: str, found: dict[str, nn.Module], data: Dataset, settings: Settings) -> list[dict[str, Any]]:
    limit = min(settings.test_images, len(data.test))
    measured = accuracies(
        found,
        data.test,
        list(settings.backends),
        calibration=calibration_images(data.train, settings.calibration),
        threads=settings.threads,
        limit=limit,
    )
    x = data.test.example(1)
    return [
        {
            "model": name,
            "dataset": data.name,
            "network": key,
            "backend": backend,
            "macs": rmprune.count_macs(found[key], x),
            "test_images": limit,
            "torch_accuracy": exact,
            "accuracy": accuracy,
            "lost": exact - accuracy,
        }
        for key, backends in measured.items()
        for exact in [evaluate(found[key], data.test, limit=limit).accuracy]
        for backend, accuracy in backends.items()
    ]


def time_rows(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    """Times of the networks kept in a folder, batch 1, in turns. Ranges are chosen by noise: their time is the same."""
    places = [folder / "residual", *sorted(p for p in folder.iterdir() if p.name != "residual")]
    found = {place.name: artifact.load(place) for place in places}
    shape = artifact.read_extra(places[0], "input_shape")["input_shape"]
    x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))
    times = measure_latencies(
        found,
        x[:1],
        backends=settings.backends,
        threads=[settings.threads],
        batch_sizes=[1],
        seconds=settings.seconds,
        reference="residual",
        calibration=x,
    )
    return [{"model": folder.name, "network": key, **one.to_dict()} for key, all_ in times.items() for one in all_]


def table(folder: Path) -> str:
    """Accuracy by network and backend in per cent, and where times were measured the time relative to the residual network in float32."""
    found = pd.read_csv(folder / "accuracy.csv")
    found["accuracy"] = (100 * found["accuracy"]).map("{:.2f}".format)
    backends = list(dict.fromkeys(found["backend"]))
    shown = found.pivot(index=["model", "dataset", "network"], columns="backend", values="accuracy")[backends]
    order = pd.MultiIndex.from_frame(found[["model", "dataset", "network"]].drop_duplicates())
    shown = shown.loc[order].reset_index()
    if (folder / "times.csv").is_file():
        times = pd.read_csv(folder / "times.csv")
        whole = times[(times["network"] == "residual")].set_index(["model", "backend"])["median_ms"]
        base = [
            whole.get((m, b.removesuffix("-int8")), math.nan)
            for m, b in zip(times["model"], times["backend"], strict=True)
        ]
        times["relative"] = (times["median_ms"] / base).map("{:.2f}".format)
        wide = times.pivot(index=["model", "network"], columns="backend", values="relative").reset_index()
        shown["key"] = shown["model"].str.replace("[/:]", "-", regex=True)
        shown = shown.merge(
            wide.rename(columns={"model": "key"}), on=["key", "network"], how="left", suffixes=("", ", time")
        )
        shown = shown.drop(columns="key")
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.fillna("").values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def add(rows: list[dict[str, Any]], file: Path) -> None:
    """Put rows into a CSV file; those of the same network and backend go."""
    keys = ["model", "network", "backend"]
    before = [pd.read_csv(file)] if file.is_file() else []
    data = pd.concat([*before, pd.DataFrame(rows)]).drop_duplicates(keys, keep="last")
    data.to_csv(file, index=False)
    (file.parent / "table.md").write_text(table(file.parent) if (file.parent / "accuracy.csv").is_file() else "")


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / "commands.txt").open("a") as file:
        file.write(f"{shlex.join(['python', *sys.argv])}\n{environment()}\n")
    if settings.times:
        for folder in sorted(settings.keep.iterdir()):
            print(f"times of {folder.name}", flush=True)
            add(time_rows(folder, settings), settings.out / "times.csv")
        return
    if settings.models:
        data = load_dataset(
            DataConfig(dataset=settings.dataset, data_dir=settings.data_dir, train_images=settings.train_images)
        )
    for name in settings.models:
        print(f"{name}: training where it is not kept", flush=True)
        found = of_model(name, data, settings, lambda name=name: trained(name, data, settings), finetuned)
        add(accuracy_rows(name, found, data, settings), settings.out / "accuracy.csv")
    if settings.probe is not None:
        config: RunConfig = from_toml(SlimConfig, settings.probe)
        config = replace(config, data=replace(config.data, data_dir=settings.data_dir or config.data.data_dir))
        data = open_data(config)
        found = of_model(
            config.model, data, settings, lambda: headed(make_dense(config, data, 0), data, settings), headed
        )
        add(accuracy_rows(config.model, found, data, settings), settings.out / "accuracy.csv")
    for cell in settings.runs:
        run = next(folder for folder in (cell, *cell.parents) if (folder / CONFIG_FILE).is_file())
        config = from_toml(SlimConfig, run / CONFIG_FILE)
        config = replace(config, data=replace(config.data, data_dir=settings.data_dir or config.data.data_dir))
        name, data = config.model.replace("/", "-"), open_data(config)
        print(f"{name}: networks of {cell}", flush=True)
        add(accuracy_rows(name, of_run(cell, name, data, settings), data, settings), settings.out / "accuracy.csv")
    print((settings.out / "table.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
