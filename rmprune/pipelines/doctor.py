"""`doctor`: what is installed, what the processor can do, which backends work here, whether the machine is quiet. Writes nothing."""

import time

import torch
from torch import nn

from rmprune.config import DoctorConfig
from rmprune.errors import ConfigError
from rmprune.measure import BACKENDS
from rmprune.measure.backends import backend_named, prepare, surroundings
from rmprune.measure.candidate import Candidate
from rmprune.measure.machine import BFLOAT16, PACKAGES, environment, has_instruction
from rmprune.measure.quiet import quietness

INSTRUCTIONS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "int8 dot products (VNNI)": ("avx512_vnni", "avx_vnni", "asimddp"),
    "bfloat16": BFLOAT16,
    "AMX": ("amx_tile",),
}
ERRORS = {"float32": 1e-4, "tf32": 0.02, "bfloat16": 0.05, "float16": 0.02, "int8": 0.3}
"""The largest difference that a backend of this number format may show, of the largest output."""


def run_doctor(config: DoctorConfig) -> None:
    """Print one line for each thing that was looked at, as it is found. Raises ConfigError for an unknown backend."""
    for name in config.backends:
        backend_named(name)
    here = environment()
    print(f"python {here['versions']['python']} on {here['platform']}")
    for package in PACKAGES:
        if package in here["versions"]:
            print(f"  {package:16} {here['versions'][package]}")
        elif package not in ("onnxruntime-gpu", "tensorrt") or here["gpu"]:
            print(f"  {package:16} not installed: pip install {package}")
    print(f"processor {here['processor']}, {here['cores']} cores, torch on {here['threads']} threads")
    for name, flags in INSTRUCTIONS.items():
        print(f"  {name:26} {'yes' if has_instruction(*flags) else 'no'}")
    print(f"GPU {here['gpu'] or 'none that torch can use'}")
    print("backends, each tried on a tiny network:")
    for name in config.backends or BACKENDS:
        devices = [d for d in BACKENDS[name].devices if d == "cpu" or here["gpu"]]
        for device in devices:
            wait = "compiling, up to a minute ... " if name.startswith("compile") else ""
            print(f"  {name:20} {device:5} {wait}", end="", flush=True)
            print(_try(name, device), flush=True)
        if not devices:
            print(f"  {name:20} cuda  no: there is no GPU here")
    print("machine ", end="", flush=True)
    print(quietness(config.seconds), flush=True)


def _try(backend: str, device: str) -> str:
    """What came of running a tiny network, as a line."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    # int8 chooses its ranges by what it is then run on: this asks whether it runs, no more.
    x = torch.randn(32, 3, 16, 16)
    start = time.perf_counter()
    try:
        with surroundings(backend, device), torch.inference_mode():
            prepared = prepare(Candidate("a tiny network", net.eval(), x, x), backend, device, 1, 2)
            prepared()
            actual, expected = prepared.outputs(x[:2]), net(x[:2])
    except ConfigError as error:
        return f"no: {str(error).removeprefix(f'backend {backend!r}').strip(' :')}"
    except Exception as error:  # each runtime has its own errors
        return f"fails: {type(error).__name__}: {str(error)[:150]}"
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if difference > ERRORS[BACKENDS[backend].number_format]:
        return f"wrong: its outputs differ from PyTorch's by {difference:.1e} of the largest"
    return f"works ({BACKENDS[backend].number_format}, {time.perf_counter() - start:.1f} s)"
