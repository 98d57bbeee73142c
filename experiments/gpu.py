"""What the paper claims of GPUs, measured in one go on one: under nine minutes on an H100, without a network.

    python experiments/gpu.py                                  # all parts, into reports/gpu
    python experiments/gpu.py --parts exactness,speed          # some of them
    python experiments/gpu.py --quick --out /tmp/gpu           # all of it in miniature, on a CPU
    python experiments/gpu.py --figures reports/gpu            # figures and page of what was measured
    python experiments/gpu.py --paths                          # what nothing but a GPU runs

exactness: a dozen networks of the coverage table and their RM forms, in four number formats. speed: networks, their RM forms and the
forms of fewer MACs, in every backend. additions: the same widths with and without. training: our loop against a plain one.
accuracy: methods at equal measured time on this device. Every row is written as it is found; a part stops when its time is up, and
run.json says what it left out. Weights of what is timed are random: time does not depend on them.
"""

import contextlib
import csv
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_networks as networks
import gpu_report
import gpu_runs
import throughput
import torch
import tyro
from removal_coverage import NETS, build, randomise
from torch import Tensor, nn

import rmprune
from rmprune.config import SlimConfig
from rmprune.config.fields import Names
from rmprune.errors import RmpruneError
from rmprune.graph.equivalence import base_inputs, check_inputs, relative_error
from rmprune.graph.tf32 import tf32
from rmprune.measure.backends import GPU_ONLY, Candidate, check_backend
from rmprune.measure.latency import Configuration, measure_configuration
from rmprune.measure.machine import environment
from rmprune.pipelines.amc import run_amc
from rmprune.pipelines.slim import run_slim

SECONDS = {"exactness": 45.0, "speed": 200.0, "additions": 50.0, "training": 35.0, "accuracy": 190.0}
"""What each part may take on an H100."""
EXACT = (
    *("tv:resnet18", "tv:resnet50", "tv:mobilenet_v2", "tv:mnasnet1_0", "tv:regnet_x_400mf", "tv:regnet_y_400mf"),
    *(
        "tv:mobilenet_v3_large",
        "tv:efficientnet_b0",
        "timm:repvgg_a0",
        "timm:seresnet18",
        "timm:ghostnet_100",
        "resnet56",
    ),
)
BACKENDS = (  # the most telling first
    *("cudagraph-float16", "cudagraph-tf32", "eager-float16", "cudagraph-bfloat16", "cudagraph", "eager", "eager-tf32"),
    *(
        "eager-bfloat16",
        "tensorrt-float16",
        "tensorrt",
        "onnxruntime",
        "compile-float16",
        "eager-contiguous",
        "torchscript",
    ),
)
PATHS = {
    "rmprune.measure.latency._cuda_ms": "times by device events",
    "rmprune.measure.latency._gpu_peak_mib": "peak memory",
    "rmprune.measure.torch_backends.cuda_graph": "a network as a CUDA graph",
    "rmprune.measure.torch_backends.current": "the GPU that streams and events are of",
    "rmprune.measure.cuda_graphs": "recording and replaying, of training steps too",
    "rmprune.measure.runtimes.tensorrt": "TensorRT's provider",
    "rmprune.measure.runtimes.onnx_runtime": "inputs bound on the device",
    "rmprune.graph.tf32.tf32": "what TF32 changes",
    "rmprune.training.precision.repeatable": "deterministic kernels",
    "rmprune.training.distributed": "NCCL, with more than one",
    "rmprune.training.precision.autocast": "autocast on CUDA",
    "rmprune.training.loop._Training.save": "the GPU's random state in checkpoints",
}
"""Code that nothing but a GPU runs as a GPU does; tests stand in for the device."""


@dataclass(frozen=True)
class Settings:
    """What to measure, where, and how long at most."""

    parts: Names = tuple(SECONDS)
    """Of exactness, speed, additions, training, accuracy."""
    device: str = "auto"
    """cuda, cuda:N or cpu; auto takes the GPU where there is one."""
    quick: bool = False
    """Everything in miniature."""
    seed: int = 0
    """The first of accuracy's seeds."""
    seeds: int = 5
    """How many of them; with each, all methods."""
    scale: float = 1.0
    """Times the seconds that each part may take."""
    data_dir: Path | None = None
    """Where Fashion-MNIST's files lie, if not where Debian puts them."""
    out: Path = Path("reports/gpu")
    """Where CSV and figures go."""
    runs: Path = Path("runs/gpu")
    """Where accuracy's runs are kept."""
    networks: Path | None = None
    """Where --write-networks left the forms that speed measures; else they are made now (a minute or two)."""
    write_networks: bool = False
    """Write them there, and measure nothing."""
    figures: Path | None = None
    """Draw what lies there, and measure nothing."""
    paths: bool = False
    """Print what nothing but a GPU runs."""


@dataclass
class Part:
    """One part at work: its rows go to a CSV at once, and it has time until `end`."""

    settings: Settings
    name: str
    end: float
    left_out: list[str]
    columns: list[str] | None = None

    @property
    def device(self) -> str:
        return self.settings.device

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def write(self, **row: Any) -> None:
        """Add a row; the first gives the columns."""
        path = self.settings.out / f"{self.name}.csv"
        row = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        first, self.columns = self.columns is None, self.columns or list(row)
        with path.open("w" if first else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if first:
                writer.writeheader()
            writer.writerow(row)

    @contextlib.contextmanager
    def trying(self, what: str, seconds: float = 0.0) -> Iterator[bool]:
        """Yields whether there is time left for it; what fails, or is not begun, is noted, and the next comes."""
        if not (begun := self.left > seconds):
            self.left_out.append(f"{self.name}, {what}: no time was left")
        try:
            yield begun
        except (RmpruneError, RuntimeError) as error:
            self.left_out.append(f"{self.name}, {what}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            print(self.left_out[-1], flush=True)
            if self.device != "cpu":
                torch.cuda.empty_cache()


# ---------------------------------------------------------------- parts


def exactness(part: Part) -> None:
    """Outputs of the RM form on the device against the original's in float64, and the original's own in the same number format."""
    by_row = {net.row: net for net in NETS}
    size = 32 if part.settings.quick else 64
    for row in EXACT[2:3] if part.settings.quick else EXACT:
        with part.trying(row) as begun:
            if not begun:
                continue
            torch.manual_seed(0)
            model, x = build(by_row[row]), torch.randn(2, 3, size, size)
            randomise(model, torch.randn(4, 3, size, size), 0)
            wide = model.to(part.device).double()
            removal = rmprune.remove_residuals(wide, x.to(part.device).double())
            inputs, groups = check_inputs((x,), 2, 3)
            expected, other = (
                computed(wide, (y,), torch.float64, part.device) for y in (inputs[0], base_inputs((x,))[0])
            )
            for name, dtype, rounded in networks.FORMATS:
                with tf32(rounded, part.device):
                    own, plain = (
                        relative_error(expected, computed(net, inputs, dtype, part.device), groups, other)
                        for net in (wide, removal.model)
                    )
                part.write(
                    network=row,
                    removed=len(removal.removed),
                    kept=len(removal.kept),
                    number_format=name,
                    error=plain,
                    original_error=own,
                    device=part.device,
                )


@torch.no_grad()
def computed(net: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> Tensor:
    """What a copy in this number format gives, image by image."""
    twin = rmprune.graph.equivalence.eval_copy(net, lambda copied: copied.to(device, dtype))
    return torch.cat([twin(x.to(device, dtype)).cpu() for x in inputs[0].split(1)])


def speed(part: Part) -> None:
    """Times of every family's forms, configuration by configuration, and the speed-up that its MACs promise."""
    names = ("mobilenet_v2",) if part.settings.quick else networks.FAMILIES
    families = {}
    for name in names:
        with part.trying(name):
            families[name] = networks.forms_in(part.settings.networks, name, quick=part.settings.quick)
            print(f"{name}: {', '.join(families[name])}", flush=True)
    measured(part, families, reference="original")


def additions(part: Part) -> None:
    """Times of networks with identity shortcuts and of the same layers without the additions."""
    families = {}
    for name in ("resnet18",) if part.settings.quick else networks.WITH_ADDITIONS:
        with part.trying(name):
            families[name] = networks.with_and_without(name, quick=part.settings.quick)
    measured(part, families, reference="without")


def measured(part: Part, families: dict[str, dict[str, nn.Module]], reference: str) -> None:
    """One row for each network and configuration, all of a family in turns."""
    quick, size = part.settings.quick, 32 if part.settings.quick else 224
    x = torch.randn(1, 3, size, size)
    candidates = {
        name: {form: Candidate(f"{name} {form}", net, x) for form, net in forms.items()}
        for name, forms in families.items()
    }
    macs = {(n, f): rmprune.count_macs(net, x) for n, forms in families.items() for f, net in forms.items()}
    usual = ("eager",) if quick else BACKENDS
    for backend, batch in [(backend, batch) for backend in usual for batch in ((1,) if quick else (32, 256, 1))]:
        for name, forms in candidates.items():
            with part.trying(f"{name} on {backend}, batch {batch}", 5.0) as begun:
                if not begun:
                    continue
                check_backend(backend, part.device)
                place = Configuration(backend, part.device, torch.get_num_threads(), batch)
                times = measure_configuration(forms, place, 0.02 if quick else 0.1, 3 if quick else 9, seed=0)
                for form, own in times.items():
                    latency, whole = own.relative_to(times[reference]), macs[name, reference]
                    part.write(
                        network=name,
                        form=form,
                        macs=macs[name, form],
                        backend=backend,
                        number_format=latency.number_format,
                        batch_size=batch,
                        images_per_second=latency.images_per_second,
                        speed_up=1 / (latency.ratio or 1.0),
                        speed_up_low=1 / (latency.ratio_high or 1.0),
                        speed_up_high=1 / (latency.ratio_low or 1.0),
                        macs_reduction=whole / macs[name, form],
                        realised=macs[name, form] / whole / (latency.ratio or 1.0),
                        median_ms=latency.median_ms,
                        q1_ms=latency.q1_ms,
                        q3_ms=latency.q3_ms,
                        rounds=latency.rounds,
                        peak_mib=latency.peak_mib,
                        first_ms=latency.first_ms,
                        device=part.device,
                    )


def training(part: Part) -> None:
    """Images per second of our loop and of plain ones, whose DataLoader works in the process or in eight others."""
    quick = part.settings.quick
    asked = throughput.Settings(
        steps=2 if quick else 100,
        warmup=1 if quick else 20,
        threads=torch.get_num_threads(),
        width=8 if quick else 32,
        device=part.device,
        dataset="digits" if quick else "fashion-mnist",
        data_dir=part.settings.data_dir,
    )
    for turn in range(1 if quick else 3):
        for loop, workers in (("rmprune", 0), ("plain", 0), *([] if quick else [("plain", 8)])):
            with part.trying(f"{loop}, {workers} workers, turn {turn + 1}", 5.0) as begun:
                if begun:
                    rate = throughput.rate(loop, dataclasses.replace(asked, workers=workers))
                    part.write(loop=loop, workers=workers, turn=turn, images_per_second=rate, device=part.device)


def accuracy(part: Part) -> None:
    """Methods within the same measured time on this device, seed by seed: `slim` and `amc`, whose records hold the rest."""
    settings = part.settings
    seeds = range(settings.seed, settings.seed + settings.seeds)
    runs = gpu_runs.planned(part.device, seeds, settings.data_dir, settings.runs, quick=settings.quick)
    for comparison, seed, config, seconds in runs:
        with part.trying(f"{comparison}, seed {seed}", seconds) as begun:
            if begun:
                run = run_slim if isinstance(config, SlimConfig) else run_amc
                keep(part, run(config, command=command()), comparison, seed)


def keep(part: Part, records: list[Path], comparison: str, seed: int) -> None:
    """The rows of a finished run."""
    for path in records:
        record = json.loads(path.read_text())
        whole = record["original"]
        for method, found in record.items():
            if isinstance(found, dict) and "latency" in found:
                latency = found["latency"][0]
                part.write(
                    comparison=comparison,
                    network=record["model"],
                    method=found.get("method", method),
                    seed=seed,
                    accuracy=found["accuracy"],
                    time_ratio=latency["ratio"],
                    images_per_second=latency["batch_size"] / latency["median_ms"] * 1e3,
                    macs_ratio=found["macs"] / whole["macs"],
                    backend=latency["backend"],
                    batch_size=latency["batch_size"],
                    device=latency["device"],
                )


PARTS: dict[str, Callable[[Part], None]] = {f.__name__: f for f in (exactness, speed, additions, training, accuracy)}


def command() -> str:
    return shlex.join(["python", *sys.argv])


def main(settings: Settings) -> None:
    if settings.paths:
        print("backends:", ", ".join(GPU_ONLY), *(f"{path}: {what}" for path, what in PATHS.items()), sep="\n")
        return
    if settings.write_networks:
        networks.write(settings.networks or Path("gpu-kit/networks"))
        return
    if settings.figures is not None:
        print(*gpu_report.draw(settings.figures), sep="\n")
        return
    if unknown := [name for name in settings.parts if name not in PARTS]:
        raise SystemExit(f"unknown parts {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    if device == "cpu" and not settings.quick:
        raise SystemExit("there is no GPU here; --quick runs everything in miniature on the CPU")
    settings = dataclasses.replace(settings, device=device)
    settings.out.mkdir(parents=True, exist_ok=True)
    left_out: list[str] = []
    took: dict[str, float] = {}
    for name in settings.parts:
        start = time.monotonic()
        PARTS[name](Part(settings, name, start + SECONDS[name] * settings.scale, left_out))
        took[name] = round(time.monotonic() - start, 1)
        print(f"{name}: {took[name]} s", flush=True)
        facts = {"command": command(), "quick": settings.quick, "seconds": took, "left_out": left_out}
        (settings.out / f"run-{'-'.join(settings.parts)}.json").write_text(
            json.dumps(facts | {"environment": environment()}, indent=1)
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
