"""Table of pruning over torchvision's and timm's networks: to half of their MACs, coupled and after RM, or the reason why not.

    python experiments/pruning_coverage.py                        # all networks; goes on where it was interrupted
    python experiments/pruning_coverage.py --only tv:resnet18 timm:rexnet_100 --overwrite
    python experiments/pruning_coverage.py --report               # the summary of what is there

Every network runs in a process of its own under limits of time and memory, with random weights, random batch norms and
no vector of parameters constant (fresh ones would hide faults), on the smallest images that it runs on (networks with windows: on
those that fill them). `coupled` is
`rmprune.prune` of the network as it is, `rm` the same of the chain that `remove_residuals` makes of it, both to 0.5 of
the MACs of the network as it is, ranked by filter norms, a tenth of each layer left. Then it is saved, loaded (equal
bit for bit), exported and run in ONNX Runtime. Writes results.csv and README.md in reports/pruning-coverage, and exits
with 1 where a result is wrong, a traceback raw, or fewer than 95 % were pruned to the budget.
"""

import argparse
import csv
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "reports" / "pruning-coverage"
RATIO, GOAL = 0.5, 0.95
FLOOR = 0.1  # of each layer stays; ranked by norms alone, whole layers would go, and the signal with them
ONNX_TOLERANCE = 1e-3  # of the largest output, float32; export_onnx allows more where float32 itself does more
SHOWN = ["net", "form", "input", "status", "macs", "error", "saved", "onnx", "trace_seconds", "seconds", "message"]
COLUMNS = [*SHOWN, "peak_gib", "commit"]
WRONG, RAW = ("wrong",), ("traceback",)

TORCHVISION = """
    alexnet vgg11 vgg11_bn resnet18 mobilenet_v2 squeezenet1_1 shufflenet_v2_x0_5 densenet121 mnasnet0_5 googlenet inception_v3
    efficientnet_b0 regnet_x_400mf regnet_y_400mf mobilenet_v3_small convnext_tiny swin_t vit_b_32 maxvit_t swin_v2_t
    resnext50_32x4d resnet50 efficientnet_v2_s segmentation:lraspp_mobilenet_v3_large segmentation:deeplabv3_mobilenet_v3_large
    segmentation:fcn_resnet50 segmentation:deeplabv3_resnet50 video:r3d_18 video:mc3_18 video:r2plus1d_18 video:s3d video:mvit_v2_s
    video:mvit_v1_b video:swin3d_t
"""
TORCHVISION_REST = """
    mobilenet_v3_large mnasnet0_75 mnasnet1_0 mnasnet1_3 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
    resnet34 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2 resnext101_32x8d resnext101_64x4d regnet_x_800mf regnet_x_1_6gf
    regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf
    regnet_y_32gf regnet_y_128gf densenet161 densenet169 densenet201 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
    efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_m efficientnet_v2_l vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
    convnext_small convnext_base convnext_large vit_b_16 vit_l_16 vit_l_32 vit_h_14 swin_s swin_b swin_v2_s swin_v2_b
    segmentation:fcn_resnet101 segmentation:deeplabv3_resnet101 video:swin3d_s video:swin3d_b
"""
TIMM = """
    resnet10t mobilenetv2_050 mobilenetv1_100 efficientnet_lite0 tf_efficientnet_lite0 fbnetc_100 spnasnet_100 semnasnet_075
    mnasnet_small tinynet_e mixnet_s efficientnet_es mobilenetv3_small_050 lcnet_050 mobilenetv4_conv_small
    mobilenetv4_hybrid_medium hardcorenas_a ghostnet_050 ghostnetv2_100 ghostnetv3_100 repghostnet_050 mobileone_s0 repvgg_a0
    repvit_m0_9 gernet_s regnetz_005 regnetx_002 regnety_002 regnetz_b16 regnetv_040 resnet18d resnet26t resnetblur18 seresnet18
    ecaresnet50t ecaresnext26t_32x4d skresnet18 resnest14d res2net50_14w_8s res2next50 resnetrs50 resnetv2_18 resnetv2_18d
    resnetv2_50d_gn resnetv2_50x1_bit legacy_seresnet18 legacy_seresnext26_32x4d seresnext26ts gcresnext26ts bat_resnext26ts
    eca_resnext26ts botnet26t_256 halonet26t lambda_resnet26t resnet51q vgg11_bn vovnet39a ese_vovnet19b_slim_dw densenet121
    rdnet_tiny dla34 dla46_c dla60x dpn48b dpn68 hrnet_w18_small selecsls42b hgnet_tiny hgnetv2_b0 tresnet_m rexnet_100 rexnetr_100
    darknet53 darknetaa53 cspdarknet53 cspresnet50 cspresnext50 cs3darknet_s cspnext_tiny xception41 xception41p legacy_xception
    inception_v3 inception_v4 inception_resnet_v2 nasnetalarge pnasnet5large nf_resnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0
    convmixer_768_32 starnet_s1 fasternet_t0 shvit_s1 lowformer_b0 efficientvit_b0 efficientvit_m0 edgenext_xx_small convnext_atto
    convnextv2_atto inception_next_atto mambaout_femto focalnet_tiny_srf poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18
    fastvit_t8 mobilevit_xxs mobilevitv2_050 efficientformer_l1 efficientformerv2_s0 swiftformer_xs iformer_t csatv2 nextvit_small
    mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 deit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 vit_relpos_small_patch16_224 vitamin_small_224 eva02_tiny_patch14_224 beit_base_patch16_224
    samvit_base_patch16_224 sam2_hiera_tiny hiera_tiny_224 cait_xxs24_224 crossvit_tiny_240 convit_tiny coat_tiny
    coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 davit_tiny gcvit_xxtiny levit_128s levit_conv_128s
    mvitv2_tiny nest_tiny pit_ti_224 pvt_v2_b0 sequencer2d_s swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_pcpvt_small twins_svt_small visformer_tiny volo_d1_224 xcit_nano_12_p16_224
    efficientvim_m1 cpubone_b0_bfrobust lcnetv2_small
"""
NETS = [
    *[f"tv:{name}" for name in TORCHVISION.split()],
    *[f"timm:{name}" for name in TIMM.split()],
    *[f"tv:{name}" for name in TORCHVISION_REST.split()],
]
SIZES = [64, 96, 128, 160, 192, 224, 240, 256, 288]
POOLED = """
    tv:alexnet tv:vgg11 tv:vgg11_bn tv:vgg13 tv:vgg13_bn tv:vgg16 tv:vgg16_bn tv:vgg19 tv:vgg19_bn
"""  # else torch cannot export their pool to ONNX
WINDOWS = """
    tv:swin_t tv:swin_s tv:swin_b timm:swin_tiny_patch4_window7_224 timm:twins_svt_small timm:davit_tiny
    timm:samvit_base_patch16_224 timm:sam2_hiera_tiny
"""  # on smaller images most of what their windows hold is padding, which costs MACs in attention alone
LARGER: dict[str, list[Any]] = {
    **{net: [224] for net in (*POOLED.split(), *WINDOWS.split())},
    **{f"tv:swin_v2_{size}": [256] for size in ("t", "s", "b")},
    **{f"tv:video:swin3d_{size}": [(8, 112)] for size in ("t", "s", "b")},
}
CLIPS = [(8, 64), (8, 112), (16, 224)]  # frames and size of a video
SIZED = {"vit": "image_size", "maxvit": "input_size"}  # torchvision's networks that are built for one size of images


# ---------------------------------------------------------------- one network, in its own process


def build(net: str) -> tuple[Any, Any]:
    """The network in eval mode, and the smallest input of the lists above that it runs on."""
    import torch

    tries: list[Any] = LARGER.get(net, list(CLIPS) if net.startswith("tv:video:") else list(SIZES))
    for shape in tries:
        try:
            torch.manual_seed(0)
            model = build_for(net, shape).eval()
            x = torch.randn(2, 3, *([shape, shape] if isinstance(shape, int) else [shape[0], shape[1], shape[1]]))
            with torch.no_grad():
                model(x)
        except Exception:
            if shape == tries[-1]:
                raise
            continue
        return model, x
    raise AssertionError


def build_for(net: str, shape: Any) -> Any:
    import timm
    import torchvision

    source, _, name = net.partition(":")
    if source == "timm":
        try:
            return timm.create_model(name, img_size=shape)
        except TypeError:
            return timm.create_model(name)
    name = name.rpartition(":")[2]
    settings: dict[str, Any] = {}
    if ":" not in net.removeprefix("tv:") and name.split("_")[0] in SIZED:
        settings = {"vit": {"image_size": shape}, "maxvit": {"input_size": (shape, shape)}}[name.split("_")[0]]
    if "segmentation" in net:
        settings = {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        settings = {"init_weights": False}
    return torchvision.models.get_model(name, weights=None, **settings)


def randomise(model: Any, x: Any) -> None:
    """Parameters that start constant (gains, shifts, layer scales, zero-initialised ones) become random, batch norms get statistics
    of noise, perturbed."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                shift = parameter.flatten()[0] == 0
                parameter.normal_(0, 0.1) if shift else parameter.uniform_(0.5, 1.5)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        for norm in norms:
            norm.momentum = None  # plain averages
            norm.reset_running_stats()
            norm.train()
        if norms:
            model(torch.randn_like(x))
        for norm in norms:
            norm.momentum = 0.1
            norm.eval()
            norm.running_var.clamp_(min=max(1e-3, 0.01 * float(norm.running_var.mean())))
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)


@contextmanager
def reasons(facts: dict[str, Any], what: str = "") -> Iterator[None]:
    """Turns what goes wrong into the status and message of a row; refusals and faults are told apart."""
    from rmprune.errors import InfeasibleBudget, NotEquivalent, RmpruneError

    try:
        yield
    except Exception as error:
        kinds = {InfeasibleBudget: "infeasible", NotEquivalent: "wrong", RmpruneError: "refused"}
        facts["status"] = next((word for kind, word in kinds.items() if isinstance(error, kind)), "traceback")
        where = traceback.extract_tb(error.__traceback__)[-1]
        raw = f" ({Path(where.filename).name}:{where.lineno})" if facts["status"] == "traceback" else ""
        name = f"{type(error).__name__}: " if raw else ""
        said = re.sub(r" at 0x[0-9a-f]+", "", (str(error).splitlines() or [""])[0])  # the same at each run
        facts["message"] = f"{what}{name}{said}{raw}"[:400]


def cut(model: Any, x: Any, whole: int) -> dict[str, Any]:
    """All facts of one form of a network."""
    import torch

    import rmprune
    from rmprune.onnx.export import export_onnx

    facts: dict[str, Any] = {"status": "pruned", "message": ""}
    start = time.process_time()
    with reasons(facts):
        with suppress(rmprune.RmpruneError):  # `prune` says it, or finds a way
            rmprune.pruning.find_structure(model, x)
        facts["trace_seconds"] = round(time.process_time() - start, 1)
        budget = rmprune.Budget(macs_ratio=RATIO, reference_macs=whole, min_fraction=FLOOR)
        pruned = rmprune.prune(model, x, importance="magnitude", budget=budget)
        facts["seconds"] = round(time.process_time() - start, 1)
        facts["error"] = f"{pruned.rmprune_facts['cut_error']:.1e}"
        facts["macs"] = round(rmprune.count_macs(pruned, x) / whole, 3)
        if facts["macs"] > RATIO + 1e-6:
            facts |= {"status": "wrong", "message": f"{facts['macs']} of the MACs left, and not a word"}
    if "macs" not in facts:
        return facts
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        said: dict[str, Any] = {}
        with reasons(said, "save: "):
            again = rmprune.load(saved(pruned, Path(folder) / "net", x))
            equal = all(map(torch.equal, tensors(again(x)), tensors(pruned(x))))
            said |= {} if equal else {"status": "wrong", "message": "save: the loaded network is another"}
        facts["saved"] = said.get("status", "equal")
        told: dict[str, Any] = {}
        with reasons(told, "onnx: "):
            facts["onnx"] = f"{export_onnx(pruned, x, Path(folder) / 'net.onnx', tolerance=ONNX_TOLERANCE):.0e}"
        facts["onnx"] = told.get("status", facts.get("onnx"))
    for later in (said, told):
        if later.get("status") in (*WRONG, *RAW):
            facts["status"] = later["status"]
        facts["message"] = " | ".join(filter(None, [facts["message"], later.get("message")]))
    return facts


def saved(network: Any, path: Path, x: Any) -> Path:
    """Without examples where that goes; code that asks for sizes needs them."""
    import rmprune

    try:
        return rmprune.save(network, path)
    except rmprune.RmpruneError:
        return rmprune.save(network, path, example_inputs=x)


def tensors(outputs: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return list(tree_leaves(outputs))


def worker(net: str, gib: float, seconds: int, out: Path) -> None:
    """Both forms of a network; each is written as soon as it is known."""
    import rmprune

    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    model, x = build(net)
    randomise(model, x)
    facts: dict[str, Any] = {}
    with reasons(facts, "count_macs: "):
        whole = rmprune.count_macs(model, x)
    rows: list[dict[str, Any]] = []

    def write(form: str, found: dict[str, Any]) -> None:
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
        rows.append({"net": net, "form": form, "input": "x".join(map(str, x.shape[1:])), "peak_gib": peak} | found)
        out.write_text(json.dumps(rows))

    if facts:
        return write("coupled", facts)
    write("coupled", cut(model, x, whole))
    facts = {}
    with reasons(facts, "removal: "):
        plain = rmprune.remove_residuals(model, x).model
        facts = cut(plain, x, whole)
    if facts["status"] != "traceback" and facts["message"].startswith("removal: "):
        facts["status"] = "not proved" if facts["status"] == "wrong" else "no removal"  # refused by the proof
    write("rm", facts)


# ---------------------------------------------------------------- all of them


def run(net: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, from a process of its own; the form in which it ended without a row gets one that says how."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--worker", net, "--gib", str(args.gib), "--timeout", str(args.timeout)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, check=False, env=environment
        )
        rows = json.loads(out.read_text()) if out.exists() else []
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        late = done.returncode == -signal.SIGXCPU
        message = (
            f"more than {args.timeout} CPU seconds" if late else f"process ended with {done.returncode}: {said}"[:400]
        )
        form = "rm" if rows else "coupled"
        rows.append({"net": net, "form": form, "status": "time" if late else "traceback", "message": message})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    for row in rows:
        row["commit"] = commit.stdout.strip()
        if "can't allocate" in row["message"] or "MemoryError" in row["message"]:
            row |= {"status": "memory", "message": f"more than {args.gib} GiB"}
    return rows


@contextmanager
def table() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """{network: its rows} of results.csv, written back at the end; two runs may go on beside each other."""
    REPORT.mkdir(parents=True, exist_ok=True)
    path = REPORT / "results.csv"
    with (Path(tempfile.gettempdir()) / "pruning-coverage.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found: dict[str, list[dict[str, Any]]] = {}
        if path.exists():
            with path.open() as file:
                for row in csv.DictReader(file):
                    found.setdefault(row["net"], []).append(row)
        before = json.dumps(found)
        yield found
        if json.dumps(found) != before:
            partial = path.with_suffix(".tmp")
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
                writer.writeheader()
                writer.writerows(row for net in NETS for row in found.get(net, ()))
            partial.replace(path)


def summary(rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Lines of the report, and whether all goals are met."""
    coupled = [row for row in rows if row["form"] == "coupled"]
    removed = [row for row in rows if row["form"] == "rm" and row["status"] != "no removal"]
    wrong = [row for row in rows if row["status"] in WRONG]
    raw = [row for row in rows if row["status"] in RAW]
    pruned = [row for row in coupled if row["status"] == "pruned"]
    part = len(pruned) / max(1, len(coupled))
    others = Counter(row["status"] for row in coupled if row["status"] != "pruned")
    errors = [float(row["error"]) for row in rows if row["error"]]
    onnx = [row for row in rows if row["status"] == "pruned" and row["onnx"][:1].isdigit()]
    saved = sum(row["saved"] == "equal" for row in rows)
    slow = [row for row in coupled if float(row["trace_seconds"] or 0) > 20 or row["status"] == "time"]
    done = sum(row["status"] == "pruned" for row in removed)
    rest = Counter(row["status"] for row in removed if row["status"] != "pruned")
    met = not wrong and not raw and part >= GOAL
    lines = [
        f"- {len(coupled)} networks of {len(NETS)}. **Pruned to {RATIO} of their MACs: {len(pruned)} ({part:.1%}; goal {GOAL:.0%})**; "
        f"after RM {done} of the {len(removed)} where removal goes ({told(rest)}; memory: over the limit of one process).",
        f"- Wrong results: {len(wrong)} (goal 0). Raw tracebacks: {len(raw)} (goal 0).",
        f"- Largest error of the proof in float64: {max(errors, default=0):.0e}. Loaded and equal bit for bit: {saved} of {len(errors)}; "
        f"exported and equal in ONNX Runtime: {len(onnx)}.",
        f"- Tracing and grouping over 20 CPU seconds: {len(slow)}{': ' + ', '.join(row['net'] for row in slow) if slow else ''}.",
        f"- What became of the others: {told(others)}.",
        f"- Rows by the commit they were made at (the column of results.csv): {told(Counter(row['commit'] for row in rows))}.",
        f"- All goals met: {'yes' if met else 'no'}.",
    ]
    return lines, met


def told(counts: Counter[str]) -> str:
    """How many of each kind, in words."""
    return ", ".join(f"{n} {word}" for word, n in counts.items()) or "there are none"


def write_report(rows: list[dict[str, Any]]) -> bool:
    lines, met = summary(rows)
    body = [
        "# Networks pruned to half of their MACs",
        "",
        "Made by `python experiments/pruning_coverage.py` ([how](../../experiments/pruning_coverage.py)); random weights; CPU seconds of",
        "one thread of a machine with other work on it.",
        "`error`: of the proof of the cut, float64. `onnx`: ONNX Runtime against PyTorch, float32.",
        "",
        *lines,
        "",
        "| network | form | input | status | MACs | error | saved | onnx | tracing s | all s | reason |",
        "| --- | --- | --- | --- | ---: | ---: | --- | --- | ---: | ---: | --- |",
    ]
    body += ["| " + " | ".join(str(row[key]).replace("|", "/") for key in SHOWN) + " |" for row in rows]
    (REPORT / "README.md").write_text("\n".join(body) + "\n")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NET", help="networks by name (tv:NAME, tv:video:NAME, timm:NAME)")
    parser.add_argument("--again", nargs="+", metavar="STATUS", help="networks with a row of this status once more")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="limit of CPU time for one network")
    parser.add_argument("--gib", type=float, default=8, help="limit of memory for one network")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is already there")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.gib, args.timeout, args.out)
        return
    wanted = args.only or NETS
    if unknown := [net for net in wanted if net not in NETS]:
        parser.error(f"not on the list: {', '.join(unknown)}")
    for net in [] if args.report else wanted:
        with table() as found:
            statuses = {row["status"] for row in found.get(net, ())}
        if statuses and not args.overwrite and not statuses & set(args.again or ()):
            continue
        rows = run(net, args)
        with table() as found:
            found[net] = rows
        for row in rows:
            print(f"{net} {row['form']}: {row['status']} {row.get('error', '')} {row.get('message', '')}", flush=True)
    with table() as found:
        rows = [row for net in NETS for row in found.get(net, ())]
        met = write_report(rows)
    print("\n".join(summary(rows)[0]))
    sys.exit(not met)


if __name__ == "__main__":
    main()
