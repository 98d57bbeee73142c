"""The model card of a deployed network, from its run's record and what deploying found. It measures nothing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_ROWS = 30  # of classes; with more there is no table of them


def model_card(record: Mapping[str, Any], name: str, facts: Mapping[str, Any]) -> str:
    """Markdown for `name`, a network of `record`; `facts`: as `deploy/model.json` holds them."""
    entry, original = record[name], record["original"]
    images = "validation images" if facts.get("test_is_validation") else "test images"
    pillow, file = (" pillow", "IMAGE") if facts["preprocessing"] is not None else ("", "FILE.npy")
    parts = [
        f"# {_plain(record['model'])}, {_plain(_kind(record, name))}",
        f"A network of `rmprune` {record['environment']['versions'].get('rmprune', '')}, made by",
        f"```\n{_plain(record['command'])}\n```",
        f"It is `{facts['network']}` of that run: {facts['chosen']} ([all networks of the run](ranking.json)).",
        "## Use it",
        f"```\npip install onnxruntime numpy{pillow}\npython predict.py {file}\n```",
        _inputs(facts),
        "## How good it is",
        _accuracy(record, entry, original, images),
        _int8(facts, images),
        *_classes(entry, images),
        "## How fast it is",
        _costs(entry, original),
        _times(entry, record["environment"]),
        "## How it was made",
        _made(record, entry, facts),
        _layers(entry),
        "## Licence",
        "None is stated here. Whether the training images, and pretrained weights where there were any, allow what you plan is "
        "yours to find out, and to write here.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kind(record: Mapping[str, Any], name: str) -> str:
    if name in ("original", "plain"):
        return {"original": "as it was trained", "plain": "its residuals removed"}[name]
    budget = "".join(
        f", {value:g} of its channels removed" if kind == "ratio" else f" to {kind.replace('_', ' ')} {value:g}"
        for kind, value in record.get("budget", {}).items()
    )
    return f"slimmed by {record[name].get('method', name)}{budget}"


def _inputs(facts: Mapping[str, Any]) -> str:
    how, shape, classes = facts["preprocessing"], ", ".join(map(str, facts["input_shape"])), facts["classes"]
    if how is None:
        read = "as the loaders of its training made them, which this folder does not know; `predict.py` takes `.npy` arrays"
    else:
        steps = ["grey" if len(how["mean"]) == 1 else "RGB"]
        if how["depth"] < 16:
            steps.append(f"of 16-bit images {how['depth']} bits")
        if how["resize"] is not None:
            steps.append(f"the shorter side scaled to {how['resize']} pixels, the middle cropped")
        mean, std = (", ".join(f"{value:.4g}" for value in how[key]) for key in ("mean", "std"))
        read = ", ".join([*steps, f"divided by 255, minus ({mean}), divided by ({std})"])
    told = "what its loss made of it; it is no classifier"
    if classes is not None:
        more = ", ..." if len(classes) > 10 else ""
        told = f"a score for each of {len(classes)} classes, {', '.join(map(_plain, classes[:10]))}{more}"
    return (
        f"It takes float32 [N, {shape}], any number N of images: {read}. It gives {told}. `model.json` says all of this for programs, and "
        "`predict.py` does it."
    )


def _accuracy(record: Mapping[str, Any], entry: Mapping[str, Any], original: Mapping[str, Any], images: str) -> str:
    measured = [("balanced_accuracy", "balanced accuracy", "{:.2%}"), ("auc", "AUC", "{:.3f}")]
    score, form = ("accuracy", "{:.2%}") if entry["accuracy"] is not None else ("loss", "{:.4g}")
    rows = [(score, form.format(entry[score]), form.format(original[score]))]
    rows += [
        (label, shown.format(entry[key]), shown.format(original[key]))
        for key, label, shown in measured
        if entry.get(key) is not None and original.get(key) is not None
    ]
    when = (
        "read once, at the end"
        if images == "test images"
        else "by which networks may have been chosen; there are no others"
    )
    return f"{images.capitalize()} of {_plain(record.get('dataset', ''))}, {when}:\n\n" + _table(
        ("", "this network", "the trained original"), rows
    )


def _int8(facts: Mapping[str, Any], images: str) -> str:
    int8 = facts["int8"]
    if "refused" in int8:
        return f"There is no int8 form: {_plain(int8['refused'])}."
    found = (
        f"on the {int8['images']} validation images int8 is right on {int8['int8']:.2%} and float32 on {int8['float32']:.2%}, both in ONNX "
        f"Runtime; it may lose {100 * int8['limit']:g} percentage points"
    )
    if not int8["kept"]:
        return f"There is no int8 form: {found}."
    return f"`model-int8.onnx` holds its accuracy: {found}. On the {images} it is right on {int8['test_accuracy']:.2%}."


def _classes(entry: Mapping[str, Any], images: str) -> list[str]:
    classes = entry.get("classes", [])
    if not classes or len(classes) > MOST_ROWS:
        return []
    shown = [
        (one["name"], one["images"], *("" if one[k] is None else f"{one[k]:.1%}" for k in ("recall", "precision")))
        for one in classes
    ]
    return [_table(("class", images, "recall", "precision"), shown)]


def _costs(entry: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    rows = [
        (label, f"{entry[key]:,}", f"{original[key]:,}", f"{entry[key] / original[key]:.2f}")
        for key, label in (
            ("macs", "multiply-accumulates of an image"),
            ("params", "parameters"),
            ("activation_bytes", "bytes of float32 activations of an image, peak"),
        )
        if key in entry and key in original
    ]
    return _table(("", "this network", "the trained original", "ratio"), rows)


def _times(entry: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    if not entry["latency"]:
        return ""
    rows = [
        (
            f"{one['backend']} ({one.get('number_format', 'float32')})",
            one["device"],
            one["threads"],
            one["batch_size"],
            f"{one['median_ms']:.4g} ({one['q1_ms']:.4g} to {one['q3_ms']:.4g})",
            f"{one['ratio']:.2f}" if "ratio" in one else "",
        )
        for one in entry["latency"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        _table(("backend", "device", "threads", "batch", "ms a batch, median (quartiles)", "of the original's"), rows)
        + f"\n\nMeasured on {_plain(environment['processor'])}; {_plain(versions)}."
        " `python -m rmprune measure RUN` measures again, where it shall run."
    )


def _made(record: Mapping[str, Any], entry: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    lines = []
    if removal := entry.get("removal") or (None if entry.get("residuals") else record["removal"]):
        lines.append(
            f"{len(removal['removed'])} residual connections were removed exactly, {len(removal['kept'])} kept; the largest error in "
            f"float64 was {removal['max_error']:.1e} of what the inputs change in the outputs."
        )
    if (cut := entry.get("cut_error")) is not None:
        lines.append(
            f"Cuts of its channel groups differ in float64 by {cut:.1e} from the whole network with these channels at 0."
        )
    lines.append(
        f"`model.onnx` in ONNX Runtime differs from PyTorch by {facts['onnx_error']:.1e} of the largest output."
    )
    if blocks := entry.get("plan", {}).get("blocks"):
        lines.append("Blocks: " + ", ".join(f"{_plain(block)} {choice}" for block, choice in blocks.items()) + ".")
    return "\n".join(lines)


def _layers(entry: Mapping[str, Any]) -> str:
    layers = entry.get("layers", [])
    rows = [
        (n["name"], n["type"], n["cin"], n["cout"], "x".join(map(str, n.get("kernel", []))), n.get("groups", ""))
        for n in layers
    ]
    head = ("layer", "type", "channels in", "out", "kernel", "groups")
    return f"<details><summary>{len(rows)} layers</summary>\n\n{_table(head, rows)}\n\n</details>" if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(text: Any) -> str:
    """Text of others (names of classes, of folders) in one line that is no markup of a page."""
    return re.sub(r"\s+", " ", str(text)).replace("<", "&lt;").replace("`", "'")
