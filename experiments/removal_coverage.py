"""Table of RM over the networks of torchvision, timm and ours: what is removed, what is kept and why, exactness, cost.

    python experiments/removal_coverage.py                      # all networks; goes on where it was interrupted
    python experiments/removal_coverage.py --only resnet18 tv:vgg11_bn --overwrite

Every network runs in a process of its own (memory comes back, a crash is one row) with random weights, batch-norm
statistics measured on noise and then perturbed (variances at least 1 % of their layer's mean), and gains that saturate
ReLU6. Writes coverage.csv and coverage.md in reports/removal-coverage.
"""

import argparse
import copy
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

from rmprune.errors import RmpruneError, UnsupportedModel
from rmprune.graph.equivalence import own_rounding
from rmprune.graph.relative_error import Comparison
from rmprune.measure.cost import count_macs, count_params
from rmprune.models import create
from rmprune.removal import plan_removal, remove_residuals

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "removal-coverage"
REPORT = ROOT / "reports" / "removal-coverage"


@dataclass(frozen=True)
class Net:
    """A row: "tv:NAME" from torchvision, "timm:NAME" from timm, else ours; `label` tells forms of one network apart."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    label: str = ""

    @property
    def row(self) -> str:
        return f"{self.name} {self.label}".strip()


def torchvision(*names: str, **rest: Any) -> list[Net]:
    return [Net(f"tv:{name}", **rest) for name in names]


def timm(*names: str, **rest: Any) -> list[Net]:
    return [Net(f"timm:{name}", **rest) for name in names]


SMALL = {"num_classes": 10}
NETS = [
    *torchvision("resnet18", "resnet34", "resnet50", "resnet101"),
    *torchvision("resnet152", "mobilenet_v2", size=224),  # the issue limits their time
    *torchvision("wide_resnet50_2", "resnext50_32x4d"),
    Net("tv:resnet50", {"replace_stride_with_dilation": [False, True, True]}, label="dilated"),
    *torchvision("mnasnet0_5", "mnasnet1_0"),
    *torchvision("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
    *torchvision("regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf"),
    *torchvision("regnet_y_400mf", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
    *torchvision("vgg11_bn", "densenet121", "squeezenet1_1"),
    *timm("resnet10t", "resnet14t", "resnet18d", "resnet26", "resnet50d", "mobilenetv2_050", "mobilenetv2_100"),
    *timm("seresnet18", "cspresnet50", "cspdarknet53", "darknet53", "repvgg_a0", "ghostnet_100", "fbnetc_100"),
    *timm("semnasnet_100", "mobilenetv1_100"),
    *[Net(f"resnet{depth}", SMALL, 32) for depth in (20, 56, 110)],
    *[Net(name, SMALL, 32) for name in ("preact_resnet18", "preact_resnet34", "preact_resnet20")],
    *[Net(name, label="large images") for name in ("preact_resnet18", "preact_resnet34")],
    Net("rmnext41x5_16"),
    Net("rmnext50x5_32"),
    Net("rmnext101x6_16"),
    Net("mobilenet_v2_small", SMALL, 32),
    Net("mobilenet_v2_small", SMALL | {"free": 8}, 32, "free 8"),
    Net("mobilenet_v2_digits", SMALL, 8),
    *[
        Net("repvgg21", SMALL | {"small_images": True, "width": 32, "reserve_ratio": ratio}, 32, f"reserve {ratio}")
        for ratio in (0.0, 0.5, 0.75)
    ],
    Net(
        "repvgg21",
        SMALL | {"small_images": True, "width": 32, "reserve_ratio": 0.5, "squeeze_excitation": True},
        32,
        "SE",
    ),
]


# ---------------------------------------------------------------- one network, in its own process


def build(net: Net) -> Any:
    source, _, name = net.name.rpartition(":")
    if source == "tv":
        return get_model(name, weights=None, **net.settings)
    return create(f"timm/{name}" if source == "timm" else name, **net.settings)


def randomise(model: Any, x: Any, seed: int) -> None:
    """Random gains and shifts, statistics measured on noise and then perturbed: sane scales that saturate.

    Without a least variance, a channel that is dead on noise would have the gain 1 / sqrt(eps) = 316 on other inputs, and
    outputs would grow a million times larger than those that the call has seen.
    """
    torch.manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    bounded = any(isinstance(m, nn.ReLU6 | nn.Hardswish | nn.Hardtanh | nn.Hardsigmoid) for m in model.modules())
    for norm in norms:
        nn.init.uniform_(norm.weight, *((1.5, 4.5) if bounded else (0.5, 1.5)))
        nn.init.normal_(norm.bias, 1.5 if bounded else 0.0)
        norm.momentum = None  # plain averages
        norm.reset_running_stats()
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn_like(x))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_(min=0.01 * float(norm.running_var.mean()))
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
    model.eval()


def saturated_fraction(model: Any, x: Any) -> float | None:
    """Fraction of the places before ReLU6 that are above 6; None without ReLU6."""
    counts: Counter[str] = Counter()

    def count(_: Any, args: tuple[Any, ...]) -> None:
        counts["above"] += int((args[0] > 6).sum())
        counts["all"] += args[0].numel()

    handles = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, nn.ReLU6)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return counts["above"] / counts["all"] if counts["all"] else None


def relative_error(plain: Any, reference: Any, inputs: list[Any]) -> float:
    """Largest difference over the inputs, relative to each output's largest value; the reference runs in float64."""
    worst = 0.0
    dtype = next(plain.parameters()).dtype
    with torch.no_grad():
        for x in inputs:
            expected = reference(x.double())
            worst = max(worst, float((plain(x.to(dtype)).double() - expected).abs().max() / expected.abs().max()))
    return worst


def onnx_facts(plain: Any, inputs: list[Any]) -> dict[str, Any]:
    """Exports to ONNX and runs ONNX Runtime on fresh inputs: its error against the module, the graph's operators."""
    import onnx
    import onnxruntime

    from rmprune.onnx.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(plain, inputs[0], path, tolerance=1e-2)  # the table says what it is
        operators = tally(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        worst = 0.0
        for x in inputs:
            with torch.no_grad():
                expected = plain(x)
            got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    return {"onnx_error": worst, "onnx_operators": operators}


def convert(net: Net, size: int, seed: int, onnx: bool) -> dict[str, Any]:
    """All facts of one row."""
    torch.manual_seed(seed)
    model = build(net)
    channels = 3
    x = torch.randn(1, channels, size, size)
    randomise(model, torch.randn(4, channels, size, size), seed)
    facts: dict[str, Any] = {"saturated": saturated_fraction(model, x)}
    facts |= {"macs_before": count_macs(model, x), "params_before": count_params(model)}
    start = time.perf_counter()
    try:
        removal = remove_residuals(model, x)
    except UnsupportedModel as error:
        kept = {block.name: block.reason for block in plan_removal(model, x)}
        if not kept:
            raise UnsupportedModel("no residual to remove") from error
        facts |= {"seconds": time.perf_counter() - start, "residuals": len(kept), "removed": 0, "kept": len(kept)}
        return facts | {"why_kept": reasons(kept), "threads": torch.get_num_threads()}
    facts |= {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
    facts["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    plain = removal.model
    facts |= {
        "residuals": len(removal.removed) + len(removal.kept),
        "removed": len(removal.removed),
        "kept": len(removal.kept),
        "why_kept": reasons(removal.kept),
        "forms": tally(str(getattr(block, "form", "")) for block in removal.blocks),
        "result": "Sequential" if isinstance(plain, torch.nn.Sequential) else "GraphModule",
        "layers": tally(type(layer).__name__ for layer in plain.modules() if not list(layer.children())),
        "macs_after": count_macs(plain, x),
        "params_after": count_params(plain),
    }
    reference = copy.deepcopy(model).double()
    inputs = [torch.randn_like(x), 10 * torch.randn_like(x), torch.randn(2, channels, size, size) - 3]
    facts["error_float32"] = relative_error(plain, reference, inputs)
    facts["original_float32"] = relative_error(model, reference, inputs)
    if onnx:
        try:
            facts |= onnx_facts(plain, [inputs[0], inputs[2]])
        except Exception as error:
            facts["onnx_operators"] = f"{type(error).__name__}: {first_line(error)}"
    facts["error_float64"] = removal.max_error
    del plain, removal, model
    if facts["params_after"] < 4e8:  # else its own check has to do: twice the network in float64 would not fit
        facts["error_float64"] = relative_error(remove_residuals(reference, x.double()).model, reference, inputs)
    if facts["error_float64"] > 1e-10:
        facts["original_float64"] = own_error(reference, inputs)
    return facts


def own_error(reference: Any, inputs: list[Any]) -> float:
    """How far one float64 rounding of its weights moves the original's outputs, relative to their largest value."""
    with torch.no_grad():
        return max(
            own_rounding(copy.deepcopy(reference), Comparison((x.double(),), [len(x)], reference(x.double())))
            for x in inputs
        )


def tally(words: Iterable[str]) -> str:
    return " ".join(f"{word}:{n}" for word, n in sorted(Counter(words).items()))


def reasons(kept: dict[str, str]) -> str:
    """Reasons with the number of blocks each; names and figures that differ from block to block are cut."""
    counts = Counter(re.sub(r"(?<=[a-z])_\d+\b|^\d+ (?=channels)", "", reason) for reason in kept.values())
    return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common(4))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def worker(row: str, size: int, seed: int, onnx: bool, out: Path) -> None:
    net = next(net for net in NETS if net.row == row)
    facts: dict[str, Any] = {"net": row, "input": f"3x{size}x{size}"}
    try:
        facts |= convert(net, size, seed, onnx)
    except RmpruneError as error:
        facts["message"] = first_line(error)
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps(facts, indent=1))
    partial.replace(out)


# ---------------------------------------------------------------- all of them


def result_path(net: Net) -> Path:
    return RUNS / (re.sub(r"\W+", "-", net.row) + ".json")


def finished(net: Net) -> bool:
    """Whether the row is there; one that crashed is tried again."""
    return result_path(net).exists() and not json.loads(result_path(net).read_text()).get("crashed")


def run(net: Net, size: int, args: argparse.Namespace) -> None:
    """One network in a process of its own; a crash becomes a row."""
    out = result_path(net)
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", net.row, "--size", str(size), "--seed", str(args.seed)]
    command += ["--out", str(out)] + ([] if args.onnx else ["--no-onnx"])
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=args.timeout,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        said = (done.stderr.strip().splitlines() or [""])[-1]
        failure = f"process ended with {done.returncode}: {said}"
    except subprocess.TimeoutExpired:
        failure = f"took more than {args.timeout} s"
    if not out.exists():
        facts = {"net": net.row, "input": f"3x{size}x{size}", "message": failure[:300], "crashed": True}
        out.write_text(json.dumps(facts, indent=1))


def write_report(command: str) -> None:
    import pandas as pd

    rows = [json.loads(result_path(net).read_text()) for net in NETS if result_path(net).exists()]
    columns = (
        "net input residuals removed kept why_kept error_float64 error_float32 original_float32 saturated macs_before "
        "macs_after params_before params_after original_float64 seconds threads peak_gib onnx_error result forms layers "
        "onnx_operators message"
    )
    table = pd.DataFrame(rows).reindex(columns=columns.split())
    REPORT.mkdir(parents=True, exist_ok=True)
    table.to_csv(REPORT / "coverage.csv", index=False)
    (REPORT / "coverage.md").write_text(markdown(table, command))


def number(value: Any, style: str) -> str:
    import pandas as pd

    return "" if pd.isna(value) else format(value, style)


def markdown(table: Any, command: str) -> str:
    lines = [
        "# Residuals removed, network by network",
        "",
        f"Made by `{command}`. Random weights, random batch-norm statistics (no variance below 1 % of its",
        "layer's mean); errors are relative to the largest",
        "output, over inputs that the call has not seen (noise, 10 times noise, noise - 3). `float32 (before)`: the plain",
        "network in float32 against the original in float64, and in brackets the original's own float32 rounding on the same",
        "inputs. `above 6`: part of the places before a ReLU6 that it clips. MMACs: before and after removal, one image, before",
        "pruning. s: seconds of the call with so many threads of torch (those with one thread had other work beside them). GiB: the whole",
        "process. ONNX Runtime against PyTorch, float32.",
        "",
        "| network | input | residuals | removed | kept, why | float64 | float32 (before) | above 6 | MMACs | s | GiB "
        "| ONNX Runtime |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in table.itertuples():
        if isinstance(row.message, str):
            lines.append(f"| {row.net} | {row.input} | | | {row.message.replace('|', '/')} | | | | | | | |")
            continue
        kept = f"{row.kept:.0f}: {row.why_kept}".replace("|", "/") if row.kept else ""
        cells = [row.net, row.input, f"{row.residuals:.0f}", f"{row.removed:.0f}", kept]
        cells += [number(row.error_float64, ".0e")]
        cells += [f"{row.error_float32:.0e} ({row.original_float32:.0e})" if row.removed else ""]
        cells += [number(row.saturated, ".0%")]
        cells += [f"{row.macs_before / 1e6:.0f}" + (f" → {row.macs_after / 1e6:.0f}" if row.removed else "")]
        cells += [
            f"{row.seconds:.1f} ({row.threads:.0f})",
            number(row.peak_gib, ".1f"),
            number(row.onnx_error, ".0e") or no_onnx(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *summary(table)]) + "\n"


def no_onnx(row: Any) -> str:
    """Why there is no figure of ONNX Runtime."""
    said = row.onnx_operators
    if not isinstance(said, str) or not row.removed:
        return ""
    return "none: over 2 GiB" if "2GiB" in said else f"none: {said[:60]}".replace("|", "/")


def summary(table: Any) -> list[str]:
    """Totals, and every row whose float32 error is over the aim, beside the original's own rounding."""
    done = table[table.removed > 0]
    relu6 = done.saturated.notna()
    lines = [
        f"{len(table)} networks: {table.residuals.sum():.0f} residuals found, {table.removed.sum():.0f} removed, "
        f"{table.kept.sum():.0f} kept; {int(table.message.notna().sum())} networks with a message in place of figures. "
        f"Largest error in float64 {done.error_float64.max():.0e}; in float32 {done[~relu6].error_float32.max():.0e} without "
        f"ReLU6 and {done[relu6].error_float32.max():.0e} with it.",
        "",
    ]
    for row in done[done.error_float64 > 1e-10].itertuples():
        lines.append(
            f"- {row.net} is over the aim in float64 (1e-10): {row.error_float64:.1e}. The original itself moves by "
            f"{row.original_float64:.1e} on the same inputs when its weights are rounded once."
        )
    for row in done[done.error_float32 > relu6.map({True: 1e-4, False: 1e-5})].itertuples():
        lines.append(
            f"- {row.net} is over the aim in float32 (1e-5; with ReLU6 1e-4): {row.error_float32:.1e}. The original itself, in "
            f"float32 against float64 on the same inputs: {row.original_float32:.1e}."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NET", help="rows by name (tv:NAME, timm:NAME, ours)")
    parser.add_argument("--size", type=int, help="input size for all (default: 96, and what a row asks for)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="limit for one network")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="leave ONNX Runtime out")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is already there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.size, args.seed, args.onnx, args.out)
        return
    wanted = [net for net in NETS if not args.only or net.row in args.only or net.name in args.only]
    if not wanted:
        parser.error(f"no row is called {args.only}; there are {', '.join(net.row for net in NETS)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    for position, net in enumerate(wanted, 1):
        if args.overwrite or not finished(net):
            run(net, args.size or net.size or 96, args)
        facts = json.loads(result_path(net).read_text())
        counted = (
            f"{facts.get('removed')} of {facts.get('residuals')} removed, error {facts.get('error_float64', 0.0):.1e}"
        )
        print(f"[{position}/{len(wanted)}] {net.row}: {facts.get('message') or counted}", flush=True)
        write_report("python experiments/removal_coverage.py")


if __name__ == "__main__":
    main()
