"""Damaged and malicious files, drawn at random: `python tests/fuzz.py --count 10000 --seed 0` reads them and counts what became of them.

Every file must load or be refused with an RmpruneError that names it, within 10 s and 1 GiB, without running code. Each kind is read in
a process of its own, a hang or a crash included in the count; what failed is printed with the draw that makes it again (`one`).
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import functools
import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnx
import torch
from hypothesis import strategies as st
from onnx_examples import residual
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from rmprune.artifact import files as artifact
from rmprune.artifact.weights import load_checkpoint_into
from rmprune.config import AmcConfig, DataConfig, PruneConfig, RemeasureConfig, SlimConfig, TrainConfig, TrainRunConfig
from rmprune.config.toml import from_toml, to_toml
from rmprune.data.load import Dataset
from rmprune.data.splits import Images, TensorSplit
from rmprune.errors import RmpruneError
from rmprune.measure.memory import PeakMemory
from rmprune.models.families import create_network
from rmprune.onnx.constants import FOLDED
from rmprune.onnx.read import ONNX_READERS
from rmprune.onnx.runtime import checked_network
from rmprune.report.screen import refusals, summary_tables
from rmprune.report.tables import rows
from rmprune.runs.notes import read_notes
from rmprune.runs.records import read_record
from rmprune.training import fit

SECONDS, MIB = 10, 1024
Changes = list[tuple[int, int, int]]  # how, where and what; each is taken modulo what there is
DRAWS = st.tuples(st.integers(0, 99), st.lists(st.tuples(*[st.integers(0, 9999)] * 3), min_size=1, max_size=4))
PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "..",
    "\\\\server\\x",
    "a" * 5000,
    "a." * 5000 + "a",
    "",
    "\0",
    "é\u202e\x1b[31m[/red]",
]
CODE = [
    "os.system",
    "__class__",
    "__import__('os').system('touch CANARY')",
    "x'); open('CANARY', 'w'); ('",
    "eval",
    "forward",
    "self",
]
NUMBERS = [
    "-1",
    "0",
    "1e999",
    "-1e308",
    "NaN",
    "Infinity",
    "0.5",
    "1000000000",
    str(2**31),
    str(2**40),
    str(2**63),
    str(10**400),
    "9" * 5000,
]
SHAPES = [
    "null",
    "true",
    "[]",
    "{}",
    "[[]]",
    "[" * 10_000 + "]" * 10_000,
    '{"a":' * 10_000 + "1" + "}" * 10_000,
    "[" * 90 + "]" * 90,
    '{"tuple":' * 40 + "1" + "}" * 40,
]
WORDS = [
    '"\\ud800"',
    '{"a": 1, "a": 2}',
    '{"float": "nan"}',
    '{"dtype": []}',
    '{"node": "x"}',
    '{"slice": [1]}',
    '"conv"',
    "[2, 2, 2]",
    "[1099511627776]",
    "[4194304, 4194304]",
]
ODD = [*map(json.dumps, (*PATHS, *CODE)), *NUMBERS, *SHAPES, *WORDS]  # JSON, well and badly formed


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def damage(value: Any, changes: Changes, odd: Callable[[int], Any]) -> Any:
    """A copy in which values are replaced, taken away, put elsewhere, renamed or said twice; one change in two near the top."""
    value = copy.deepcopy(value)
    for how, where, what in changes:
        found = list(places(value))
        if where % 2:
            found = [(holder, key) for holder, key in found if holder is value]
        if not found:
            break
        holder, key = found[where % len(found)]
        other, name = found[what % len(found)]
        if how % 6 < 3:
            holder[key] = odd(what)
        elif how % 6 == 3:
            del holder[key]
        elif how % 6 == 4:
            holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder, dict):
            holder[(*PATHS, *CODE)[what % (len(PATHS) + len(CODE))]] = holder.pop(key)
        else:
            holder.extend(holder[: what % 3])
    return value


def damage_json(value: Any, changes: Changes) -> str:
    text = json.dumps(damage(value, changes, lambda what: f"<odd {what % len(ODD)}>"))
    for number, odd in enumerate(ODD):
        text = text.replace(f'"<odd {number}>"', odd)
    return text


def damage_bytes(data: bytes, changes: Changes) -> bytes:
    for how, where, what in changes:
        at = where % (len(data) + 1)
        part = data[at : at + 1 + what % 64]
        data = [
            data[:at],
            data[:at] + bytes([what % 256]) + data[at + 1 :],
            data[:at] + part + data[at:],
            data[:at] + data[at + len(part) :],
            data[:at] + b"\xff" * (what % 16) + data[at:],
            b"\xef\xbb\xbf" + data,
        ][how % 6]
    return data


def misplace(file: Path, how: int) -> None:
    """Something else in the place of a file: nothing, a folder, a pipe, a device, a link in a circle or elsewhere, far too much."""
    content = file.read_bytes()
    file.unlink()
    if how % 8 == 1:
        file.mkdir()
    elif how % 8 == 2:
        os.mkfifo(file)
    elif how % 8 in (3, 4, 5):
        file.symlink_to(["/dev/zero", file.name, "/etc/passwd"][how % 3])
    elif how % 8 == 6:
        file.write_bytes(content)
        os.truncate(file, 2**40)
    elif how % 8 == 7:
        outside = file.parent.with_name("outside")
        outside.write_bytes(content)
        file.symlink_to(outside)


# ------------------------------------------------------------------------------------------------ the kinds of file


class Net(nn.Module):
    """Layers, functions, methods, a direct parameter, a constant, a shared layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.twin = nn.Conv2d(1, 4, 3, padding=1)
        self.twin.weight = self.conv.weight
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.ones(4, 1, 1), persistent=False)
        self.act = self.again = nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x))) * self.scale + self.shift
        y = torch.cat([y, self.again(self.twin(x))[:, :2, :, :]], 1)[:, :4]
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).view(y.size(0), -1))


@functools.cache
def good_artifact() -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        path = artifact.save(Net().eval(), Path(folder) / "a", extra={"input_shape": [1, 8, 8]})
        return (path / artifact.ARCHITECTURE).read_text(), (path / artifact.WEIGHTS).read_bytes()


def damage_safetensors(data: bytes, changes: Changes) -> bytes:
    """With another header, or one of another length."""
    size = int.from_bytes(data[:8], "little")
    header = damage_json(json.loads(data[8 : 8 + size]), changes).encode(errors="replace")
    promised = [len(header)] * 4 + [2**63, 2**27, 0, len(header) - 1]
    return promised[changes[0][2] % 8].to_bytes(8, "little") + header + data[8 + size :]


def make_artifact(folder: Path, mode: int, changes: Changes) -> None:
    text, weights = good_artifact()
    content = json.loads(text)
    data = text.encode()
    if mode % 10 == 7:
        weights = damage_bytes(weights, changes)
    elif mode % 10 in (8, 9):
        weights = damage_safetensors(weights, changes)
    content["sha256"] = hashlib.sha256(weights).hexdigest() if changes[0][1] % 8 else "0" * 64
    if mode % 10 < 5:  # most of them in the description
        content["description"] = {"<here>": 1}
        inner = damage_json(json.loads(text)["description"], changes)
        data = json.dumps(content).replace('{"<here>": 1}', inner).encode(errors="replace")
    elif mode % 10 == 5:
        data = damage_json(content, changes).encode(errors="replace")
    elif mode % 10 == 6:
        data = damage_bytes(data, changes)
    else:
        data = json.dumps(content).encode()
    folder.mkdir()
    (folder / artifact.ARCHITECTURE).write_bytes(data)
    (folder / artifact.WEIGHTS).write_bytes(weights)
    if mode >= 94:
        misplace(folder / (artifact.ARCHITECTURE, artifact.WEIGHTS)[mode % 2], changes[0][2])


def read_artifact(folder: Path) -> None:
    artifact.is_artifact(folder)
    model = artifact.load(folder)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    artifact.read_extra(folder)


CONFIGS = (
    SlimConfig(prune=PruneConfig(ratio=(0.5,))),
    AmcConfig(),
    TrainRunConfig(),
    RemeasureConfig(runs=(Path("a"),)),
)


def make_config(file: Path, mode: int, changes: Changes) -> None:
    config = CONFIGS[mode % len(CONFIGS)]
    lines = to_toml(config).splitlines()
    odd = [*ODD, "1979-05-27", "'''", "0x7fffffffffffffff", "{a.b.c = 1}", "[1, 'a', 2.0]", '"none"']
    for how, where, what in changes:
        at = where % len(lines)
        key = lines[at].partition("=")[0]
        lines[at] = [f"{key}= {odd[what % len(odd)]}"] * 4 + [lines[where % 7]] + [f"{'a.' * (what * 3)}{key}= 1"]
        lines[at] = lines[at][how % 6]
    data = "\n".join(lines).encode(errors="replace")
    file.write_bytes(damage_bytes(data, changes) if mode > 80 else data)
    if mode >= 96:
        misplace(file, changes[0][2])


def read_config(file: Path) -> None:
    for config in CONFIGS:
        with contextlib.suppress(RmpruneError):
            from_toml(type(config), file)
    from_toml(SlimConfig, file)


def good_record() -> dict[str, Any]:
    place = {"backend": "eager", "device": "cpu", "threads": 2, "batch_size": 1}
    times = {"median_ms": 1.0, "q1_ms": 0.9, "q3_ms": 1.2, "ratio": 1.0}
    network = {"accuracy": 0.9, "macs": 1000, "params": 10, "latency": [place | times]}
    return {
        "schema": 1,
        "command": "python -m rmprune slim",
        "config": {"model": "resnet20", "data": {"dataset": "digits"}, "macs_ratio": 0.5},
        "seed": 0,
        "model": "resnet20",
        "input_shape": [1, 8, 8],
        "method": "rm,coupled",
        "environment": {"versions": {"torch": "2"}, "processor": "x", "threads": 2},
        "removal": {"removed": ["layer1.0"], "kept": {"a": "b"}, "max_error": 1e-15},
        "refused": {"rm": "why"},
        **{name: copy.deepcopy(network) for name in ("original", "plain", "pruned")},
    }


def read_and_show(file: Path) -> None:
    """A record as `report` reads it."""
    record = read_record(file)
    rows(record, run="a")
    refusals(record)
    for table in summary_tables(record):
        Console(file=io.StringIO()).print(table)


def make_json(good: Any, file: Path, mode: int, changes: Changes) -> None:
    text = damage_json(good, changes)
    data = text.encode(errors="replace")
    file.write_bytes(damage_bytes(json.dumps(good).encode(), changes) if mode > 85 else data)
    if mode >= 96:
        misplace(file, changes[0][2])


@functools.cache
def training() -> tuple[nn.Module, Dataset, TrainConfig, Path]:
    """A network, its data and settings, and the checkpoint of its training: two steps of two."""
    split = TensorSplit(
        Images(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 2),
        torch.zeros(1),
        torch.ones(1),
        may_flip=False,
    )
    data = Dataset("zeros", 2, (1, 8, 8), split, split, split, DataConfig(batch_size=4))
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), TrainConfig(epochs=1, precision="float32")
    checkpoint = Path(tempfile.mkdtemp()) / "good.pt"
    fit(model, data, config, seed=0, checkpoint=checkpoint, progress=False, hook=Shrink())
    return model, data, config, checkpoint


class Shrink:
    """A hook that puts another network in place, so that the checkpoint describes it, and remembers its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, state: Any) -> None:
        self.steps += 1
        if self.steps == 1:
            state.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


class Evil:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def odd_value(what: int) -> Any:
    """Numbers, texts, tensors and calls that have no place in a checkpoint."""
    one = torch.ones(1)
    values = [
        *(None, True, -1, 0, 1.5, 2**63, 10**300, float("nan"), float("inf"), "", "é\u202e", b"\0", [], {}, (1,), torch.float32),
        *(one, one.expand(2**40), torch.ones(2, 3), torch.eye(2).to_sparse(), torch.ones(3, device="meta")),
        *(one.double(), one.long(), one.bool()),
        *(torch.ones(3, 64).cfloat(), torch.full((2,), float("nan")), one * 1j),
        *(Evil(os.system, "touch CANARY"), Evil(eval, "open('CANARY', 'w')"), Evil(bytearray, 2**33), Evil(torch.Tensor, 2**33)),
        *(Evil(torch.hub.load, "a/b", "c"), Evil(torch.load, "x"), Evil(Path.touch, Path("CANARY")), Evil(getattr, "x", "__class__")),
        *(json.loads("[" * 500 + "]" * 500), "[" * 100_000, '{"kind": "sequential"}', {1: 2}, {"a": one}, torch.Size([2])),
    ]  # fmt: skip
    return values[what % len(values)]


def damage_archive(data: bytes, mode: int, changes: Changes) -> bytes:
    """The zip archive of torch.save with other parts: pickles of any size and depth, parts compressed, missing, twice or too short."""
    how, where, what = changes[0]
    old, made = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    parts = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    numbers = [b"\x80\x02" + op * 2**17 + b"." for op in (b"]", b"}", b"(", b")", b"\x8f", b"]\x85")]
    pickles = [
        *numbers,
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"),
        b"r\xff\xff\xff\x7f",
        b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".",
    ]
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if how % 7 == 1 else zipfile.ZIP_STORED) as new:
        for number, (name, content) in enumerate(parts):
            if name.endswith("data.pkl"):
                content = [
                    damage_bytes(content, changes),
                    promise_more(content, what),
                    pickles[what % len(pickles)],
                    content,
                ][mode % 4]
            elif number == where % len(parts):
                content = [content, b"", bytes(2**26 if how % 7 == 1 else 100), content[:-1], content][how % 5]
                name = [name, name, name.upper(), f"../{name}", "/etc/passwd", name][what % 6]
            new.writestr(name, content)
            if how % 7 == 2 and number == where % len(parts):
                with contextlib.suppress(UserWarning):
                    new.writestr(name, content)
    return made.getvalue()


def promise_more(content: bytes, what: int) -> bytes:
    """A pickle whose small numbers (sizes, strides, offsets) at one place are huge."""
    at = [i for i, byte in enumerate(content) if byte == ord("K")]
    i = at[what % len(at)]
    return content[:i] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + content[i + 2 :]


def save_pickled(content: Any, file: Path, mode: int, changes: Changes) -> None:
    """A dict as torch.save writes it, damaged before (most of them) or after."""
    try:
        torch.save(
            damage(content, changes, odd_value) if mode < 50 else content,
            file,
            _use_new_zipfile_serialization=mode % 9 > 0,
        )
    except Exception:  # not everything odd can be pickled
        file.write_bytes(pickle.dumps(Evil(os.system, "touch CANARY"), protocol=mode % 5))
    if mode >= 90:
        file.write_bytes(damage_bytes(file.read_bytes(), changes))
    elif mode >= 50 and zipfile.is_zipfile(file):
        file.write_bytes(damage_archive(file.read_bytes(), mode, changes))
    elif mode >= 50:  # the format before torch 1.6
        file.write_bytes(promise_more(file.read_bytes(), changes[0][2]))
    if mode >= 98:
        misplace(file, changes[0][2])


def make_checkpoint(file: Path, mode: int, changes: Changes) -> None:
    save_pickled(torch.load(training()[3], weights_only=True), file, mode, changes)


def read_checkpoint(file: Path) -> None:
    model, data, config, _ = training()
    fit(model, data, config, seed=0, checkpoint=file, progress=False, hook=Shrink())


def make_weights(file: Path, mode: int, changes: Changes) -> None:
    state = dict(small_network().state_dict())
    if mode % 3:
        save_pickled({"state_dict": state} if mode % 2 else state, file, mode, changes)
        return
    save_file(state, file.with_suffix(".safetensors"))
    data = file.with_suffix(".safetensors").read_bytes()
    data = damage_bytes(data, changes) if mode % 2 else damage_safetensors(data, changes)
    file.with_suffix(".safetensors").write_bytes(data)
    if mode >= 96:
        misplace(file.with_suffix(".safetensors"), changes[0][2])


def small_network() -> nn.Module:
    return create_network("resnet8", num_classes=3, input_shape=(1, 8, 8), width=2)


def read_weights(file: Path) -> None:
    load_checkpoint_into(
        small_network(), file if os.path.lexists(file) else file.with_suffix(".safetensors"), "resnet8"
    )


OPERATORS = [*sorted(ONNX_READERS), *sorted(FOLDED), "If", "Loop", "Shape", "Constant", "QuantizeLinear", "Acme"]
INTEGERS = [-1, 0, 1, 2, 7, 2**16, 2**31 - 1, 2**40, -(2**40), 2**63 - 1]


def make_onnx(file: Path, mode: int, changes: Changes) -> None:
    """A file of a small residual network in which operators, attributes, sizes, names and places of data are others."""
    model = residual()
    for how, where, what in changes if mode < 80 else ():
        node = model.graph.node[where % len(model.graph.node)]
        tensor = model.graph.initializer[where % len(model.graph.initializer)]
        number, word = INTEGERS[what % len(INTEGERS)], (PATHS + CODE)[what % len(PATHS + CODE)]
        word = word.encode(errors="replace").decode()
        if how % 9 == 0:
            node.op_type = OPERATORS[what % len(OPERATORS)]
        elif how % 9 == 1:
            names = ("pads", "strides", "group", "axis", "axes", "alpha", "shape", "value_ints", "blocksize")
            given = number if what % 2 else [number] * (what % 5)
            node.attribute.append(
                onnx.helper.make_attribute(names[where % len(names)], given, attr_type=None if given or what % 2 else 7)
            )
        elif how % 9 == 2:
            tensor.dims[:] = [number, *tensor.dims][: what % 5]
        elif how % 9 == 3:
            tensor.data_location, tensor.name = 1, tensor.name
            tensor.external_data.add(key="location", value=word)
            tensor.external_data.add(key=("offset", "length")[what % 2], value=NUMBERS[where % len(NUMBERS)])
        elif how % 9 == 4:
            node.input[what % len(node.input)] = ["", word, "image:0", "a", "5"][what % 5]
        elif how % 9 == 5:
            model.graph.input[0].type.tensor_type.shape.dim[what % 4].dim_value = number
        elif how % 9 == 6:
            node.name = node.output[0] = word
        elif how % 9 == 7:
            tensor.data_type = what % 30
        else:
            held = onnx.numpy_helper.from_array(
                np.array([number] * (what % 5), np.int64), f"sizes{len(model.graph.initializer)}"
            )
            model.graph.initializer.append(held)
            node.input.append(held.name)
    data = model.SerializeToString()
    file.write_bytes(damage_bytes(data, changes) if mode >= 75 else data)
    if mode >= 98:
        misplace(file, changes[0][2])


NOTES = {"before": 0.5, "multiplier": {"width": 0.25, "ratio": 0.5}, "after cut 1": 0.7}
KINDS: dict[str, tuple[Callable[[Path, int, Changes], None], Callable[[Path], Any]]] = {
    "artifact": (make_artifact, read_artifact),
    "config": (make_config, read_config),
    "record": (functools.partial(make_json, good_record()), read_and_show),
    "notes": (functools.partial(make_json, NOTES), read_notes),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "weights": (make_weights, read_weights),
    "onnx": (make_onnx, checked_network),
}


# ------------------------------------------------------------------------------------------------- reading one, and many


def one(kind: str, mode: int, changes: Changes) -> str:
    """Make one file, read it, and say what became of it: "loaded" or "refused". Raises AssertionError for anything else."""
    make, read = KINDS[kind]
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        path = Path(place) / f"{kind}.pt"
        make(path, mode, changes)
        here, started = set(Path(place).rglob("*")), time.process_time()
        with PeakMemory() as peak:
            try:
                read(path)
                outcome = "loaded"
            except RmpruneError as error:
                outcome = "refused"
                assert kind in str(error) or place in str(error), f"the message names no file: {error}"
                assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
        assert time.process_time() - started < SECONDS, f"{time.process_time() - started:.0f} s"
        assert peak.mib < MIB, f"{peak.mib:.0f} MiB"
        new = {path.name for path in set(Path(place).rglob("*")) - here}
        assert new <= {path.name}, f"reading left {new}"  # a training whose checkpoint is not there writes one
        return outcome


def work(kind: str, count: int, seed: int, last: Path) -> None:
    """Many of one kind; prints the tally and the faults as JSON. A hang ends the process; `last` holds the draw it was at."""
    KINDS[kind][0](Path(tempfile.mkdtemp()) / "warm", 0, [(3, 0, 0)])
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 4 * 2**30,) * 2)
    tally: collections.Counter[str] = collections.Counter()
    faults: dict[str, Any] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(DRAWS)
    def draw(drawn: tuple[int, Changes]) -> None:
        last.write_text(repr((kind, *drawn)))
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # by the clock, on a machine that may be busy
        try:
            tally[one(kind, *drawn)] += 1
        except Exception as error:
            tally["fault"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.setdefault(
                f"{type(error).__name__} at {where.filename}:{where.lineno}: {str(error)[:300]}", [kind, *drawn]
            )
        finally:
            faulthandler.cancel_dump_traceback_later()

    draw()
    print(json.dumps([tally, faults]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.work:
        return work(kinds[0], options.count, options.seed, options.work)
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds):
            count = options.count // len(kinds) + (number < options.count % len(kinds))
            last, started = Path(folder) / "last", time.monotonic()
            arguments = [f"--count={count}", f"--seed={options.seed}", f"--kinds={kind}", f"--work={last}"]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
            if done.returncode:
                tally, faults = (
                    {"fault": 1},
                    {f"exit status {done.returncode}: {done.stderr[-3000:]}": last.read_text()},
                )
            else:
                tally, faults = json.loads(done.stdout.splitlines()[-1])
            total.update(tally)
            print(f"{kind:10} {sum(tally.values()):6} drawn  {tally}  {time.monotonic() - started:.0f} s", flush=True)
            for fault, drawn in faults.items():
                print(f"    {fault}\n        one(*{drawn})")
    print(f"{'all':10} {sum(total.values()):6} drawn  {dict(total)}")
    sys.exit(total["fault"] > 0)


if __name__ == "__main__":
    main()
