"""Epochs for other tools, behind one small hook; all off by default. No tool is imported before it is asked for.

To add one: a function from (the log's path, the training's label) to a Sink, a line in SINKS, and a setting of its name in TrainConfig.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rmprune.errors import ConfigError, first_line

logger = logging.getLogger("rmprune")


class Sink(NamedTuple):
    """Where numbers go: `write(name, value, epoch)`, and what ends it."""

    write: Callable[[str, float, int], object]
    close: Callable[[], object]


def tensorboard(log: Path, label: str) -> Sink:
    """Files in tensorboard/ beside the log. Raises ConfigError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard is not installed; install it with: pip install 'rmprune[all]'") from None
    writer = SummaryWriter(str(log.parent / "tensorboard" / label))
    return Sink(lambda name, value, epoch: writer.add_scalar(f"{label}/{name}", value, epoch), writer.close)


def mlflow(log: Path, label: str) -> Sink:
    """A run of MLflow's experiment "rmprune", where MLFLOW_TRACKING_URI says, else where MLflow does by default. Raises ConfigError where
    it is not installed, or cannot use its store."""
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise ConfigError("mlflow is not installed; install it with: pip install mlflow") from None
    try:
        client = MlflowClient()
        known = client.get_experiment_by_name("rmprune")
        experiment = client.create_experiment("rmprune") if known is None else known.experiment_id
        run = client.create_run(experiment, run_name=f"{log.absolute().parent.name} {label}").info.run_id
    except Exception as error:  # each kind of store has its own
        raise ConfigError(
            f"mlflow: its store cannot be used ({first_line(error)}); set MLFLOW_TRACKING_URI, or --no-mlflow"
        ) from None

    reached = True

    def unless_gone(call: Callable[..., object], *arguments: object, **more: object) -> None:
        """A server that went away ends no training, and is waited for once: log.jsonl has it all."""
        nonlocal reached
        try:
            if reached:
                call(run, *arguments, **more)
        except Exception as error:
            reached = False
            logger.warning("%s: nothing more goes to mlflow (%s)", label, first_line(error))

    return Sink(
        lambda name, value, epoch: unless_gone(client.log_metric, name, value, step=epoch),
        lambda: unless_gone(client.set_terminated),
    )


SINKS: dict[str, Callable[[Path, str], Sink]] = {"tensorboard": tensorboard, "mlflow": mlflow}


def open_sinks(names: list[str], log: Path | None, label: str) -> list[Sink]:
    """Those of SINKS by these names. Raises ConfigError where there is no log to lie beside, or a tool is not there."""
    if names and log is None:
        raise ConfigError(f"{names[0]} needs a log file to lie beside; pass log=...")
    return [SINKS[name](log, label) for name in names if log is not None]


def write_epoch(sinks: list[Sink], values: dict[str, object], epoch: int) -> None:
    """Every number that is a fraction, as log.jsonl has it."""
    for name, value in values.items():
        if isinstance(value, float) and math.isfinite(value):
            for sink in sinks:
                sink.write(name, value, epoch)
