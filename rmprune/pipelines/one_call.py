"""`rmprune.slim`: the slim command's job for a network that is trained already and batches of any loader, from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from rmprune import artifact
from rmprune.config import DataConfig, MeasureConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.config.fields import require_types
from rmprune.config.pruning import BUDGETS
from rmprune.data.batches import Loss
from rmprune.data.given import GIVEN, GivenSplit
from rmprune.data.load import Dataset
from rmprune.errors import ArtifactError, ConfigError, RmpruneError, UnsupportedModel
from rmprune.graph.inputs import as_given
from rmprune.pipelines.refuse_call import (
    refuse_another,
    refuse_kinds,
    refuse_loss_and_formats,
    told_apart_by,
    trained_copy,
)
from rmprune.pipelines.slim import run_job
from rmprune.pipelines.stages import pick_device
from rmprune.pruning.plan import SlimPlan
from rmprune.runs.directory import Finished
from rmprune.runs.records import networks, read_record
from rmprune.runs.writing import whole
from rmprune.training.job import Job

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("rmprune")
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
    refuse_kinds(finetune=finetune, prune=prune, measure=measure, method=method, out=out, device=device)
    budgets = _budgets(ratio=ratio, macs_ratio=macs_ratio, latency_ratio=latency_ratio, memory_ratio=memory_ratio)
    places = measure or MeasureConfig()
    refuse_loss_and_formats(loss, method, places)
    network = trained_copy(model)
    splits = _splits(network, train, validation, test, loss)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rmprune-"))
    try:
        config = _settings(
            splits,
            budgets,
            method,
            prune or PruneConfig(),
            finetune or SlimConfig.finetune,
            {"epochs": epochs, "learning_rate": learning_rate},
            model=type(network).__name__,
            seed=seed,
            device=str(device),
            measure=places,
            out=folder,
        )
        return _run(config, network, splits, budgets, next(model.parameters()).device, temporary=out is None)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


class _Splits(NamedTuple):
    train: GivenSplit
    validation: GivenSplit
    test: GivenSplit


def _budgets(**ratios: float | None) -> dict[str, float]:
    """Those that are given. Raises ConfigError unless that is one, beside which memory_ratio may stand."""
    given = require_types(slim, {name: value for name, value in ratios.items() if value is not None})
    if not given or len(given.keys() - {"memory_ratio"}) > 1:
        raise ConfigError(
            f"give exactly one of {', '.join(f'{name}=' for name in ratios)}; got {', '.join(given) or 'none'} (memory_ratio= may stand "
            "beside another)"
        )
    return given


def _splits(
    network: nn.Module, train: Iterable[Any], validation: Iterable[Any], test: Iterable[Any] | None, loss: Loss | None
) -> _Splits:
    """The loaders as splits; the network takes the first batch of training, or is refused."""
    first, second = GivenSplit(train, network, loss, "train"), GivenSplit(validation, network, loss, "validation")
    as_given(network, first.example(2))
    return _Splits(first, second, second if test is None else GivenSplit(test, network, loss, "test"))


def _settings(
    splits: _Splits, budgets: dict[str, float], method: str | None, prune: PruneConfig, finetune: TrainConfig,
    steps: dict[str, Any], **settings: Any,
) -> SlimConfig:  # fmt: skip
    """The slim command's for this call. `steps`: of fine-tuning, where not None; `settings`: as the class takes them."""
    dataset = "-".join([GIVEN, *(split.digest() for split in dict.fromkeys(splits[1:]))])
    usual = () if splits.train.loss is None else ("rm",)
    asked_for: dict[str, Any] = {name: (budgets[name],) if name in budgets else () for name in BUDGETS}
    return SlimConfig(
        method=usual if method is None else (method,),
        data=DataConfig(dataset=dataset, augment="none"),
        prune=dataclasses.replace(prune, **asked_for),
        finetune=dataclasses.replace(
            finetune,
            cuda_graph=False,  # batches of one's own may differ in size
            **{name: value for name, value in steps.items() if value is not None},
        ),
        **settings,
    )


def _run(
    config: SlimConfig, network: nn.Module, splits: _Splits, budgets: dict[str, float], device: torch.device, *,
    temporary: bool,
) -> Slimmed:  # fmt: skip
    """The job, done or gone on with in the directory of the settings. `device`: where the result should be."""
    name, folder = config.data.dataset, config.directory
    given_with = {} if temporary else told_apart_by(name, splits.train, splits.validation)
    refuse_another(folder, network, given_with)
    shape = tuple(splits.train.example(1).shape[1:])
    data = Dataset(name, splits.train.classes, shape, *splits, config.data)  # type: ignore[arg-type]
    asked = ", ".join(f"{kind}={value:g}" for kind, value in budgets.items())
    command = f"rmprune.slim({config.model}, ..., {asked}, method={config.method[0]!r}, seed={config.seed})"
    job = Job(config, data, pick_device(config.device), config.seed, given=network, given_with=given_with)
    with contextlib.suppress(Finished):  # out= holds this very run
        run_job(job, command=command)
    return Slimmed(folder, device, data, temporary=temporary)


def _place(time: dict[str, Any]) -> str:
    """The heading of a column of times."""
    return f"time_ratio, {time['backend']}, {time['threads']} threads, batch {time['batch_size']}"
