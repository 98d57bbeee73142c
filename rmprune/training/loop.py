"""The one training loop, with one hook point after every step; sparsity and gradual pruning are hooks, not loops."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.config import TrainConfig, require
from rmprune.data.load import Dataset
from rmprune.data.splits import batch_seed
from rmprune.errors import DataError, RmpruneError
from rmprune.measure.cuda_graphs import Replayed
from rmprune.measure.torch_backends import current
from rmprune.training import checkpoint as files
from rmprune.training import distributed
from rmprune.training.evaluation import NoOutputs, evaluate, number_or_none
from rmprune.training.interrupt import DeferredInterrupt
from rmprune.training.journal import Journal, SilentJournal
from rmprune.training.loggers import SINKS
from rmprune.training.objective import class_objective, own_objective
from rmprune.training.optimizer import learning_rate, make_optimizer, total_learning_rate
from rmprune.training.precision import autocast, compute_dtype
from rmprune.training.refuse import begins, check_trainable, not_finite, one_value
from rmprune.training.shared_statistics import SharedStatistics
from rmprune.training.state import Hook, TrainState
from rmprune.training.statistics import measure_statistics
from rmprune.training.teacher import Teacher

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


class _Training:
    """The living state of one `fit`."""

    journal: Journal

    def __init__(
        self, model: nn.Module, data: Dataset, config: TrainConfig, seed: int, device: torch.device, hook: Hook | None,
        checkpoint: Path | None, label: str, rank: int, world: int,
    ) -> None:  # fmt: skip
        self.data, self.config, self.seed, self.device, self.hook = data, config, seed, device, hook
        self.label, self.rank, self.world = label, rank, world
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.teacher: Teacher | None = None
        self.loss = data.train.loss
        self.class_weights = None if data.class_weights is None else data.class_weights.to(device)
        model = self.place(copy.deepcopy(model))
        self.fingerprint = files.fingerprint(model, data, config, seed, label, distilled=config.distillation > 0)
        steps = data.train.num_batches(data.config.batch_size, shuffled=True)
        self.state = TrainState(
            model,
            make_optimizer(model, config),
            config,
            steps,
            steps * config.epochs,
            total_learning_rate(config, steps),
        )
        self.first_model = model  # another one in `state` came from the hook
        self.replayable = config.cuda_graph and device.type == "cuda" and world == 1
        self.connect()
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images of this epoch
        self.seconds = 0.0  # spent on this epoch before the current call
        self.between_steps = True
        self.agreed = world == 1  # that all processes stop here: with one there is nobody to ask
        self.saved_step: int | None = None  # of the checkpoint
        self.started = self.saved_at = time.monotonic()

    def connect(self) -> None:
        """Make ready what computes gradients of the model that is trained from now on."""
        self.parallel = distributed.wrap(self.state.model, self.world, self.device)
        self.gradients: Callable[..., None] = self.compute_gradients
        if self.replayable:
            self.gradients = Replayed(self.compute_gradients)

    def follow(self, network: nn.Module, memory: Path | None) -> None:
        """Learn from this network as well."""
        self.teacher = Teacher(
            self.place(copy.deepcopy(network)).eval(),
            self.data,
            replayed=self.replayable,
            seed=self.seed,
            dtype=compute_dtype(self.config.precision, self.device),
            memory=memory if self.world == 1 else None,
        )

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the memory order and the mode of training."""
        return model.to(self.device).to(memory_format=self.memory_format).train()

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
                stopped = interrupt.requested and "DataLoader worker" in str(error)  # the signal went to it, too
                if isinstance(error, RuntimeError) and not stopped:
                    raise
                if self.between_steps and self.agreed:  # within a step the last checkpoint stands
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

    def train_step(self, x: Tensor, y: Tensor) -> None:
        """Forward, backward, the optimizer's step and the hook."""
        state = self.state
        state.learning_rate = learning_rate(self.config, state.step, state.steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = state.learning_rate * group.get("rate", 1.0)  # a hook's own optimizer has none
        self.between_steps = False
        targets = []
        if self.teacher is not None and self.loss is None:
            with autocast(self.config.precision, self.device):
                targets = [self.teacher.outputs(x, *divmod(state.step, state.steps_per_epoch))]
        self.gradients(x, y, *targets)
        state.optimizer.step()
        state.step += 1
        self.between_steps = True
        if self.hook is not None:
            self.call_hook(self.hook)

    def compute_gradients(self, x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
        """The gradients of one batch, clipped, and its part of the totals. On a GPU nothing here waits for it."""
        config = self.config
        shared = SharedStatistics() if config.sync_batch_norm and self.world > 1 else contextlib.nullcontext()
        parts = None if self.world == 1 else self.parts(x, y)
        with autocast(config.precision, self.device), shared:
            try:
                if self.loss is None:
                    loss, hits = class_objective(self.parallel, x, y, target, config, self.class_weights, parts)
                else:
                    teacher = None if self.teacher is None else self.teacher.frozen
                    loss, hits = own_objective(self.parallel, y, self.loss, teacher, config)
            except ValueError as error:
                raise one_value(error, self.label) from error
        with torch.no_grad():
            count = torch.full_like(loss, len(x))
            self.totals += torch.stack([loss * (count if parts is None else count / parts[0]), hits, count])
        if self.device.type == "cpu":
            self.check_finite(x)
        self.state.optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.state.model.parameters(), config.clip_norm)

    def parts(self, x: Tensor, y: Tensor) -> Tensor:
        """What this process's means over its images, and over their weights, count among those of all [2]."""
        amounts = torch.full((2,), float(len(x)), device=self.device)
        if self.class_weights is not None:
            amounts[1] = self.class_weights[y].sum()
        return distributed.part_of_all(amounts, self.world)

    def call_hook(self, hook: Hook) -> None:
        """Let the hook work, and take over a model that it put in place."""
        state = self.state
        model, optimizer = state.model, state.optimizer
        hook(state)
        if state.model is not model:
            self.adopt(state.model, None if state.optimizer is optimizer else state.optimizer)

    def adopt(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Train this model from now on, by default with a new optimizer."""
        self.state.model = self.place(model)
        self.state.optimizer = optimizer or make_optimizer(self.state.model, self.config)
        self.connect()

    def check_finite(self, x: Tensor | None = None) -> None:
        """Refuse to go on from a loss that is no number. x: the images it comes from, where they are at hand; else all processes ask."""
        totals = self.totals if x is not None else distributed.add_up(self.totals, self.world)
        if not math.isfinite(float(totals[0])):
            where = begins(self.state.model, None if self.teacher is None else self.teacher.frozen, x)
            raise self.broken("the loss is", where, self.state.step + (x is not None))

    def check_weights(self) -> None:
        """Refuse to go on from weights that are no numbers."""
        if where := begins(self.state.model, None, None):
            raise self.broken("weights are", where, self.state.step)

    def broken(self, what: str, where: str, step: int) -> RmpruneError:
        return not_finite(f"{self.label}: {what}", where, self.state, step, self.checkpoint, self.saved_step)

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
        self.save()  # after the log: a line that is written twice is dropped when training goes on

    def measure_statistics(self) -> None:
        """Batch norms forget the weights of earlier steps; every process does the same with the same images."""
        batches = self.data.train.batches(
            self.data.config.batch_size,
            device=self.device,
            shuffle_seed=batch_seed(self.seed, self.state.step),
            memory_format=self.memory_format,
        )
        with autocast(self.config.precision, self.device):
            try:
                measure_statistics(self.state.model, batches, self.loss)
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
        changed = model is not self.first_model or files.shapes_digest(model) != self.fingerprint["network"]
        sums = {"totals": totals, "seconds": self.seconds + time.monotonic() - self.started}
        content = files.snapshot(self.state, self.hook, self.device, changed=changed)
        files.save_checkpoint(self.checkpoint, {"fingerprint": self.fingerprint, **content, **sums})
        self.saved_at, self.saved_step = time.monotonic(), self.state.step

    def resume(self) -> None:
        """Go back to where the checkpoint was written, if there is one."""
        path = self.checkpoint
        found = files.load_checkpoint(path) if self.rank == 0 and path is not None and path.exists() else None
        saved = distributed.first_says(found, self.world)
        if saved is None:
            return
        path = path or Path(self.label)  # that of the first process is not known to the others
        with files.expected_to_fit(path):
            files.check_fingerprint(path, saved["fingerprint"], self.fingerprint)
            files.check_progress(saved, self.state.total_steps)
            if saved["architecture"] is not None:
                self.adopt(files.rebuild(saved["architecture"], saved.get("constants", {}) | saved["model"]))
            files.put_back(saved, self.state, self.hook, self.device)
            self.seconds, self.saved_step = float(saved["seconds"]), self.state.step
            self.totals.copy_(saved["totals"] if self.rank == 0 else torch.zeros(3))
