"""Damaged and malicious files: draws (RMPRUNE_DRAWS says how many of each kind), and the smallest input of each fault found."""

import hashlib
import json
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import hypothesis
import pytest
import torch
from marks import draws, long
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmprune.artifact import files, tensors
from rmprune.artifact.tensors import LARGEST_HEADER, MOST_STEPS, read_pickled
from rmprune.artifact.weights import load_checkpoint_into, read_state_dict
from rmprune.config import NetworkConfig
from rmprune.errors import ArtifactError
from rmprune.pipelines.convert import open_network

DRAWS = int(os.environ.get("RMPRUNE_DRAWS", draws(50, 20)))


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whatever_stands_in_a_file_it_loads_or_is_refused(kind: str) -> None:
    @hypothesis.settings(max_examples=DRAWS, deadline=None, derandomize=True, database=None)
    @hypothesis.given(fuzz.DRAWS)
    def read(drawn: tuple[int, fuzz.Changes]) -> None:
        fuzz.one(kind, *drawn)

    read()


def test_the_harness_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def reader(fault: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda path: fault(path)

    def large(path: Path) -> None:
        bytearray(fuzz.MIB * 2**20 + 2**24)[:: 2**12] = b"x" * (fuzz.MIB * 2**8 + 2**12)

    def run(path: Path) -> None:
        pickle.loads(path.read_bytes())

    monkeypatch.setattr(fuzz, "MIB", 256)
    monkeypatch.setitem(
        fuzz.KINDS, "evil", (lambda path, *_: path.write_bytes(pickle.dumps(fuzz.Evil(os.mkdir, "CANARY"))), run)
    )
    with pytest.raises(AssertionError, match="CANARY"):
        fuzz.one("evil", 0, [])
    for read, words in (
        (large, "MiB"),
        (lambda _: 1 / 0, "division"),
        (lambda _: (_ for _ in ()).throw(ArtifactError("x")), "names no file"),
    ):
        monkeypatch.setitem(fuzz.KINDS, "odd", (lambda *_: None, reader(read)))
        with pytest.raises((AssertionError, ZeroDivisionError), match=words):
            fuzz.one("odd", 0, [])


# ---------------------------------------------------------------------------------------------------------- artifacts


def deep(levels: int, inner: Any = 1) -> Any:
    for _ in range(levels):
        inner = [inner]
    return inner


def layer(name: str, kind: str = "ReLU", **args: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "args": args or {"inplace": False}}


def node(description: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in description["nodes"] if node["op"] == op)


Edit = Callable[[dict[str, Any]], Any]
DESCRIPTIONS: dict[str, tuple[Edit, str]] = {
    "nested as deep as JSON goes": (lambda d: node(d, "call_function").update(args=deep(900)), "nested deeper"),
    "a limit below the other": (lambda d: d["layers"].append(layer("z", "Hardtanh", min_val=1, max_val=0, inplace=False)), "refuses"),
    "a part named as a method": (lambda d: d["layers"].append(layer("forward.z")), "no layer"),
    "a layer in itself": (lambda d: d["layers"].append({"name": "act.z", "same_as": "act"}), "within itself"),
    "a layer that is the network": (lambda d: d["layers"].append({"name": "z", "same_as": ""}), "is not a layer"),
    "tied to itself": (lambda d: d["tied"].append(["head.weight"] * 2), "tied itself"),
    "tied in a circle": (lambda d: d["tied"].extend([["bn.weight", "bn.bias"], ["bn.bias", "bn.weight"]]), "tied itself"),
    "a list for a type": (lambda d: node(d, "call_method").update(kwargs={"a": {"dtype": []}}), "not an argument"),
    "a name of a thousand parts": (lambda d: d["layers"].append(layer(".".join("a" * 1000))), "not a valid name"),
    "a name of a million letters": (lambda d: d["layers"].append(layer("a" * 10**6)), "not a valid name"),
    "a kernel of one axis for two": (lambda d: d["layers"][0]["args"].update(kernel_size=[3]), "kernel_size=.* out of range"),
    "channels by the thousand million": (lambda d: d["layers"][0]["args"].update(out_channels=10**9), "out of range"),
    "a number of 400 digits": (lambda d: d["layers"][0]["args"].update(out_channels=10**400), "number of 401 digits"),
    "more layers than are built": (lambda d: d.update(layers=[layer(f"a{i}") for i in range(50_001)]), "entries"),
    "a tensor of 2**48 elements": (lambda d: d["tensors"][0].update(shape=[2**24, 2**24]), "not valid"),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    text, weights = fuzz.good_artifact()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / files.ARCHITECTURE).write_text(text)
    (tmp_path / "a" / files.WEIGHTS).write_bytes(weights)
    return tmp_path / "a"


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_is_refused(name: str, saved: Path) -> None:
    content = json.loads((saved / files.ARCHITECTURE).read_text())
    edit, words = DESCRIPTIONS[name]
    edit(content["description"])
    (saved / files.ARCHITECTURE).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"architecture\.json: .*({words})"):
        files.load(saved)


def test_a_key_that_stands_twice_is_refused(saved: Path) -> None:
    text = (saved / files.ARCHITECTURE).read_text()
    (saved / files.ARCHITECTURE).write_text(text.replace('"schema": 1', '"schema": 1, "schema": 1'))
    with pytest.raises(ArtifactError, match=r"architecture\.json: damaged \(the key 'schema' stands twice\)"):
        files.load(saved)


def in_time(call: Callable[[], Any], seconds: float = 60) -> None:
    """Raises what `call` raises; fails where it goes on for longer, as with a pipe that nobody writes to: what ends does so in far less."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still at it after {seconds} s"
    raise found[0]


@pytest.mark.parametrize("file", [files.ARCHITECTURE, files.WEIGHTS])
@pytest.mark.parametrize("thing", ["pipe", "folder", "circle", "device", "1 TiB"])
def test_what_is_no_file_of_reasonable_size_is_refused_unread(file: str, thing: str, saved: Path) -> None:
    path = saved / file
    if thing == "1 TiB":
        os.truncate(path, 2**40)
    else:
        path.unlink()
        if thing == "folder":
            path.mkdir()
        elif thing == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path.name if thing == "circle" else "/dev/zero")
    with pytest.raises(ArtifactError, match=file):
        in_time(lambda: files.load(saved))


def test_a_link_to_a_file_elsewhere_is_read_as_any_other(saved: Path) -> None:
    """Stores of large files keep links in folders: what they lead to is data, checked against the digest, and never run."""
    (saved / files.WEIGHTS).rename(saved.parent / "blob")
    (saved / files.WEIGHTS).symlink_to("../blob")
    files.load(saved)


def rewrite(saved: Path, change: Callable[[dict[str, Tensor]], Any], **fields: Any) -> None:
    """Other weights with the digest that fits them."""
    tensors = load_file(saved / files.WEIGHTS)
    change(tensors)
    save_file(tensors, saved / files.WEIGHTS)
    content = json.loads((saved / files.ARCHITECTURE).read_text()) | fields
    content["sha256"] = hashlib.sha256((saved / files.WEIGHTS).read_bytes()).hexdigest()
    (saved / files.ARCHITECTURE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"head.weight": t["head.weight"].cfloat()}), "complex64"),
        (lambda t: t.update({"bn.num_batches_tracked": t["bn.num_batches_tracked"].int()}), "int32"),
        (lambda t: t.update({"../x": torch.ones(1)}), r"no tensor \.\./x"),
        (lambda t: t.pop("head.weight"), "no tensor head.weight"),
    ],
)
def test_weights_of_another_kind_are_refused(
    change: Callable[[dict[str, Tensor]], Any], words: str, saved: Path
) -> None:
    rewrite(saved, change)
    with pytest.raises(ArtifactError, match=rf"model\.safetensors: .*{words}"):
        files.load(saved)


def test_a_memory_order_that_a_tensor_cannot_have_is_passed_over(saved: Path) -> None:
    rewrite(saved, lambda t: None, channels_last=["head.weight", ["conv.weight"], 3])
    files.load(saved)


class Both(nn.Module):
    """Calls a layer and reads its weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + nn.functional.conv2d(x, self.conv.weight)


def test_a_layer_whose_weight_is_also_read_comes_back(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(files.load(files.save(Both(), tmp_path / "a"))(x), Both.forward(files.load(tmp_path / "a"), x))


# ------------------------------------------------------------------------------------------------------------ weights


def test_a_header_longer_than_any_is_refused(tmp_path: Path) -> None:
    header = b'{"' + b"a" * LARGEST_HEADER + b'": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ArtifactError, match=r"a\.safetensors: .*header"):
        read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(1).expand(2**40),
        torch.ones(2).cfloat(),
        {"a": 1},
        None,
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_what_is_no_plain_tensor_is_refused(value: Any, new: bool, tmp_path: Path) -> None:
    torch.save({"fc.weight": value}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ArtifactError, match=r"a\.pt: .*(fc\.weight|storage)"):
        load_checkpoint_into(nn.Identity(), tmp_path / "a.pt", "x")


CALLS = [
    fuzz.Evil(os.mkdir, "CANARY"),
    fuzz.Evil(eval, "open('CANARY', 'w')"),
    fuzz.Evil(torch.load, "x"),
    fuzz.Evil(getattr, "x", "__class__"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle"])
def test_code_is_never_run(
    call: Any, protocol: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"weight": call}}
    if form == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ArtifactError, match=r"a\.pt: "):
        read_state_dict(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_needs_code_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "a.pt")
    with pytest.raises(
        ArtifactError, match=r"it needs torch\.nn\.modules\.linear\.Linear, which is code.*model\.state_dict\(\)"
    ):
        read_state_dict(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(pickle.dumps(nn.Linear(1, 1)))
    with pytest.raises(ArtifactError, match=r"its pickle is of another kind than torch\.save's.*model\.state_dict\(\)"):
        read_state_dict(tmp_path / "a.pt")


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("b.pt"), "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return path.with_name("b.pt")


def test_an_archive_that_would_swell_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2**24)}, tmp_path / "a.pt")
    bomb = repacked(tmp_path / "a.pt", lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**20
    with pytest.raises(ArtifactError, match="compressed"):
        read_state_dict(bomb)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(100)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        at = archive.getinfo("a/data/0").header_offset
    data[at + 300] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ArtifactError, match="CRC"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("new", [True, False])
def test_sizes_beyond_the_file_are_refused(new: bool, tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    huge = b"\x8a\x06" + (2**40).to_bytes(6, "little")
    for where in (
        b"cpuq\x06K\x03",
        b"K\x00K\x03\x85",
        b"\x85q\x08K\x01\x85",
    ):  # the storage's size, the tensor's, its stride
        if new:
            path = repacked(
                tmp_path / "a.pt",
                lambda name, content, w=where: content.replace(w, w.replace(w[-2 if w[-1] < 99 else -3 :][:2], huge)),
            )
        else:
            path = tmp_path / "b.pt"
            path.write_bytes((tmp_path / "a.pt").read_bytes().replace(b"K\x03", huge, 1))
        with pytest.raises(ArtifactError, match=r"b\.pt: .*(storage|larger|tensor)"):
            read_state_dict(path)


@pytest.mark.parametrize("most", [1000, long(MOST_STEPS)])
def test_a_pickle_of_too_many_steps_is_refused(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MOST_STEPS", most)
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "a.pt")
    path = repacked(
        tmp_path / "a.pt",
        lambda name, old: b"\x80\x02" + b"]" * (most + 9) + b"." if name == "a/data.pkl" else old,
    )
    with pytest.raises(ArtifactError, match="steps"):
        in_time(lambda: read_state_dict(path))


def test_files_of_every_age_are_read(tmp_path: Path) -> None:
    """Of torch before 1.6, of a save without checksums, with tensors that share a storage, and with other plain values."""
    base = torch.arange(6.0)
    state = {
        "a": base[:3],
        "b": base[3:].view(3, 1),
        "c": nn.Parameter(base.view(2, 3).t()),
        "n": torch.tensor(3),
        "e": torch.ones(0, 2),
    }
    checkpoint = {
        "state_dict": state,
        "shape": torch.Size([1]),
        "device": torch.device("cpu"),
        "dtype": torch.half,
        "set": {1},
    }
    for new in (True, False):
        torch.save(checkpoint, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        found = read_state_dict(tmp_path / "a.pt")
        assert all(torch.equal(found[name], value) for name, value in state.items()) and len(found) == len(state)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_pickled(tmp_path / "a.pt")["shape"] == torch.Size([1])


@pytest.mark.parametrize("shape", ["x", [1, 8], [1, 8, "8"], [1, 2**20, 2**20], [True, 8, 8], [1, -8, 8], 3])
def test_a_size_of_images_that_is_none_is_refused(shape: Any, saved: Path) -> None:
    rewrite(saved, lambda t: None, extra={"input_shape": shape})
    with pytest.raises(ArtifactError, match="images"):
        open_network(NetworkConfig(str(saved)))


def test_an_extra_that_lacks_what_is_needed_is_refused(saved: Path) -> None:
    with pytest.raises(ArtifactError, match=r"architecture\.json: its extra has no 'removal'"):
        files.read_extra(saved, "input_shape", "removal")
