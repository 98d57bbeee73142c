"""The machine and the versions that a figure was measured with, for records and caches."""

import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("rmprune", "torch", "torchvision", "torch-pruning", "timm", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "openvino", "nncf", "ncnn", "pnnx"),
)


BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instruction sets, one of which a processor has that multiplies bfloat16 in hardware: AVX512-BF16, AMX, ARM's."""


def environment() -> dict[str, Any]:
    """Where this process runs: versions, processor, its vector instructions, cores, torch's threads, GPU."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def has_instruction(*names: str) -> bool:
    """Whether the processor has one of these instruction sets, as /proc/cpuinfo calls them (False where there is none)."""
    return bool(instructions() & set(names))


@functools.cache
def instructions() -> frozenset[str]:
    """The instruction sets of the processor: "avx2", "avx512_vnni", "amx_bf16", ...; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, []))


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
