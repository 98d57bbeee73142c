"""Several processes train like one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from training_nets import fit_without_batch_norms, records

_SCRIPT = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from pathlib import Path
from training_nets import fit_without_batch_norms
trained = fit_without_batch_norms(Path({out!r}))
torch.save(trained.state_dict(), os.path.join({out!r}, "rank" + os.environ["RANK"] + ".pt"))
"""


def test_two_processes_train_like_one(tmp_path: Path):
    alone = tmp_path / "alone"
    expected = fit_without_batch_norms(alone).state_dict()
    tests = Path(__file__).parents[1]
    code = _SCRIPT.format(tests=str(tests), root=str(tests.parent), out=str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=shared | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, atol=1e-5, rtol=1e-4)
    facts = ("epoch", "train_accuracy", "validation_accuracy")
    both = zip(records(alone / "log.jsonl"), records(tmp_path / "log.jsonl"), strict=True)
    assert all([a[key] for key in facts] == [b[key] for key in facts] for a, b in both)
