"""The one training loop, with one hook point after every step; sparsity and gradual pruning are hooks, not loops."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.config import TrainConfig, require
from rmprune.data.load import Dataset
from rmprune.data.splits import batch_seed
from rmprune.errors import DataError, loader_killed
from rmprune.measure.torch_backends import current
from rmprune.training import checkpoint as checkpoints
from rmprune.training import distributed
from rmprune.training.evaluation import NoOutputs, evaluate, number_or_none
from rmprune.training.interrupt import DeferredInterrupt
from rmprune.training.journal import Journal, SilentJournal
from rmprune.training.loggers import SINKS
from rmprune.training.precision import autocast
from rmprune.training.refuse import check_trainable, one_value
from rmprune.training.state import Hook
from rmprune.training.statistics import images_for_statistics, measure_statistics
from rmprune.training.step import Stepping

_FINITE_CHECK_STEPS = 50  # on a GPU, between steps: every look at the loss waits for it


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    hook: Hook | None = None,
    teacher: nn.Module | None = None,
    teacher_memory: Path | None = None,
    checkpoint: Path | None = None,
    log: Path | None = None,
    progress: bool = True,
    label: str = "train",
) -> nn.Module:
    """Train a copy of `model` and return it in eval mode on `device`; the argument is left alone.

    Batch size and augmentation come from `data.config`. `checkpoint` names a file that is written after every epoch,
    every `config.checkpoint_seconds` and on Ctrl-C; where it exists, training goes on from there, on the same machine
    exactly as if it had never stopped. A hook with state offers `state_dict()` and `load_state_dict()`, which go into
    the checkpoint. `teacher` is followed with weight `config.distillation`; `teacher_memory` names a folder that keeps its
    outputs for other trainings with the same seed (`rmprune.training.teacher`). Under torchrun every process calls `fit`: the batch
    is divided among them, the first one reads and writes files, and a checkpoint goes on with any number of processes.

    Raises `ArtifactError` for a checkpoint of another run, `RmpruneError` when loss or weights are no longer finite (with the first
    layer where that is so, the step, and the last good checkpoint), `ConfigError` for a network that cannot be trained.
    """
    check_trainable(model)
    require(config.distillation == 0 or teacher is not None, "distillation is set, but there is no teacher to follow")
    with distributed.process_group(torch.device(device)) as (device, rank, world):
        cuda = [device] if device.type == "cuda" else []
        with current(str(device)), torch.random.fork_rng(devices=cuda):  # streams and graphs are the current GPU's
            torch.manual_seed(seed)
            run = _Training(model, data, config, seed, device, hook, checkpoint, label, rank, world)
            if teacher is not None and config.distillation:
                run.follow(teacher, teacher_memory)
            run.resume()
            run.draw_apart()
            run.journal = (
                Journal(
                    label,
                    run.state.total_steps,
                    done_steps=run.state.step,
                    done_epochs=None if checkpoint is None else run.finished_epochs,
                    log=None if log is None else Path(log),
                    progress=progress,
                    tools=[name for name in SINKS if getattr(config, name)],
                )
                if rank == 0
                else SilentJournal()
            )
            try:
                run.train()
            finally:
                run.journal.close()
    return run.state.model.eval()


class _Training(Stepping):
    """The living state of one `fit`."""

    journal: Journal

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seconds = 0.0  # spent on this epoch before the current call
        self.agreed = self.world == 1  # that all processes stop here: with one there is nobody to ask
        self.started = self.saved_at = time.monotonic()

    @property
    def at_epoch_end(self) -> bool:
        return self.state.step % self.state.steps_per_epoch == 0

    @property
    def finished_epochs(self) -> int:
        """Epochs that are in the log: the last one may have made all its steps and still wait for its validation."""
        waiting = self.at_epoch_end and bool(self.totals[2] > 0)
        return self.state.step // self.state.steps_per_epoch - waiting

    def train(self) -> None:
        """Run all steps that are left. On Ctrl-C save the checkpoint and re-raise."""
        with DeferredInterrupt() as interrupt:
            try:
                while True:
                    if self.at_epoch_end and self.totals[2] > 0:
                        self.finish_epoch()
                    self.look_up(interrupt)
                    if self.state.step >= self.state.total_steps:
                        return
                    self.train_epoch(interrupt)
            except (KeyboardInterrupt, RuntimeError) as error:
                stopped = interrupt.requested and loader_killed(error)  # the signal went to it, too
                if isinstance(error, RuntimeError) and not stopped:
                    raise
                if self.between_steps and self.agreed:  # within a step, or an epoch's end, the last checkpoint stands
                    self.save()
                raise KeyboardInterrupt(*(() if stopped else error.args)) from None

    def train_epoch(self, interrupt: DeferredInterrupt) -> None:
        """The rest of the current epoch, or up to the first Ctrl-C."""
        epoch, start = divmod(self.state.step, self.state.steps_per_epoch)
        self.started = time.monotonic()
        batches = self.data.train.batches(
            self.data.config.batch_size,
            device=self.device,
            shuffle_seed=batch_seed(self.seed, epoch),
            augment=self.data.config.augmentation != "none",
            memory_format=self.memory_format,
            start=start,
            shard=(self.rank, self.world),
        )
        for x, y in batches:
            if self.device.type != "cpu" and self.state.step % _FINITE_CHECK_STEPS == 0:
                self.check_finite()
            self.train_step(x, y)
            if self.journal.wants_step:
                loss, accuracy, rate = self.facts(self.totals)
                self.journal.step(self.state.step, epoch + 1, loss, accuracy, rate * self.world)
            if self.at_epoch_end:
                return
            self.look_up(interrupt)
        raise DataError(
            f"{self.label}: the training images gave {self.state.step} batches where they said "
            f"{self.state.steps_per_epoch} an epoch"
        )

    def look_up(self, interrupt: DeferredInterrupt) -> None:
        """Between two steps: stop all processes on Ctrl-C in any, save where it is time."""
        due = (
            time.monotonic() - self.saved_at > self.config.checkpoint_seconds
            and self.rank == 0
            and not self.at_epoch_end
        )
        stop, save = distributed.any_says(self.world, interrupt.requested, due)
        if stop:
            self.agreed = True
            raise KeyboardInterrupt
        if save:
            self.save()

    def draw_apart(self) -> None:
        """Processes see different images, and drop out different values."""
        if self.rank > 0:
            torch.manual_seed(batch_seed(self.seed + self.state.step, self.rank))

    def facts(self, totals: Tensor) -> tuple[float, float, float]:
        """(mean loss, accuracy, images per second) of the epoch so far."""
        loss, correct, images = totals.tolist()
        return loss / images, correct / images, images / max(1e-9, self.seconds + time.monotonic() - self.started)

    def finish_epoch(self) -> None:
        """Validate, write the log line, begin a new epoch, save."""
        self.check_finite()
        self.check_weights()
        loss, accuracy, rate = self.facts(distributed.add_up(self.totals, self.world))
        state = self.state
        self.between_steps = False  # statistics are on their way, and numbers drawn for them: not done twice alike
        self.measure_statistics()
        distributed.share_state(state.model, self.world)
        split, shard = self.data.validation, (self.rank, self.world)
        try:
            validation = evaluate(state.model, split, device=self.device, precision=self.config.precision, shard=shard)
        except NoOutputs as error:
            raise self.broken("outputs on validation images are", f" ({error.where})", state.step) from error
        seconds = self.seconds + time.monotonic() - self.started
        self.journal.epoch(
            {
                "epoch": state.step // state.steps_per_epoch,
                "epochs": self.config.epochs,
                "train_loss": loss,
                "train_accuracy": number_or_none(accuracy),
                "validation_loss": validation.loss,
                "validation_accuracy": number_or_none(validation.accuracy),
                "learning_rate": state.learning_rate,
                "images_per_second": rate,
                "seconds": seconds,
            }
        )
        self.totals.zero_()  # in place, where a recorded step adds to it
        self.seconds, self.started = 0.0, time.monotonic()
        self.between_steps = True
        self.save()  # after the log: a line that is written twice is dropped when training goes on

    def measure_statistics(self) -> None:
        """Batch norms forget the weights of earlier steps; every process does the same with the same images."""
        images = images_for_statistics(len(self.data.train), last=self.state.step >= self.state.total_steps)
        batches = self.data.train.batches(
            self.data.config.batch_size,
            device=self.device,
            shuffle_seed=batch_seed(self.seed, self.state.step),
            memory_format=self.memory_format,
        )
        with autocast(self.config.precision, self.device):
            try:
                measure_statistics(self.state.model, batches, self.loss, images)
            except ValueError as error:
                raise one_value(error, self.label) from error

    def save(self) -> None:
        """Write the checkpoint, unless the model is broken: then the one before is worth more."""
        if self.checkpoint is None and self.world == 1:
            return
        model = self.state.model
        self.check_finite()
        self.check_weights()
        totals = distributed.add_up(self.totals, self.world)
        if self.checkpoint is None or self.rank != 0:
            return
        changed = model is not self.first_model or checkpoints.shapes_digest(model) != self.fingerprint["network"]
        sums = {"totals": totals, "seconds": self.seconds + time.monotonic() - self.started}
        content = checkpoints.snapshot(self.state, self.hook, self.device, changed=changed)
        checkpoints.save_checkpoint(self.checkpoint, {"fingerprint": self.fingerprint, **content, **sums})
        self.saved_at, self.saved_step = time.monotonic(), self.state.step

    def resume(self) -> None:
        """Go back to where the checkpoint was written, if there is one."""
        path = self.checkpoint
        found = checkpoints.load_checkpoint(path) if self.rank == 0 and path is not None and path.exists() else None
        saved = distributed.first_says(found, self.world)
        if saved is None:
            return
        path = path or Path(self.label)  # that of the first process is not known to the others
        with checkpoints.expected_to_fit(path):
            checkpoints.check_fingerprint(path, saved["fingerprint"], self.fingerprint)
            checkpoints.check_progress(saved, self.state.total_steps)
            if saved["architecture"] is not None:
                self.adopt(checkpoints.rebuild(saved["architecture"], saved.get("constants", {}) | saved["model"]))
            checkpoints.put_back(saved, self.state, self.hook, self.device)
            self.seconds, self.saved_step = float(saved["seconds"]), self.state.step
            self.totals.copy_(saved["totals"] if self.rank == 0 else torch.zeros(3))
