"""Workers as submitit has them, but forked, which saves each the start of an interpreter."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_before_forks() -> None:
    """What commands import once they run, and each forked one would anew; the digits, which it would read."""
    for name in (
        "onnxruntime.quantization",
        "sklearn.metrics",
        "tyro._backends",
        "rmprune.cli",
        "rmprune.report.build",
    ):
        importlib.import_module(name)
    for name in ("grid", "slim", "train"):
        importlib.import_module(f"rmprune.pipelines.{name}")
    importlib.import_module("rmprune.data.sources").read_digits(None)


class Forked:
    """`done`, `result`, `cancel`. It leaves its result in a file, or none, and outlives the process that started it."""

    def __init__(self, said: Path, function: Callable[..., object], *arguments: Any) -> None:
        self.said, self.ended = said, False
        self.pid = os.fork()
        if self.pid == 0:
            os.closerange(3, 1024)  # locks among them, as in a new program
            try:
                said.write_text(json.dumps(function(*arguments)))
            finally:
                os._exit(0)

    def done(self) -> bool:
        self.ended = self.ended or os.waitpid(self.pid, os.WNOHANG)[0] != 0
        return self.ended

    def result(self) -> Any:
        return json.loads(self.said.read_text())

    def cancel(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
