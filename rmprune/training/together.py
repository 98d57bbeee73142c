"""One command on several processes that torchrun started: the first does all of it, the others take part in its trainings.

What is read, refused, searched, measured and written happens once, in the first process, so nothing can differ between them. The
others wait for its orders, each of which is one training, and end when it does. Nothing here trains: `fit` does.
"""

import contextlib
import functools
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from rmprune.config import DataConfig, SparsityConfig, TrainConfig
from rmprune.data.batches import to_device
from rmprune.data.load import Dataset, load_dataset
from rmprune.data.splits import IMAGENET_STATISTICS, Statistics
from rmprune.errors import LOADER_KILLED, ConfigError, DataError, RmpruneError, loader_killed
from rmprune.training import checkpoint as checkpoints
from rmprune.training.distributed import any_says, backends, disband, first_says, processes, this_process
from rmprune.training.loop import fit
from rmprune.training.optimizer import make_optimizer
from rmprune.training.precision import repeatable
from rmprune.training.sparsity import ProximalL1
from rmprune.training.state import Hook, TrainState

PATIENCE = 10.0  # seconds that processes wait for each other's last words
GO_ON = "what was done is saved: the same command goes on from there, with any number of processes"
_LOOK = 0.05  # seconds between two looks for an order
_CPU = torch.device("cpu")
_LOST = ("gloo", "NCCL", "Connection", "TCPStore")  # what torch says of a process that is gone

Packed = tuple[str, dict[str, Any]]


def pack(model: nn.Module) -> Packed:
    """A network as text and tensors on the CPU, by which another process builds it."""
    return checkpoints.architecture_of(model), to_device(checkpoints.constants_of(model) | model.state_dict(), _CPU)


@dataclass(frozen=True)
class Order:
    """What another process needs to take part in a training: all that `fit` is given but files. `images`: in the training split;
    `led`: the first process has a hook that puts smaller networks in place, and sends them."""

    network: Packed
    teacher: Packed | None
    train: TrainConfig
    data: DataConfig
    statistics: Statistics | None
    images: int
    seed: int
    device: str
    label: str
    sparsity: SparsityConfig | None
    led: bool
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)


class _Left(Exception):
    """The first process has given this training up."""


class _Leading:
    """A hook that works in the first process alone; what it puts in place goes to the others."""

    def __init__(self, hook: Hook) -> None:
        self.hook, self.gave_up = hook, False

    def __call__(self, state: TrainState) -> None:
        model = state.model
        try:
            self.hook(state)
        except BaseException:  # a budget that cannot be met ends this training, not the run
            any_says(processes(), False, True)
            self.gave_up = True
            raise
        changed = state.model is not model
        any_says(processes(), changed, False)
        if changed:
            memory = checkpoints.optimizer_state(state.optimizer, state.model)
            first_says((pack(state.model), to_device(memory, _CPU)), processes())

    def state_dict(self) -> Any:
        own = getattr(self.hook, "state_dict", None)
        return None if own is None else own()

    def load_state_dict(self, saved: Any) -> None:
        self.hook.load_state_dict(saved)  # type: ignore[attr-defined]


class _Following:
    """The hook of the others: takes what the first process puts in place."""

    def __call__(self, state: TrainState) -> None:
        changed, left = any_says(processes(), False, False)
        if left:
            raise _Left
        if changed:
            sent: Any = first_says(None, processes())
            network, memory = sent
            device = next(state.model.parameters()).device
            state.model = checkpoints.rebuild(*network).to(device)
            state.optimizer = make_optimizer(state.model, state.config)
            checkpoints.restore_optimizer(state.optimizer, state.model, memory)

    def load_state_dict(self, saved: Any) -> None:
        """Nothing: what the checkpoint holds is the first process's."""


class Team:
    """The processes of this command, and the store of torchrun in which they leave each other words."""

    def __init__(self) -> None:
        try:
            self.rank, self.world = this_process(), processes()
            self.store = next(dist.rendezvous("env://"))[0]
        except ValueError as error:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE'][:40]!r} without what torchrun sets beside it ({error}); unset it, or use torchrun"
            ) from None
        self.orders = 0
        self.stuck = False  # whether the others wait in a training that has failed here

    @contextlib.contextmanager
    def training(self, order: Order, hook: object) -> Iterator[None]:
        """In the first process: all others take part in the training within, until it ends or its hook gives it up."""
        if self.stuck:
            raise RmpruneError(f"{order.label}: the training before this one failed; {GO_ON}")
        self.store.set(self._next, "train")
        self.orders += 1
        self._join()
        first_says(order, self.world)
        self.stuck = True
        try:
            yield
            self.stuck = False
        finally:
            self.stuck = self.stuck and not getattr(hook, "gave_up", False)

    def serve(self) -> None:
        """In the others: take part until the first process ends."""
        while self._wait():
            self.orders += 1
            self._join()
            with contextlib.suppress(_Left):
                take_part(first_says(None, self.world))  # type: ignore[arg-type]

    def end(self) -> None:
        """In the first process: send the others home, those too that wait for it in a training."""
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self.store.set(self._next, "end")
            disband()

    def ended(self) -> bool:
        """Whether the first process is at its end, or gone."""
        try:
            return any(
                self.store.check([key]) and self.store.get(key) == b"end"
                for key in (self._next, f"order {self.orders - 1}")
            )
        except RuntimeError:
            return True

    def leave(self, error: BaseException) -> NoReturn:
        """In the others, after an error: say it once, so that the first process says it for all, and go."""
        said, stopped = str(error) or type(error).__name__, isinstance(error, KeyboardInterrupt)
        if not stopped and not _is_loss(error):
            self.store.set("failure", f"process {self.rank}: {said.splitlines()[0]}")
            if not isinstance(error, RmpruneError | OSError):
                traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)  # they hold what is connected to the others
        gc.collect()
        disband()  # the others notice
        waited_until(self.ended)
        sys.exit(130 if stopped else 2)

    def explained(self, error: RuntimeError) -> Exception:
        """What the first process says of an error while all train: what another said, or that it was lost, or this one."""
        if not _is_loss(error):
            return error
        with contextlib.suppress(RuntimeError):
            if waited_until(lambda: self.store.check(["failure"]), PATIENCE / 5):
                return RmpruneError(self.store.get("failure").decode())
        return RmpruneError(f"another process of this run was lost; {GO_ON}")

    @property
    def _next(self) -> str:
        return f"order {self.orders}"

    def _wait(self) -> bool:
        """Whether there is another training."""
        try:
            while not self.store.check([self._next]):
                time.sleep(_LOOK)
            return bool(self.store.get(self._next) == b"train")
        except RuntimeError:  # the store is gone
            return False

    def _join(self) -> None:
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            store = dist.PrefixStore("trainings", self.store)
            dist.init_process_group(backends(), store=store, rank=self.rank, world_size=self.world)


_TEAM: ContextVar[Team | None] = ContextVar("team", default=None)


@contextlib.contextmanager
def together() -> Iterator[bool]:
    """Yields whether this process is the first, which does the command; in the others once they have nothing more to do.

    Raises in the first process what stopped any, and KeyboardInterrupt where torchrun ends it.
    """
    team = Team()
    if team.rank > 0:
        logging.getLogger("rmprune").setLevel(logging.ERROR)
        try:
            team.serve()
        except BaseException as error:
            team.leave(DataError(LOADER_KILLED).with_traceback(error.__traceback__) if loader_killed(error) else error)
        yield False
        return
    signal.signal(signal.SIGTERM, _told_to_end)
    token = _TEAM.set(team)
    try:
        yield True
    except RuntimeError as error:
        raise team.explained(error) from error
    finally:
        _TEAM.reset(token)
        team.end()


def fit_together(model: nn.Module, data: Dataset, config: TrainConfig, **settings: Any) -> nn.Module:
    """`fit`, in which the other processes of this command take part where there are any."""
    team, hook = _TEAM.get(), settings["hook"]
    if team is None:
        return fit(model, data, config, **settings)
    sparse = hook.config if isinstance(hook, ProximalL1) else None
    led = hook is not None and sparse is None
    teacher = settings["teacher"] if config.distillation else None
    order = Order(
        pack(model), None if teacher is None else pack(teacher), config, data.config, data.statistics, len(data.train),
        settings["seed"], str(settings["device"]), settings["label"], sparse, led,
    )  # fmt: skip
    hook = _Leading(hook) if led else hook
    with team.training(order, hook):
        return fit(model, data, config, **settings | {"hook": hook})


def take_part(order: Order) -> None:
    """Train as the order says, beside the other processes; writes and returns nothing. Raises DataError where the images are others."""
    data = _opened(order.data, order.statistics or IMAGENET_STATISTICS)
    if len(data.train) != order.images:
        raise DataError(f"{len(data.train)} training images of {data.name} here, {order.images} in process 0")
    device = torch.device(order.device)
    with repeatable(order.deterministic, device):
        fit(
            checkpoints.rebuild(*order.network), data, order.train, seed=order.seed, device=device,
            hook=ProximalL1(order.sparsity) if order.sparsity else _Following() if order.led else None,
            teacher=None if order.teacher is None else checkpoints.rebuild(*order.teacher), progress=False,
            label=order.label,
        )  # fmt: skip


_opened = functools.lru_cache(1)(load_dataset)


def waited_until(done: Any, seconds: float = PATIENCE) -> bool:
    """Whether it came to pass within so many seconds."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def _told_to_end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"torchrun ends it, as another process was lost; {GO_ON.split(':')[0]}")
