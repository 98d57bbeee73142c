"""The few calls to torch.distributed that training under torchrun needs; with one process all of them do nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[torch.device, int, int]]:
    """(device of this process, rank, number of processes), from the environment that torchrun sets."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device, 0, 1
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    created = not dist.is_initialized()
    if created:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        if created:
            dist.destroy_process_group()


def wrap(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """The module whose forward and backward share gradients over all processes."""
    if world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def share_buffers(model: nn.Module, world: int) -> None:
    """Give every process the batch-norm statistics of the first: they see different images."""
    if world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def add_up(values: Tensor, world: int) -> Tensor:
    """The sum of `values` over all processes."""
    if world == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total
