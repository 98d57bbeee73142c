"""Several processes of one command, as torchrun would start them, but forked: none of them imports torch anew."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from forked_workers import import_before_forks


def on_processes(work: Callable[[int], object], said: Path, world: int = 2) -> list[int]:
    """The exit status of each process that does `work(rank)`, -N where signal N ended it; what rank N says goes to `said`/N.txt."""
    import_before_forks()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own process has it
    shared = {"MASTER_PORT": str(store.port), "WORLD_SIZE": str(world), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said.mkdir(parents=True, exist_ok=True)
    running = [_start(work, rank, said, shared) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]


def _start(work: Callable[[int], object], rank: int, said: Path, shared: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        out = os.open(said / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ |= shared | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        work(rank)
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
