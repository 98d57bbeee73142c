"""Predicted time of a network: a table of measured times per layer shape, filled on demand and kept on disk. latency.py
measures networks.

The model. Every layer (convolution with the addition and activation that runtimes fuse into it, linear layer, pooling)
is measured alone, so its time holds the runtime's own overhead once; the overhead (an almost empty network) is taken
off each layer and added once for the whole. What alone and inside a network still differ in is fitted on whole
networks: time = a * sum(layers) + b * number of layers + c (`calibrate`; a = 1, b = c = 0 before).

Widths between measured ones are interpolated linearly in both widths, among widths with the same divisor of 8 (kernels
treat multiples of 8, 4, 2 and odd widths differently), at most 8 apart up to 128 channels. Depthwise layers and those
without weights have one width. Check it with `calibrate(..., unseen=...)` before relying on it; budgets are verified on
the whole network by measuring.
"""

import itertools
import json
import logging
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rmprune.errors import ArtifactError
from rmprune.measure.backends import BACKENDS, backend_named, prepare, surroundings
from rmprune.measure.candidate import Candidate
from rmprune.measure.latency import Configuration, measure_at
from rmprune.measure.layers import TimedLayer, neighbours, network_layers
from rmprune.measure.machine import environment
from rmprune.measure.rounds import quiet_process, timed_rounds
from rmprune.runs.progress import progress
from rmprune.runs.reading import read_json
from rmprune.runs.writing import write_text

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is made: it takes 0.2 s

logger = logging.getLogger("rmprune.measure")
SCHEMA = 1
_PULL = 0.3
_PASSES = 2
_TURN_SECONDS = 0.002
_AT_ONCE = 24  # layers measured in turns with each other
_QUARTILE = 0.25
TIMED: dict[str, Any] = {
    "way": 2,  # another number where `timed_rounds` comes to count other runs; 2: as many go uncounted in a turn as count
    "passes": _PASSES,
    "turn_seconds": _TURN_SECONDS,
    "at_once": _AT_ONCE,
    "quantile": _QUARTILE,
}
"""How layers are timed: times that were taken in another way are not mixed with these."""


class LatencyModel:
    """Times of layers under one configuration; grows as it is asked. Times are milliseconds for a whole batch.

    `cache`: a JSON file that is read now and written after every measurement; None keeps the table in memory. A file
    measured on another processor, or with other versions or settings, is an error (ArtifactError), not mixed in; one whose layers were
    timed in another way (TIMED) is kept as NAME.before.json, which the log says, and measured anew.
    """

    def __init__(
        self,
        backend: str = "onnxruntime",
        *,
        threads: int = 2,
        batch_size: int = 1,
        device: str = "cpu",
        cache: str | os.PathLike[str] | None = None,
        seconds: float = 0.02,
        min_rounds: int = 7,
    ) -> None:
        backend_named(backend)
        self.backend, self.threads, self.batch_size, self.device = backend, threads, batch_size, device
        self.seconds, self.min_rounds = seconds, min_rounds
        self.cache = None if cache is None else Path(cache)
        self.table: dict[TimedLayer, float] = {}
        self.overhead: float | None = None
        self.fit: tuple[float, float] = (1.0, 0.0)
        self.block = 16 if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
        if self.cache is not None and self.cache.exists():
            self._read(self.cache)

    def predict(self, model: nn.Module, example_inputs: Tensor) -> float:
        """Predicted milliseconds for `batch_size` images of `example_inputs`' size; measures layers that are not known yet."""
        return self.predict_layers(network_layers(model, example_inputs))

    def predict_layers(self, layers: Iterable[TimedLayer]) -> float:
        """As `predict`, for layers from `network_layers`, whose widths a search may have changed (`layer._replace(cout=24)`)."""
        layers = list(layers)
        self.require(layers)
        a, b = self.fit
        return max(a * sum(map(self.layer_ms, layers)) + b * len(layers) + (self.overhead or 0.0), 1e-6)

    def layer_ms(self, layer: TimedLayer) -> float:
        """Milliseconds of one layer inside a network, interpolated where its widths were not measured themselves."""
        self.require([layer])
        points = [(weight, self.table[point]) for point, weight in _corners(layer, self.block) if weight > 0]
        return max(sum(weight * ms for weight, ms in points) - (self.overhead or 0.0), 0.0)

    def require(self, layers: Iterable[TimedLayer]) -> None:
        """Measures what `layers` need and the table lacks, in turns, and writes the cache."""
        needed = dict.fromkeys(
            p for layer in layers for p, weight in _corners(layer, self.block) if weight > 0 and p not in self.table
        )
        missing = list(needed)
        if self.overhead is None:
            self.overhead = self._measure([_EMPTY])[0]
        if not missing:
            return
        order, found = random.Random(0), dict.fromkeys(missing, math.inf)
        parts: list[list[TimedLayer]] = []
        for _ in range(_PASSES):  # apart in time and in other company: a burst of load hits one of them
            order.shuffle(missing)
            parts += (missing[start : start + _AT_ONCE] for start in range(0, len(missing), _AT_ONCE))
        label = f"timing {len(missing)} layer shapes one by one on {self.backend}"
        with progress(label, len(parts), timed=True) as advance:
            for part in parts:
                for layer, ms in zip(part, self._measure(part), strict=True):
                    found[layer] = min(found[layer], ms)
                advance(1)
        self.table |= found
        if self.cache is not None:
            self._write(self.cache)

    def calibrate(
        self,
        models: dict[str, nn.Module],
        example_inputs: Tensor,
        *,
        unseen: dict[str, nn.Module] | None = None,
        seconds: float = 1.0,
    ) -> "pd.DataFrame":
        """Fits a and b on whole networks (three or more, of different cost); returns predicted against measured time of
        each: columns model, predicted_ms, measured_ms, error (relative).

        Least absolute relative errors (one network measured badly must not bend the fit), with a mild pull to a = 1, b
        = 0. `unseen`: networks that are not fitted to; they and their layers are measured in turns with the others,
        so that a machine that drifts drifts for all. They follow in the table.
        """
        import pandas as pd

        everything = {**models, **(unseen or {})}
        layers = {name: network_layers(model, example_inputs) for name, model in everything.items()}
        self.require(itertools.chain.from_iterable(layers.values()))
        measured = self._measure_networks(everything, example_inputs, seconds)
        rows, targets = [], []
        for name in models:
            rows.append(np.array([sum(map(self.layer_ms, layers[name])), len(layers[name])]) / measured[name])
            targets.append(1 - (self.overhead or 0.0) / measured[name])
        self.fit = _fit(np.array(rows), np.array(targets))
        if self.cache is not None:
            self._write(self.cache)
        found = [(name, self.predict_layers(layers[name]), measured[name]) for name in everything]
        table = pd.DataFrame(found, columns=["model", "predicted_ms", "measured_ms"])
        return table.assign(error=table.predicted_ms / table.measured_ms - 1)

    def _measure_networks(self, models: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
        place = Configuration(self.backend, self.device, self.threads, self.batch_size)
        return {n: time.median_ms for n, time in measure_at(place, models, x, seconds=seconds, sittings=1).items()}

    def _measure(self, layers: list[TimedLayer]) -> list[float]:
        """Milliseconds of layers alone, measured in turns: the first quartile, which a burst of other load hardly moves."""
        runs = {}
        with quiet_process(self.threads), surroundings(self.backend, self.device), torch.inference_mode():
            for layer in layers:
                module, x = layer.build(self.batch_size)
                candidate = Candidate(str(layer), module, x)
                runs[str(layer)] = prepare(candidate, self.backend, self.device, self.threads, self.batch_size)
            rounds = timed_rounds(
                runs, self.device, self.seconds, self.min_rounds, random.Random(0), warmup=0.01, turn=_TURN_SECONDS
            )  # fmt: skip
        return [float(np.quantile(rounds.turns[str(layer)], _QUARTILE)) for layer in layers]

    def _settings(self) -> dict[str, Any]:
        here = environment()
        package = next(iter(BACKENDS[self.backend].packages), "torch")
        return {
            "schema": SCHEMA,
            "backend": self.backend,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "processor": here["processor"],
            "instructions": here["instructions"],
            "gpu": None if self.device == "cpu" else torch.cuda.get_device_name(self.device),
            "version": f"{package} {here['versions'].get(package)}",
        }

    def _write(self, path: Path) -> None:
        content = self._settings() | {
            "timed": TIMED,
            "overhead_ms": self.overhead,
            "fit": self.fit,
            "layers": [[*layer, ms] for layer, ms in self.table.items()],
        }
        write_text(path, json.dumps(content, indent=0))

    def _read(self, path: Path) -> None:
        content = read_json(path, missing="there is no such file", damaged="delete it to measure again")
        try:
            table = {TimedLayer(str(kind), int(cin), int(cout)): float(ms) for kind, cin, cout, ms in content["layers"]}
            a, b = map(float, content["fit"])
            overhead = float(content["overhead_ms"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ArtifactError(f"{path}: not a latency table, or damaged; delete it to measure again") from error
        for name, value in self._settings().items():
            if content.get(name) != value:
                raise ArtifactError(
                    f"{path}: measured with {name} {content.get(name)!r}, here it is {value!r}; delete it, or name "
                    "another file"
                )
        if content.get("timed") != TIMED:
            aside = path.with_suffix(".before.json")
            # Not moved: another process may have put its new table there. The first times of this one replace it.
            write_text(aside, json.dumps(content, indent=0))
            logger.warning("%s: its layers were timed in another way; kept as %s, measured anew", path, aside.name)
            return
        self.table, self.fit, self.overhead = table, (a, b), overhead


def _fit(rows: Any, targets: Any) -> tuple[float, float]:
    """a and b, none below 0, with rows @ (a, b) near targets in absolute error, by least squares with weights renewed ten times.

    A negative b would let narrow networks take less than no time, and a search has sizes by these times.
    """
    from scipy.optimize import nnls  # imported where it is used: it takes 0.2 s

    pull = _PULL * np.diag(np.abs(rows).mean(axis=0))
    matrix, target = np.vstack([rows, pull]), np.append(targets, [pull[0, 0], 0.0])
    solution, weights = np.array([1.0, 0.0]), np.ones(len(targets))
    for _ in range(10):
        scale = np.append(np.sqrt(weights), [1.0, 1.0])
        solution = nnls(matrix * scale[:, None], target * scale)[0]
        weights = 0.05 / np.maximum(np.abs(rows @ solution - targets), 0.05)
    return float(solution[0]), float(solution[1])


_EMPTY = TimedLayer(
    '{"activation": null, "add": false, "args": {"inplace": false}, "size": [1, 1], "type": "ReLU"}', 1, 1
)


def _corners(layer: TimedLayer, block: int) -> list[tuple[TimedLayer, float]]:
    """The measured layers around `layer` and their weights in a bilinear interpolation."""
    kind = json.loads(layer.kind)
    groups = kind["args"].get("groups", 1)
    if groups not in (1, "depthwise"):
        return [(layer, 1.0)]
    if groups == "depthwise" or kind["type"] not in ("Conv2d", "Linear"):
        return [(TimedLayer(layer.kind, w, w), weight) for w, weight in _between(layer.cin, block)]
    return [
        (TimedLayer(layer.kind, cin, cout), u * v)
        for cin, u in _between(layer.cin, block)
        for cout, v in _between(layer.cout, block)
    ]


def _between(width: int, block: int) -> list[tuple[int, float]]:
    low, high = neighbours(width, block)
    share = (width - low) / (high - low) if high > low else 0.0
    return [(low, 1 - share), (high, share)]
