"""The few calls to torch.distributed that training under torchrun needs; with one process all of them do nothing.

What is agreed on (flags, checkpoints, sums of a log) goes through gloo on the CPU, gradients through the device's own library.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rmprune.errors import ConfigError

Value = TypeVar("Value")


def processes() -> int:
    """How many processes torchrun started for this command, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_process() -> int:
    """The number of this one among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def backends() -> str:
    """What `init_process_group` is told: gloo for what lies on the CPU, NCCL for what lies on GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def check_device(device: torch.device) -> None:
    """Raises ConfigError where the processes cannot have such a device each."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes() == 1 or device.type != "cuda":
        return
    if device.index is not None:
        raise ConfigError(f"{device} is one GPU for {processes()} processes; leave the number out: each takes its own")
    if here > torch.cuda.device_count():
        raise ConfigError(f"{here} processes on {torch.cuda.device_count()} GPUs; start at most one for each GPU")


def check_batch(images: int) -> None:
    """Raises ConfigError where a batch of so many images leaves a process without any."""
    if images < processes():
        raise ConfigError(f"a batch of {images} images cannot be divided among {processes()} processes; take fewer")


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[torch.device, int, int]]:
    """(device of this process, rank, number of processes), from the environment that torchrun sets."""
    if processes() == 1:
        yield device, 0, 1
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    created = not dist.is_initialized()
    if created:
        dist.init_process_group(backends())
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        if created:
            disband()


def disband() -> None:
    """Leave the group of all processes, where there is one."""
    if dist.is_initialized():
        # torch 2.6 joins gloo's threads without letting go of the interpreter's lock, which one that still drops its last tensor waits for
        time.sleep(0.05)
        dist.destroy_process_group()


class _ByName(nn.Module):
    """A module whose parameters come in the order of their names, which processes that built it in different ways have in common.
    Its buffers, statistics of batch norms, are left to `share_state`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.named = nn.ParameterList(parameter for _, parameter in sorted(module.named_parameters()))
        self.module = module
        self._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name, _ in module.named_buffers()]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def wrap(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """The module whose forward and backward share gradients over all processes, which begin with the weights of the first."""
    if world == 1:
        return model
    share_state(model, world)
    return nn.parallel.DistributedDataParallel(
        _ByName(model), device_ids=[device.index] if device.type == "cuda" else None
    )


def share_state(model: nn.Module, world: int) -> None:
    """Give every process the weights and batch-norm statistics of the first: they see different images."""
    if world > 1:
        for _, tensor in sorted(model.state_dict().items()):
            dist.broadcast(tensor, 0)


def add_up(values: Tensor, world: int) -> Tensor:
    """The sum of `values` over all processes."""
    if world == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def part_of_all(images: Tensor, world: int) -> Tensor:
    """What a mean over this many images here is multiplied with, so that the mean over processes is that over all."""
    return world * images / add_up(images, world)


def first_says(value: Value, world: int) -> Value:
    """The value that the first process has, in all."""
    if world == 1:
        return value
    box: list[Any] = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0, device=_agreed_on())
    found: Value = box[0]
    return found


def any_says(world: int, *flags: bool) -> list[bool]:
    """For each flag whether it is up in any process."""
    if world == 1:
        return list(flags)
    up = torch.tensor(flags, dtype=torch.uint8, device=_agreed_on())
    dist.all_reduce(up, dist.ReduceOp.MAX)
    return [bool(flag) for flag in up.tolist()]


def _agreed_on() -> torch.device:
    """Where tensors lie that processes agree on: the CPU, unless a script made a group that only knows GPUs."""
    cpu = "cpu" in dist.get_backend_config()
    return torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
