"""What the paper claims of GPUs, measured in one go on one, without a network: every part is stopped when its time is up, all
parts of a kit before nine minutes.

    python experiments/gpu.py                                  # the parts of the kit "fashion", into reports/gpu
    python experiments/gpu.py --parts solar --solar-dir DIR    # that of the kit "solar" (experiments/gpu.sh)
    python experiments/gpu.py --parts exactness,speed          # some of them; what reports/gpu holds of this card is not done again
    python experiments/gpu.py --quick --out /tmp/gpu           # all of it in miniature, on a CPU
    python experiments/gpu.py --figures reports/gpu            # figures and page of what was measured
    python experiments/gpu.py --paths                          # what nothing but a GPU runs

exactness: a dozen networks of the coverage table and their RM forms, in five number formats. speed: networks, their RM forms and the
forms of fewer MACs, in every backend. additions: the same widths with and without. training: our loop against a plain one.
accuracy, solar: methods at equal measured time on this device, on Fashion-MNIST and on photos. Every row is written as it is found, and
run-PARTS.json says what was left out. Weights of what is timed are random: time does not depend on them.
"""

import dataclasses
import functools
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import gpu_networks as networks
import gpu_report
import gpu_runs
import pandas as pd
import throughput
import torch
import tyro
from gpu_part import Part
from removal_coverage import NETS, build, randomise
from torch import Tensor, nn

import rmprune
from rmprune.config import SlimConfig
from rmprune.config.fields import Names
from rmprune.graph.relative_error import comparison_base, comparison_inputs, relative_error
from rmprune.graph.tf32 import tf32
from rmprune.measure.backends import GPU_ONLY, check_backend
from rmprune.measure.candidate import Candidate
from rmprune.measure.latency import Configuration, measure_configuration
from rmprune.measure.machine import environment
from rmprune.measure.results import Latency
from rmprune.methods import auto
from rmprune.pipelines.amc import run_amc
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import time_cost

SECONDS = {"exactness": 40.0, "speed": 160.0, "additions": 30.0, "training": 25.0, "accuracy": 270.0, "solar": 500.0}
"""After which each part is stopped."""
KITS = {"fashion": ("exactness", "speed", "additions", "training", "accuracy"), "solar": ("solar",)}
"""The parts that one machine is lent for: what they need travels together, and their seconds are under nine minutes."""
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
BACKENDS = (  # the most telling first; torch.compile takes half a minute for each network
    *("cudagraph-float16", "cudagraph-tf32", "eager-float16", "eager", "cudagraph-bfloat16", "cudagraph", "eager-tf32"),
    *("eager-bfloat16", "tensorrt-engine-float16", "tensorrt-engine", "tensorrt-float16", "onnxruntime", "tensorrt"),
    *("eager-contiguous", "torchscript"),
    *("compile-float16", "compile", "compile-bfloat16"),
)
BATCHES = (32, 256, 1)
PATHS = {
    "rmprune.measure.rounds._cuda_ms": "times by device events",
    "rmprune.measure.latency._gpu_peak_mib": "peak memory",
    "rmprune.measure.torch_backends.cuda_graph": "a network as a CUDA graph",
    "rmprune.measure.torch_backends.current": "the GPU that streams and events are of",
    "rmprune.measure.cuda_graphs": "recording and replaying, of training steps too",
    "rmprune.measure.runtimes.tensorrt": "TensorRT as ONNX Runtime's provider",
    "rmprune.measure.runtimes.tensorrt_engine": "TensorRT by itself",
    "rmprune.measure.runtimes.onnx_runtime": "inputs bound on the device",
    "rmprune.graph.tf32.tf32": "what TF32 changes",
    "rmprune.training.precision.repeatable": "deterministic kernels",
    "rmprune.training.distributed": "NCCL, with more than one",
    "rmprune.training.precision.autocast": "autocast on CUDA",
    "rmprune.training.loop._Training.save": "the GPU's random state in checkpoints",
    "rmprune.data.splits.TensorSplit": "images held and augmented on the GPU",
    "rmprune.data.photos.Photos.on": "photos held on the GPU",
    "rmprune.data.views.views_of": "augmenting them there",
}
"""Code that nothing but a GPU runs as a GPU does; tests stand in for the device."""


@dataclass(frozen=True)
class Settings:
    """What to measure, where, and how long at most."""

    parts: Names = ()
    """Of exactness, speed, additions, training, accuracy, solar (default: all but solar; with --quick all)."""
    comparisons: Names = ()
    """Of those of accuracy and solar, by their networks (default: all)."""
    device: str = "auto"
    """cuda, cuda:N or cpu; auto takes the GPU where there is one."""
    quick: bool = False
    """Everything in miniature."""
    backends: Names = ()
    """Of those that speed and additions measure in (default: all that are there)."""
    seed: int = 0
    """The first of the seeds of accuracy and solar."""
    seeds: int = 5
    """How many of them; with each, all methods."""
    budgets: gpu_runs.Budgets = "macs"
    """What those of accuracy and solar count: macs, or measured time on this device, which takes minutes for each seed (docs/gpu.md)."""
    done: Path = Path("reports/gpu")
    """Where the CSV files of earlier times lie: what was measured on the same card is not measured again."""
    scale: float = 1.0
    """Times the seconds that each part may take."""
    data_dir: Path | None = None
    """Where Fashion-MNIST's files lie, if not where Debian puts them."""
    solar_dir: Path = Path("gpu-kit/solar/cells")
    """Where experiments/gpu.sh, or experiments/solar-cells/layout.py, laid out the solar cells."""
    out: Path = Path("reports/gpu")
    """Where CSV and figures go."""
    runs: Path = Path("runs/gpu")
    """Where the runs of accuracy and solar are kept."""
    networks: Path | None = None
    """Where --write-networks left the forms that speed measures; else they are made now (a minute or two)."""
    write_networks: bool = False
    """Write them there, and measure nothing."""
    figures: Path | None = None
    """Draw what lies there, and measure nothing."""
    paths: bool = False
    """Print what nothing but a GPU runs."""


# ---------------------------------------------------------------- parts


def exactness(part: Part, settings: Settings) -> None:
    """Outputs of the RM form on the device against the original's in float64, and the original's own in the same number format."""
    by_row = {net.row: net for net in NETS}
    size = 32 if settings.quick else 64
    for row in EXACT[2:3] if settings.quick else EXACT:
        if part.has(network=row):
            continue
        with part.trying(row) as begun:
            if not begun:
                continue
            rows = []
            torch.manual_seed(0)
            model, x = build(by_row[row]), torch.randn(2, 3, size, size)
            randomise(model, torch.randn(4, 3, size, size), 0)
            wide = model.to(part.device).double()
            removal = rmprune.remove_residuals(wide, x.to(part.device).double())
            inputs, groups = comparison_inputs((x,), 2, 3)
            expected, other = (
                computed(wide, (y,), torch.float64, part.device) for y in (inputs[0], comparison_base((x,))[0])
            )
            for name, dtype, rounded in networks.FORMATS:
                with tf32(rounded, part.device):
                    own, plain = (
                        relative_error(expected, computed(net, inputs, dtype, part.device), groups, other)
                        for net in (wide, removal.model)
                    )
                facts = {"network": row, "removed": len(removal.removed), "kept": len(removal.kept)}
                rows.append(facts | {"number_format": name, "error": plain, "original_error": own})
            part.write(*rows)


@torch.no_grad()
def computed(net: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> Tensor:
    """What a copy in this number format gives, image by image."""
    twin = rmprune.graph.equivalence.eval_copy(net).to(device, dtype)
    return torch.cat([twin(x.to(device, dtype)).cpu() for x in inputs[0].split(1)])


def speed(part: Part, settings: Settings) -> None:
    """Times of every family's forms, configuration by configuration, and the speed-up that its MACs promise."""
    families = {}
    for name in ("mobilenet_v2",) if settings.quick else networks.FAMILIES:
        with part.trying(name):
            families[name] = networks.forms_in(settings.networks, name, quick=settings.quick)
            print(f"{name}: {', '.join(families[name])}", flush=True)
    measured(part, settings, families, reference="original")


def additions(part: Part, settings: Settings) -> None:
    """Times of networks with identity shortcuts and of the same layers without the additions."""
    families = {}
    for name in ("resnet18",) if settings.quick else networks.WITH_ADDITIONS:
        with part.trying(name):
            families[name] = networks.with_and_without(name, quick=settings.quick)
    measured(part, settings, families, reference="without")


def measured(part: Part, settings: Settings, families: dict[str, dict[str, nn.Module]], *, reference: str) -> None:
    """One row for each network and configuration, all of a family in turns."""
    quick = settings.quick
    x = torch.randn(1, 3, 32, 32) if quick else torch.randn(1, 3, 224, 224)
    candidates = {
        name: {form: Candidate(f"{name} {form}", net, x) for form, net in forms.items()}
        for name, forms in families.items()
    }
    macs = {(n, f): rmprune.count_macs(net, x) for n, forms in families.items() for f, net in forms.items()}
    there = []
    for backend in ("eager",) if quick else settings.backends or BACKENDS:
        with part.trying(backend):
            check_backend(backend, part.device)
            there.append(backend)
    for backend, batch, name in in_turn(there, (1,) if quick else BATCHES, list(candidates)):
        if part.has(network=name, backend=backend, batch_size=batch):
            continue
        compiles = backend.startswith("compile")
        forms = {form: own for form, own in candidates[name].items() if not compiles or form.startswith(COMPILED)}
        with part.trying(f"{name} on {backend}, batch {batch}", 60.0 if compiles else 5.0) as begun:
            if not begun:
                continue
            place = Configuration(backend, part.device, torch.get_num_threads(), batch)
            times = measure_configuration(forms, place, 0.02 if quick else 0.1, 3 if quick else 9, seed=0)
            base = times[reference], macs[name, reference]
            part.write(*(timed(name, form, macs[name, form], own, *base) for form, own in times.items()))


def timed(network: str, form: str, macs: float, own: Latency, whole: Latency, whole_macs: float) -> dict[str, object]:
    """The row of a form beside the one that it is compared with."""
    latency = own.relative_to(whole)
    ratio = latency.ratio or 1.0
    return {
        "network": network,
        "form": form,
        "macs": macs,
        "backend": latency.backend,
        "number_format": latency.number_format,
        "batch_size": latency.batch_size,
        "images_per_second": latency.images_per_second,
        "speed_up": 1 / ratio,
        "speed_up_low": 1 / (latency.ratio_high or 1.0),
        "speed_up_high": 1 / (latency.ratio_low or 1.0),
        "macs_reduction": whole_macs / macs,
        "realised": macs / whole_macs / ratio,
        "median_ms": latency.median_ms,
        "q1_ms": latency.q1_ms,
        "q3_ms": latency.q3_ms,
        "rounds": latency.rounds,
        "peak_mib": latency.peak_mib,
        "first_ms": latency.first_ms,
    }


COMPILED = ("original", "RM fused", "RM 0.6", "with", "without")
"""How the names of those forms begin that torch.compile is given."""


def in_turn(backends: list[str], batches: tuple[int, ...], names: list[str]) -> list[tuple[str, int, str]]:
    """Every (backend, batch size, network), those first that come early in their lists: when time is up, each has had its most telling."""
    ranked = itertools.product(enumerate(backends), enumerate(batches), enumerate(names))
    found = sorted(ranked, key=lambda job: job[0][0] + 2 * job[1][0] + job[2][0])
    return [(backend, batch, name) for (_, backend), (_, batch), (_, name) in found]


def training(part: Part, settings: Settings) -> None:
    """Images per second of our loop and of plain ones, whose DataLoader works in the process or in eight others."""
    quick = settings.quick
    asked = throughput.Settings(
        steps=2 if quick else 100,
        warmup=1 if quick else 20,
        threads=torch.get_num_threads(),
        width=8 if quick else 32,
        device=part.device,
        dataset="digits" if quick else "fashion-mnist",
        data_dir=settings.data_dir,
    )
    for turn in range(1 if quick else 3):
        for loop, workers in (("rmprune", 0), ("plain", 0), *([] if quick else [("plain", 8)])):
            if part.has(loop=loop, workers=workers, turn=turn):
                continue
            with part.trying(f"{loop}, {workers} workers, turn {turn + 1}", 5.0) as begun:
                if begun:
                    rate = throughput.rate(loop, dataclasses.replace(asked, workers=workers))
                    part.write({"loop": loop, "workers": workers, "turn": turn, "images_per_second": rate})


def accuracy(part: Part, settings: Settings) -> None:
    """Methods at the same measured time on this device, seed by seed: `slim` and `amc`, whose records hold the rest."""
    seeds = range(settings.seed, settings.seed + (1 if settings.quick else settings.seeds))
    folder = settings.solar_dir if part.name == "solar" else settings.data_dir
    runs = gpu_runs.planned(
        part.name,
        settings.comparisons,
        seeds,
        part.device,
        folder,
        settings.runs,
        quick=settings.quick,
        budgets=settings.budgets,
    )
    timed = settings.budgets == "time"
    plans = 1 if settings.quick else 2 if timed else auto.PROPOSED
    grid = (
        (0.0, 0.25, 0.5, 1.0) if timed else time_cost.GRID
    )  # of widths in the table of layer times: half as many layers
    for (comparison, seed), own in itertools.groupby(runs, lambda run: (run.comparison, run.seed)):
        of_seed = list(own)
        if part.has(comparison=comparison, seed=seed, command=of_seed[-1].config.command):
            continue
        begun_at = int(time.time())
        for run in of_seed:
            what = f"{comparison} by {run.config.command}"
            with part.trying(f"{what}, seed {seed}", run.seconds, kind=what) as begun:
                if begun:
                    start = run_slim if isinstance(run.config, SlimConfig) else run_amc
                    with mock.patch.object(auto, "PROPOSED", plans), mock.patch.object(time_cost, "GRID", grid):
                        records = start(run.config, command=command())
                    found = gpu_runs.rows(records)
                    facts = {"comparison": comparison, "seed": seed, "command": run.config.command, "begun": begun_at}
                    part.write(*(facts | row for row in found))


PARTS: dict[str, Callable[[Part, Settings], None]] = {
    f.__name__: f for f in (exactness, speed, additions, training, accuracy)
} | {"solar": accuracy}


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
    parts = settings.parts or (tuple(PARTS) if settings.quick else KITS["fashion"])
    if unknown := [name for name in parts if name not in PARTS]:
        raise SystemExit(f"unknown parts {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    if device == "cpu" and not settings.quick:
        raise SystemExit("there is no GPU here; --quick runs everything in miniature on the CPU")
    settings.out.mkdir(parents=True, exist_ok=True)
    here = environment()
    left_out: list[str] = []
    took: dict[str, float] = {}
    for name in parts:
        start = time.monotonic()
        seconds = (
            3600.0 if settings.quick else SECONDS[name] * settings.scale
        )  # a busy machine may make the miniature slow
        before = pd.DataFrame()
        if settings.quick:
            (settings.out / f"{name}.csv").unlink(missing_ok=True)
        else:
            before = pd.concat([gpu_report.read(folder, name) for folder in (settings.done, settings.out)])
        part = Part(name, settings.out, device, start + seconds, left_out, here["gpu"] or here["processor"], before)
        part.run(functools.partial(PARTS[name], part, settings))
        took[name] = round(time.monotonic() - start, 1)
        print(f"{name}: {took[name]} s", flush=True)
        facts = {"command": command(), "quick": settings.quick, "seconds": took, "left_out": left_out}
        (settings.out / f"run-{'-'.join(parts)}.json").write_text(json.dumps(facts | {"environment": here}, indent=1))
    if settings.quick and left_out:
        raise SystemExit(f"the miniature left out {len(left_out)} of its measurements")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
