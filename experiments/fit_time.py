"""CPU time of fitting all layers of a pruned EfficientNet-Lite0 by least squares, and how far its sums in float32 are from float64.

    python experiments/fit_time.py                # 512 images of 128 x 128, two threads
    python experiments/fit_time.py --images 64 --exact

Half of the channels of every group go; fresh weights, noise as images. `--exact` fits once more with everything in float64 and
compares the outputs. Exits with 1 over 15 s, or where outputs differ by more than 1e-3 of their deviation.
"""

import argparse
import sys
import time

import timm
import torch
from torch import nn

from rmprune.pruning import find_structure
from rmprune.pruning.refit import refit

LIMIT, TOLERANCE = 15.0, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0", help="a network of timm's")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="compare with a fit in float64")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    images = torch.randn(args.images, 3, args.size, args.size)
    structure = find_structure(model, images[:2])
    keep = {group.name: torch.arange(group.units) % 2 == 0 for group in structure.groups}

    def fit(network: nn.Module, data: torch.Tensor) -> nn.Module:
        start, cpu = time.perf_counter(), time.process_time()
        fitted = refit(network, structure, keep, data).eval()
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
        print(
            f"{args.model}, {len(data)} images, {data.dtype}: {seconds:.1f} s, {used:.1f} CPU seconds, {args.threads} threads"
        )
        failed.append(data.dtype == torch.float32 and seconds > LIMIT)
        return fitted

    failed: list[bool] = []
    fitted = fit(model, images)
    if args.exact:
        exact = fit(model.double(), images.double())
        with torch.no_grad():
            wanted, got = exact(images[:32].double()), fitted.double()(images[:32].double())
        error = float((wanted - got).abs().max() / (wanted - wanted.mean(0)).std())
        print(f"outputs differ by {error:.1e} of their deviation (limit {TOLERANCE})")
        failed.append(error > TOLERANCE)
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
