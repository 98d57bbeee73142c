"""`rmprune.slim`: the slim command's job for a network that is trained already and batches of any loader, from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rmprune import artifact
from rmprune.config import DataConfig, MeasureConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.config.fields import require_types
from rmprune.data.batches import Loss
from rmprune.data.given import GIVEN, GivenSplit
from rmprune.data.load import Dataset
from rmprune.errors import ArtifactError, ConfigError, RmpruneError, UnsupportedModel
from rmprune.graph.copied import copied
from rmprune.graph.foreign import plain_module
from rmprune.graph.inputs import as_given
from rmprune.measure.backends import reduced
from rmprune.pipelines.slim import run_job
from rmprune.pipelines.stages import pick_device
from rmprune.pruning.plan import SlimPlan
from rmprune.runs.directory import Finished
from rmprune.runs.records import networks, read_record
from rmprune.runs.writing import whole
from rmprune.training.job import Job
from rmprune.training.refuse import check_precision

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("rmprune")
_ALIKE = 1e-2  # relative, of one loss computed on two machines or in coarse formats
NOT_KEPT = shutil.ignore_patterns("checkpoint", ".lock", ".*.tmp")


class Slimmed:
    """What `slim` made. In a notebook it shows itself as its table.

    `model`: the slimmed network in eval mode, on the device of the one that was given; `record`: all that was measured, as in
    record.json; `directory`: the run. Without `out` that lives as long as this object: `save` it.
    """

    def __init__(self, directory: Path, device: torch.device, data: Dataset, *, temporary: bool) -> None:
        self.directory, self._data = directory, data
        self.record: dict[str, Any] = read_record(directory)
        self._network = next(name for name in networks(self.record) if name not in ("original", "plain"))
        self.model = artifact.load(directory / self._network).to(device)
        if temporary:
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """A row each for `original`, `removed` (without its residuals, where the method removes them first) and `pruned`: accuracy (0 to 1)
        or loss, MACs and parameters, and the measured time of a batch relative to the original's, a column for each place of measuring."""
        import pandas as pd

        shown = {"original": "original", "plain": "removed", self._network: "pruned"}
        found = {shown[name]: self.record[name] for name in shown if name in self.record}
        first, score = found["original"], "accuracy" if self.record["original"]["accuracy"] is not None else "loss"
        rows = {
            name: {
                score: entry[score],
                "macs": entry["macs"],
                "macs_ratio": entry["macs"] / first["macs"],
                "params": entry["params"],
                "params_ratio": entry["params"] / first["params"],
                **{_place(time): time["ratio"] for time in entry["latency"]},
            }
            for name, entry in found.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def plan(self) -> SlimPlan:
        """What each block became and how wide each channel group is: `plan.to_dict()`, as JSON, is what `slim --plan FILE` reads.

        Raises UnsupportedModel where `mixed` removed residuals after the cut, which no plan says."""
        entry = self.record[self._network]
        if "plan" not in entry:
            gone = ", ".join(entry["removal"]["removed"])
            raise UnsupportedModel(
                f"{gone}: removed after the cut, which no plan says; take `model` as it is, or save it"
            )
        return SlimPlan.from_dict(entry["plan"])

    def save(self, path: str | Path) -> Path:
        """Copies the run to the folder `path`, which must not exist or be empty: the networks as artifacts (with model.onnx), record.json,
        the log and the settings; and makes deploy/ there (docs/deploy.md). Raises ArtifactError where it cannot."""
        from rmprune.pipelines.deploy import deploy  # with it come pandas and matplotlib

        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"{path}: exists already; choose another folder")
        with whole(path) as work:
            shutil.copytree(self.directory, work, ignore=NOT_KEPT)
            try:
                deploy(work, self._data)
            except RmpruneError as error:  # the rest is what was trained
                logger.warning("%s: no deploy/ (%s)", path, error)
        return path

    def __repr__(self) -> str:
        return self.table.to_string(float_format=lambda value: f"{value:.3f}")

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format=lambda value: f"{value:.3f}", border=0)


def slim(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    ratio: float | None = None,
    macs_ratio: float | None = None,
    latency_ratio: float | None = None,
    memory_ratio: float | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss | None = None,
    method: str | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    finetune: TrainConfig | None = None,
    prune: PruneConfig | None = None,
    measure: MeasureConfig | None = None,
) -> Slimmed:
    """Prune a trained network to a budget, residuals removed where that pays, fine-tune it with the original as teacher, measure both.

    The same job as `python -m rmprune slim --checkpoint`, for any network that torch.fx can trace and any loaders; `model` is left alone.

    `train`, `validation`: re-iterable batches (a DataLoader, a list) of (images [N, ...], class numbers [N], ...), as the network was
    trained on, augmentation included; or, with `loss`, a function of (model, batch) that returns a scalar tensor, of any form. `test` is
    what the table is about (default: `validation`, on which nothing is chosen but by methods that compare candidates). One budget:
    `ratio` of channels that go, `macs_ratio`, `latency_ratio` (measured, of `measure`'s first place) or `memory_ratio`
    (peak of activations, which may stand beside another) of the original that stays.
    `method`: as in docs/methods.md (default: as the slim command's, "rm" with a loss of one's own). `epochs` (20) and `learning_rate`
    (0.02, the peak): of fine-tuning; `finetune`, `prune` and `measure`: all that the flags of these names set, before which these two
    go. With a loss the teacher's part is the squared difference of outputs over their variance.
    `out`: a folder that keeps the run: the same call goes on from it where one was interrupted, and gives back one that is finished.
    Another call is refused: other weights, settings, validation or test data; another number of training batches, or a first one that
    differs though two readings of it agree; a loss that is another on the first batch of validation. Without it, `result.save(folder)`.

    Raises, before anything is trained: ConfigError for settings and for a network in training mode or without weights, DataError for
    loaders (of `train` the first batch is looked at, of the others every one), UnsupportedModel for a network that cannot be traced,
    saved or pruned, InfeasibleBudget where limits forbid the budget.

    >>> model = rmprune.models.create("resnet8", num_classes=4, width=16).eval()  # a trained one
    >>> batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2)]
    >>> quick = rmprune.config.MeasureConfig(backends=("eager",), seconds=0, min_rounds=3)
    >>> result = rmprune.slim(model, batches, batches, macs_ratio=0.5, method="rm", epochs=1, measure=quick)
    >>> list(result.table.index), bool(result.table.macs_ratio["pruned"] <= 0.5)
    (['original', 'removed', 'pruned'], True)
    >>> sorted(path.name for path in result.save("slimmed").iterdir())
    ['config.toml', 'dense', 'deploy', 'log.jsonl', 'plain', 'pruned', 'record.json']
    """
    for name, value, kind in (("finetune", finetune, TrainConfig), ("prune", prune, PruneConfig), ("measure", measure, MeasureConfig),
                              ("method", method, str), ("out", out, str | Path), ("device", device, str | torch.device)):  # fmt: skip
        if not isinstance(value, kind | None) or (name == "device" and value is None):
            raise ConfigError(f"{name} is of type {type(value).__name__}; give a {getattr(kind, '__name__', kind)}")
    budgets = {"ratio": ratio, "macs_ratio": macs_ratio, "latency_ratio": latency_ratio, "memory_ratio": memory_ratio}
    given = require_types(slim, {name: value for name, value in budgets.items() if value is not None})
    if not given or len(given.keys() - {"memory_ratio"}) > 1:
        raise ConfigError(
            f"give exactly one of {', '.join(f'{name}=' for name in budgets)}; got {', '.join(given) or 'none'} (memory_ratio= may stand "
            "beside another)"
        )
    asked_for: dict[str, Any] = {name: (given[name],) if name in given else () for name in budgets}
    tuning, places = finetune or SlimConfig.finetune, measure or MeasureConfig()
    if loss is not None and method in ("auto", "depth"):
        raise ConfigError(
            f"method {method!r} weighs blocks by class scores, and does not know a loss of one's own; take 'rm' or 'residual'"
        )
    if found := reduced(places.backends):
        raise ConfigError(
            f"{', '.join(found)} count accuracy on labelled images of our own; measure result.model there by measure_latencies"
        )
    network = _trained(model)
    at = next(parameter.device for parameter in model.parameters())
    splits = [GivenSplit(train, network, loss, "train"), GivenSplit(validation, network, loss, "validation")]
    as_given(network, splits[0].example(2))
    splits.append(splits[1] if test is None else GivenSplit(test, network, loss, "test"))
    dataset = "-".join([GIVEN, *(split.digest() for split in dict.fromkeys(splits[1:]))])
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rmprune-"))
    try:
        config = SlimConfig(
            model=type(network).__name__,
            seed=seed,
            device=str(device),
            method=("rm",) if method is None and loss is not None else () if method is None else (method,),
            data=DataConfig(dataset=dataset, augment="none"),
            prune=dataclasses.replace(
                prune or PruneConfig(),
                **asked_for,
            ),
            finetune=dataclasses.replace(
                tuning,
                epochs=tuning.epochs if epochs is None else epochs,
                learning_rate=tuning.learning_rate if learning_rate is None else learning_rate,
                cuda_graph=False,  # batches of one's own may differ in size
            ),
            measure=places,
            out=folder,
        )
        given_with = {} if out is None else _given_with(dataset, splits[0], splits[1])
        _refuse_another(folder, network, given_with)
        shape = tuple(splits[0].example(1).shape[1:])
        data = Dataset(dataset, splits[0].classes, shape, splits[0], splits[1], splits[2], config.data)  # type: ignore[arg-type]
        asked = ", ".join(f"{name}={value:g}" for name, value in given.items())
        command = f"rmprune.slim({type(network).__name__}, ..., {asked}, method={config.method[0]!r}, seed={seed})"
        with contextlib.suppress(Finished):  # out= holds this very run
            run_job(
                Job(config, data, pick_device(str(device)), seed, given=network, given_with=given_with), command=command
            )
        return Slimmed(folder, at, data, temporary=out is None)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _trained(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU. Raises ConfigError where it has no weights, too coarse ones, or is in training mode."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is of type {type(model).__name__}; give the trained nn.Module")
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"{type(model).__name__} has no weights; there is nothing to prune")
    takes = [
        name
        for name, each in inspect.signature(model.forward).parameters.items()
        if each.default is each.empty and each.kind.name[:3] != "VAR"
    ]
    if len(takes) > 1:
        raise ConfigError(
            f"forward of {type(model).__name__} takes {', '.join(takes)}; slim takes networks of one input, model(images): make one tensor "
            "of them (torch.cat), and take it apart in forward"
        )
    if model.training:
        raise ConfigError(f"{type(model).__name__} is in training mode; give a trained network, after model.eval()")
    check_precision(model.parameters())
    return copied(plain_module(model)).cpu()


def _given_with(dataset: str, train: GivenSplit, validation: GivenSplit) -> dict[str, Any]:
    """What tells this call's data and loss from another's, as far as they repeat."""
    return {
        "data": dataset,
        "own_loss": validation.loss is not None,
        "loss": validation.first_loss(),
        "batches": train.count,
        "first_batch": train.first_digest(),
    }


def _refuse_another(folder: Path, network: nn.Module, given_with: dict[str, Any]) -> None:
    """Raise ConfigError where the run in this folder began with other weights, another loss or other training batches, as far as these
    can be told from one another."""
    if not artifact.is_artifact(folder / "dense"):
        return
    before, now = artifact.load(folder / "dense").state_dict(), network.state_dict()
    if any(name not in now or not torch.equal(tensor, now[name]) for name, tensor in before.items()):
        raise ConfigError(f"{folder}: holds the run of another network, or of other weights; choose another out=")
    begun = artifact.read_extra(folder / "dense").get("given_with", {})
    if not isinstance(begun, dict) or begun.get("data") != given_with["data"]:
        return  # of an earlier version, or refused for its data
    losses = [entry.get("loss") for entry in (begun, given_with)]
    same_loss = None in losses or math.isclose(*losses, rel_tol=_ALIKE, abs_tol=_ALIKE**2)  # type: ignore[arg-type]
    if begun["own_loss"] != given_with["own_loss"] or not same_loss:
        raise ConfigError(
            f"{folder}: holds the run of another loss= (of the first batch of validation it was {losses[0]}, and is {losses[1]} now); "
            "give that one to go on, or choose another out="
        )
    first = {entry["first_batch"] for entry in (begun, given_with)} - {""}
    if begun["batches"] != given_with["batches"] or len(first) > 1:
        raise ConfigError(
            f"{folder}: holds the run of other training batches ({begun['batches']}, now {given_with['batches']}; the first one "
            f"{'differs' if len(first) > 1 else 'agrees'}); give these again, or choose another out="
        )


def _place(time: dict[str, Any]) -> str:
    """The heading of a column of times."""
    return f"time_ratio, {time['backend']}, {time['threads']} threads, batch {time['batch_size']}"
