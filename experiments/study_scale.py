"""What a study on ImageNet takes, as the tables of docs/beyond-one-machine.md: `python experiments/study_scale.py` measures what this
machine can tell (ResNet-50's size, what an image keeps for its backward pass, photos decoded in a CPU second) and computes the rest
from the assumptions below, which were never measured here. A test compares `tables` of its figures with the page.
"""

import io
import time

METHODS, BUDGETS, SEEDS, NETWORKS = 10, 6, 5, 4
IMAGES, EPOCHS, FINETUNE = 1.28e6, 90, 20
RATE = 2500  # images a second, ResNet-50 trained in bfloat16 on an H100: assumed
GPUS, NODE, BATCH = 32, 8, 256  # of the study; of one node, and images on each of its GPUs
JPEG, SIDE, STORED = 110e3, 256, 1.33e6  # bytes of a photo; pixels of a decoded one; photos of training and validation
RINGS = (("300 GB/s (NVLink)", 300e9), ("100 Gbit/s", 12.5e9))  # bytes a second, assumed


def tables(parameters: int, kept_mib: float, decoded: float) -> list[str]:
    """The rows of both tables. kept_mib: of one image, for the backward pass in float32; decoded: photos in a CPU second."""
    cells, dense = METHODS * BUDGETS * SEEDS * NETWORKS, SEEDS * NETWORKS
    epoch = IMAGES / RATE / 3600
    part = (3 * 0.5 + 1) / 3
    cell, all_gpu = FINETUNE * part * epoch, cells * FINETUNE * part * epoch + dense * EPOCHS * epoch
    weights, gradients = parameters / 2 * 4, parameters * 4
    stored = 4 * weights
    seed = METHODS * BUDGETS
    sent = 2 * (NODE - 1) / NODE * gradients
    rings = ", ".join(f"{1e3 * sent / speed:.1f} ms at {name}" for name, speed in RINGS)
    rows = [
        (
            "cells",
            f"{METHODS} x {BUDGETS} x {SEEDS} x {NETWORKS} = {cells:,}, and {SEEDS} x {NETWORKS} = {dense} "
            "dense trainings",
            "arithmetic",
        ),
        (
            f"one dense training, {EPOCHS} epochs",
            f"{EPOCHS} x 1.28 million / {RATE:,} /s = {EPOCHS * epoch:.1f} GPU hours",
            "arithmetic",
        ),
        (
            f"one cell, {FINETUNE} epochs with a teacher",
            f"a network of half the MACs, three passes, and the teacher's one: (3 x 0.5 + 1) / 3 = {part:.2f} "
            f"of a dense epoch: {cell:.1f} GPU hours",
            "arithmetic",
        ),
        (
            "all",
            f"{all_gpu:,.0f} GPU hours; on {GPUS} GPUs {all_gpu / GPUS / 24:.1f} days",
            "arithmetic",
        ),
        (
            "storage of a cell",
            f"weights {weights / 1e6:.0f} MB, ONNX as much, checkpoint with momentum twice as much: "
            f"{stored / 1e6:.0f} MB",
            f"ResNet-50 at half its {parameters / 1e6:.1f} million parameters, counted",
        ),
        (
            "all",
            f"{cells * stored / 1e9:.0f} GB, of which the checkpoints (half) can go once a cell is done",
            "arithmetic",
        ),
        (
            "measuring a seed",
            f"{seed} networks are {seed * weights / 1e9:.1f} GB of memory; {seed} x `--measure.seconds` a place",
            "arithmetic",
        ),
        (
            "reading",
            f"{GPUS} workers ask for {GPUS * RATE:,} images/s: {GPUS * RATE * JPEG / 1e9:.1f} GB/s of "
            f"JPEGs of {JPEG / 1e3:.0f} kB, {GPUS * RATE / decoded:.0f} cores that decode",
            f"{decoded:.0f} images in a CPU second, measured",
        ),
        (
            "photos decoded once",
            f"{STORED / 1e6:.2f} million squares of {SIDE} pixels: {STORED * SIDE**2 * 3 / 1e9:.0f} "
            "GB on each node's disk (`--cache disk`)",
            "arithmetic",
        ),
        (
            "memory for an image",
            f"{kept_mib:.0f} MiB kept for the backward pass at 224 pixels in float32; about half of it in bfloat16",
            "measured on a CPU (`saved_tensors_hooks`); halved: assumed",
        ),
        (
            "memory of a GPU",
            f"{BATCH} images x {kept_mib / 2:.0f} MiB = {BATCH * kept_mib / 2 / 1024:.1f} GiB; weights, "
            f"gradients, momentum and DDP's buckets 4 x {gradients / 2**20:.0f} MiB; the teacher's forward "
            f"pass 1 GiB: {BATCH * kept_mib / 2 / 1024 + 4 * gradients / 2**30 + 1:.0f} GiB of 80",
            "arithmetic",
        ),
        (
            "a step",
            f"{BATCH} / {RATE:,} = {1e3 * BATCH / RATE:.0f} ms",
            "assumed, above",
        ),
        (
            "gradients shared",
            f"{gradients / 1e6:.0f} MB; a ring sends 2 x 7/8 of it: {rings}, beside the backward pass",
            "arithmetic; rates assumed",
        ),
        (
            f"an epoch on {NODE} GPUs",
            f"1.28 million / {NODE * RATE:,} = {IMAGES / NODE / RATE:.0f} s; {EPOCHS} epochs {EPOCHS * IMAGES / NODE / RATE / 3600:.1f} "
            "h",
            "arithmetic",
        ),
        (
            f"decoding for {NODE} GPUs",
            f"{NODE * RATE:,} / {decoded:.0f} = {NODE * RATE / decoded:.0f} cores: `--workers 4` a process, "
            "from the cache of squares fewer",
            "measured rate",
        ),
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def measured() -> tuple[int, float, float]:
    """What `tables` asks for, of torchvision's ResNet-50 and a photo of noise, 500 x 375 pixels."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.models import resnet50

    model, kept = resnet50().train(), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(2, 3, 224, 224)).sum()
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(128, 30, (47, 63, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(file, "JPEG", quality=90)
    started = time.process_time()
    for _ in range(200):
        Image.open(file).convert("RGB").resize((341, 256), Image.Resampling.BILINEAR).crop((42, 0, 298, 256))
    rate = 200 / (time.process_time() - started)
    mib = sum(storage.nbytes() for storage in kept.values()) / 2 / 2**20
    return sum(parameter.numel() for parameter in model.parameters()), mib, rate


if __name__ == "__main__":
    figures = measured()
    print("{:,} parameters, {:.1f} MiB kept for an image, {:.0f} photos decoded in a CPU second".format(*figures))
    print("\n".join(tables(*figures)))
