"""One step of a training: gradients of a batch, the optimizer's step, the hook, and what is refused as no number. It knows no epochs."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.config import TrainConfig
from rmprune.data.load import Dataset
from rmprune.errors import RmpruneError
from rmprune.graph.copied import copied
from rmprune.graph.memory_order import memory_order
from rmprune.measure.cuda_graphs import Replayed
from rmprune.training import checkpoint as checkpoints
from rmprune.training import distributed
from rmprune.training.objective import class_objective, own_objective
from rmprune.training.optimizer import learning_rate, make_optimizer, total_learning_rate
from rmprune.training.precision import autocast, compute_dtype
from rmprune.training.refuse import begins, not_finite, one_value
from rmprune.training.shared_statistics import SharedStatistics
from rmprune.training.state import Hook, TrainState
from rmprune.training.teacher import Teacher


class Stepping:
    """The model that is trained, with all that a step needs."""

    def __init__(
        self, model: nn.Module, data: Dataset, config: TrainConfig, seed: int, device: torch.device, hook: Hook | None,
        checkpoint: Path | None, label: str, rank: int, world: int,
    ) -> None:  # fmt: skip
        self.data, self.config, self.seed, self.device, self.hook = data, config, seed, device, hook
        self.label, self.rank, self.world = label, rank, world
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.memory_format = self.order_of(model)
        self.teacher: Teacher | None = None
        self.loss = data.train.loss
        self.class_weights = None if data.class_weights is None else data.class_weights.to(device)
        model = self.place(copied(model))
        self.fingerprint = checkpoints.fingerprint(model, data, config, seed, label, distilled=config.distillation > 0)
        steps = data.steps_per_epoch
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
        self.between_steps = True
        self.saved_step: int | None = None  # of the checkpoint

    def connect(self) -> None:
        """Make ready what computes gradients of the model that is trained from now on."""
        self.parallel = distributed.wrap(self.state.model, self.world, self.device)
        self.gradients: Callable[..., None] = self.compute_gradients
        if self.replayable:
            self.gradients = Replayed(self.compute_gradients)

    def follow(self, network: nn.Module, memory: Path | None) -> None:
        """Learn from this network as well."""
        order = self.order_of(network)
        self.teacher = Teacher(
            self.place(copied(network), order).eval(),
            self.data,
            order=order,
            replayed=self.replayable,
            seed=self.seed,
            dtype=compute_dtype(self.config.precision, self.device),
            memory=memory if self.world == 1 else None,
        )

    def order_of(self, model: nn.Module) -> torch.memory_format:
        """Channels last where that is asked for and the network works so."""
        if not self.config.channels_last:
            return torch.contiguous_format
        return memory_order(self.place(copied(model), torch.channels_last), self.data.train.example(2))

    def place(self, model: nn.Module, order: torch.memory_format | None = None) -> nn.Module:
        """The model on the device, in the memory order (by default the one trained in) and the mode of training."""
        return model.to(self.device).to(memory_format=order or self.memory_format).train()

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
        if self.hook is not None:
            self.call_hook(self.hook)
        self.between_steps = True

    def compute_gradients(self, x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
        """The gradients of one batch, clipped, and its part of the totals. On a GPU nothing here waits for it."""
        config = self.config
        shared = SharedStatistics() if config.sync_batch_norm and self.world > 1 else contextlib.nullcontext()
        part = None if self.world == 1 else self.part(x)
        with autocast(config.precision, self.device), shared:
            try:
                if self.loss is None:
                    loss, hits = class_objective(self.parallel, x, y, target, config, self.class_weights, part)
                else:
                    teacher = None if self.teacher is None else self.teacher.frozen
                    loss, hits = own_objective(self.parallel, y, self.loss, teacher, config)
            except ValueError as error:
                raise one_value(error, self.label) from error
        with torch.no_grad():
            count = torch.full_like(loss, len(x))
            self.totals += torch.stack([loss * (count if part is None else count / part), hits, count])
        if self.device.type == "cpu":
            self.check_finite(x)
        self.state.optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.state.model.parameters(), config.clip_norm)

    def part(self, x: Tensor) -> Tensor:
        """What this process's mean over its images counts among those of all."""
        return distributed.part_of_all(torch.tensor(float(len(x)), device=self.device), self.world)

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
