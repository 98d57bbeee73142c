"""What int8 does to a network, to its forms without residuals, and to pruned ones: accuracy, and time, in each number format.

    python experiments/int8.py --models resnet20 resnet18:16 mobilenet_v2_small:0.5 --dataset fashion-mnist --train-images 12000
    python experiments/int8.py --probe experiments/int8-efficientnet-lite0.toml --macs-ratio 0.7 --calibration 128
    python experiments/int8.py --runs runs/solar-cells/lite0-0 runs/solar-cells/lite0-1 --forms auto slice
    python experiments/int8.py --times

NAME:WIDTH is trained here, once, and goes on where it was stopped; --probe takes the pretrained weights of a config of slim and fits a
new head to their features, no more; a finished run of slim brings its trained network and what its methods made of it. `plain-FORM` is
the exact removal with copies passed in that form (shift, pair, slice: with ranges of their own, so int8 may tell them apart; fused:
neighbouring linear convolutions made one), `pruned` the plain network cut to --macs-ratio of the trained one's MACs and trained on,
`pruned-residual` the same with all residuals kept. Accuracy and, of two classes, AUC are of the first --test-images test images, as the
backend computes them; ranges are chosen by training images.

Networks are kept under --keep, and what is there is not made again; a row that is in accuracy.csv is not either. --times measures what is
kept, and trains nothing: do it on an idle machine. Writes accuracy.csv or times.csv (after each network), table.md and commands.txt under
--out.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
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
from rmprune.measure import calibration_images, measure_latencies
from rmprune.measure.accuracy import candidate_logits
from rmprune.measure.candidate import Candidate
from rmprune.measure.machine import environment
from rmprune.pipelines.measure import network_directory
from rmprune.pipelines.stages import make_dense, open_data
from rmprune.runs.records import CONFIG_FILE, find_records, networks, read_record
from rmprune.training import fit
from rmprune.training.evaluation import logits_of, scores

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
    """Finished runs of slim, whose networks are taken as they are."""
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
    return tuned(net, data, TrainConfig(epochs=settings.epochs), settings, f"{name}-residual")


def tuned(net: nn.Module, data: Dataset, train: TrainConfig, settings: Settings, label: str) -> nn.Module:
    """Trained, with a checkpoint by this label, from which it goes on where it was stopped."""
    file = settings.keep / "checkpoint" / f"{plainly(label)}.pt"
    cpu = torch.device("cpu")
    return fit(net, data, train, seed=settings.seed, device=cpu, progress=False, checkpoint=file, label=label).eval()


def finetuned(net: nn.Module, data: Dataset, settings: Settings, label: str) -> nn.Module:
    tuning = TrainConfig(epochs=settings.finetune_epochs, learning_rate=0.02, warmup_epochs=0.0)
    return tuned(net, data, tuning, settings, label)


def plainly(name: str) -> str:
    """As a file is called."""
    return re.sub("[^A-Za-z0-9.@_-]+", "-", name)


@torch.no_grad()
def headed(net: nn.Module, data: Dataset, settings: Settings, label: str = "") -> nn.Module:
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


Finish = Callable[[nn.Module, Dataset, Settings, str], nn.Module]


def pruned(
    net: nn.Module, whole: nn.Module, data: Dataset, settings: Settings, finish: Finish, label: str
) -> nn.Module:
    """Cut once to the budget, counted against the `whole` network, its layers fitted anew, and finished."""
    x, batches = data.train.example(2), list(data.train.batches(128, limit=1024))
    budget = rmprune.Budget(macs_ratio=settings.macs_ratio, reference_macs=rmprune.count_macs(whole, x[:1]))
    cut = rmprune.prune(net, x, importance="taylor", budget=budget, data=batches, reconstruct=True)
    return finish(cut, data, settings, label)


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
    folder, x = settings.keep / plainly(name), data.train.example(16)
    net = kept(folder / "residual", make, x)
    found = {"residual": net, **plain_forms(net, x, folder, settings)}
    if settings.pruned:
        sources = {
            "pruned-residual": lambda: net,
            "pruned": lambda: rmprune.remove_residuals(net, x, batch_norm=True).model,
        }
        for key, source in sources.items():
            cut = lambda source=source, key=key: pruned(source(), net, data, settings, finish, f"{name}-{key}")  # noqa: E731
            found[key] = kept(folder / key, cut, x)
    return found


def of_run(run: Path, name: str, data: Dataset, settings: Settings) -> dict[str, nn.Module]:
    """The networks of a run: the trained one, that without residuals in each form, and those of each of its cells, METHOD@BUDGET."""
    folder, x, found = settings.keep / plainly(f"{name} {run.name}"), data.train.example(16), {}
    for cell in (file.parent for file in find_records([run])):
        budget = re.sub("[a-z_]+-", "", cell.name)
        for method in networks(read_record(cell)):
            key = "residual" if method == "original" else f"{method}@{budget}"
            if key not in found:
                source = network_directory(cell, method)
                found[key] = kept(folder / key, lambda source=source: artifact.load(source), x)
    return found | plain_forms(found["residual"], x, folder, settings)


def accuracy_rows(
    name: str, run: str, key: str, net: nn.Module, data: Dataset, settings: Settings
) -> Iterator[dict[str, Any]]:
    """A row for each backend."""
    limit, x = min(settings.test_images, len(data.test)), data.test.example(1)
    candidate = Candidate(key, net, x, calibration_images(data.train, settings.calibration))
    exact = scores(*logits_of(net, data.test, limit=limit))
    for backend in settings.backends:
        found = scores(*candidate_logits(candidate, data.test, backend, threads=settings.threads, limit=limit))
        yield {
            "model": name,
            "dataset": data.name,
            "run": run,
            "network": key,
            "backend": backend,
            "macs": rmprune.count_macs(net, x),
            "test_images": limit,
            "torch_accuracy": exact["accuracy"],
            "accuracy": found["accuracy"],
            "lost": exact["accuracy"] - found["accuracy"],
            "auc": found["auc"] if data.num_classes == 2 else None,
        }


def add_accuracies(name: str, run: str, found: dict[str, nn.Module], data: Dataset, settings: Settings) -> None:
    """Into accuracy.csv, network by network; those that are there with all backends are not measured again."""
    file = settings.out / "accuracy.csv"
    for key, net in found.items():
        there = rows_of(file) if file.is_file() else pd.DataFrame(columns=KEYS)
        same = (there["model"] == name) & (there["run"] == run) & (there["network"] == key)
        if not set(settings.backends) <= set(there[same]["backend"]):
            print(f"{name} {run}: accuracy of {key}", flush=True)
            add(list(accuracy_rows(name, run, key, net, data, settings)), file)


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
    return [{"folder": folder.name, "network": key, **one.to_dict()} for key, all_ in times.items() for one in all_]


def table(folder: Path) -> str:
    """Accuracy by network and backend in per cent and AUC, means over runs, and the time relative to the residual network in float32."""
    found = rows_of(folder / "accuracy.csv")
    backends, columns = list(dict.fromkeys(found["backend"])), ["model", "dataset", "network"]
    order = pd.MultiIndex.from_frame(found[columns].drop_duplicates())
    parts = [found.groupby(columns)["run"].nunique().rename("runs").loc[order].map(str)]

    def wide(rows: pd.DataFrame, value: str, form: str, what: str) -> None:
        means = rows.pivot_table(index=columns, columns="backend", values=value).reindex(index=order, columns=backends)
        shown = means.map(lambda x: "" if math.isnan(x) else form.format(x)).add_suffix(what)
        parts.append(shown.loc[:, (shown != "").any()])

    wide(found.assign(accuracy=100 * found["accuracy"]), "accuracy", "{:.2f}", "")
    wide(found, "auc", "{:.3f}", ", AUC")
    if (folder / "times.csv").is_file():
        times = pd.read_csv(folder / "times.csv")
        whole = times[times["network"] == "residual"].set_index(["folder", "backend"])["median_ms"]
        of = zip(times["folder"], times["backend"].str.removesuffix("-int8"), strict=True)
        times["relative"] = times["median_ms"] / [whole.get(key, math.nan) for key in of]
        found["folder"] = [plainly(f"{m} {r}".strip()) for m, r in zip(found["model"], found["run"], strict=True)]
        wide(found.merge(times, on=["folder", "network", "backend"]), "relative", "{:.2f}", ", time")
    shown = pd.concat(parts, axis=1).reset_index()
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def rows_of(file: Path) -> pd.DataFrame:
    """Those of a CSV file; networks that came from no run have an empty one."""
    return pd.read_csv(file, dtype={"run": str}).fillna({"run": ""})


KEYS = ["model", "run", "folder", "network", "backend"]


def add(rows: list[dict[str, Any]], file: Path) -> None:
    """Put rows into a CSV file; those of the same network and backend go."""
    before = [rows_of(file)] if file.is_file() else []
    data = pd.concat([*before, pd.DataFrame(rows)])
    data.drop_duplicates([key for key in KEYS if key in data], keep="last").to_csv(file, index=False)
    (file.parent / "table.md").write_text(table(file.parent) if (file.parent / "accuracy.csv").is_file() else "")


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / "commands.txt").open("a") as file:
        file.write(f"{shlex.join(['python', *sys.argv])}\n{environment()}\n")
    if settings.times:
        for folder in sorted(file.parent for file in settings.keep.glob("*/residual")):
            print(f"times of {folder.name}", flush=True)
            add(time_rows(folder, settings), settings.out / "times.csv")
        return
    if settings.models:
        given = DataConfig(dataset=settings.dataset, data_dir=settings.data_dir, train_images=settings.train_images)
        data = load_dataset(given)
    for name in settings.models:
        print(f"{name}: training where it is not kept", flush=True)
        found = of_model(name, data, settings, lambda name=name: trained(name, data, settings), finetuned)
        add_accuracies(name, "", found, data, settings)
    if settings.probe is not None:
        config, data = opened(settings.probe, settings)
        found = of_model(
            config.model, data, settings, lambda: headed(make_dense(config, data, 0), data, settings), headed
        )
        add_accuracies(config.model, "", found, data, settings)
    for run in settings.runs:
        config, data = opened(run / CONFIG_FILE, settings)
        name = f"{config.model} at {data.input_shape[-1]}"
        add_accuracies(name, run.name, of_run(run, name, data, settings), data, settings)
    print((settings.out / "table.md").read_text())


def opened(file: Path, settings: Settings) -> tuple[RunConfig, Dataset]:
    """A config of slim and its data."""
    config: RunConfig = from_toml(SlimConfig, file)
    config = replace(config, data=replace(config.data, data_dir=settings.data_dir or config.data.data_dir))
    return config, open_data(config)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
