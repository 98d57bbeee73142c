"""The machine and the versions that a figure was measured with, for records and caches."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("rmprune", "torch", "torchvision", "torch-pruning", "timm", "numpy", "onnx", "onnxruntime", "openvino")


def environment() -> dict[str, Any]:
    """Where this process runs: versions, processor, its vector instructions, cores, torch's threads, GPU."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
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


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
