"""How time is measured."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from rmprune.config.fields import Names, Numbers, Settings, require, require_inside

MOST_THREADS = 1024
"""More than cores there are: thousands are started one by one and take turns for minutes."""


@dataclass(frozen=True)
class MeasureConfig(Settings):
    """How the time of networks is measured: every combination of backend, threads and batch size."""

    backends: Annotated[Names, tyro.conf.arg(name="backend")] = ("onnxruntime", "eager")
    """Runtimes: eager, onnxruntime, openvino, torchscript, compile, onnxruntime-int8, ...; `python -m rmprune doctor` lists those that
    work here."""
    threads: Numbers = (1,)
    """Threads of the runtime."""
    batch_sizes: Annotated[Numbers, tyro.conf.arg(name="batch-size")] = (1, 32)
    """Images in a batch; times are for the whole batch."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    seconds: float = 2.0
    """Time spent on each network and combination."""
    min_rounds: int = 15
    """Rounds at least, whatever the time budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("backends", "threads", "batch_sizes"):
            require(len(getattr(self, name)) > 0, f"{name} is empty; give at least one")
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))  # each is measured once
        require(
            min(self.threads) >= 1 and max(self.threads) <= MOST_THREADS,
            f"threads is {self.threads}; each must be at least 1 and at most {MOST_THREADS}",
        )
        require(min(self.batch_sizes) >= 1, f"batch_sizes is {self.batch_sizes}; each must be at least 1")
        require_inside(self, "[0, inf)", "seconds")
        require_inside(self, "[1, inf)", "min_rounds")

    def require_judge(self) -> None:
        """Raise ConfigError where the first backend, on which searches and budgets count time, is int8: they measure untrained networks."""
        require(
            not self.backends[0].endswith("-int8"),
            f"time is counted on the first backend, {self.backends[0]}, and networks on the way have no int8 form; name another first, "
            f"as in --measure.backend onnxruntime,{self.backends[0]}",
        )


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """What to look at; nothing is written."""

    backends: Annotated[Names, tyro.conf.arg(name="backend")] = ()
    """Backends to try (default: all)."""
    seconds: float = 2.0
    """Time spent on finding out whether the machine is quiet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(self, "[0, inf)", "seconds")
