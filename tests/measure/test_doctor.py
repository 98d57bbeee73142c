"""`doctor`, `--version`, and errors of flags in one line."""

import importlib.util
import re

import pytest

from rmprune import cli
from rmprune.config import DoctorConfig
from rmprune.config.flags import one_line
from rmprune.measure import BACKENDS, quiet
from rmprune.measure.quiet import Quietness, quietness
from rmprune.pipelines import doctor
from rmprune.pipelines.doctor import run_doctor


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return int(stopped.value.code or 0)


def test_it_tries_backends_and_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(("doctor", "--backend", "eager,onnxruntime,onnxruntime-int8,onnxruntime-dnnl,cudagraph", "--seconds", "0"))
    printed = capsys.readouterr().out
    for pattern in (
        r"^  torch +\d+\.\d+",
        r"^processor .+ cores, torch on \d+ threads$",
        r"^  AVX2 +(yes|no)$",
        r"^GPU ",
        r"^  eager +cpu +works \(float32, ",
        r"^  onnxruntime-int8 +cpu +works \(int8, ",
        r"^machine (quiet|restless|busy): .*copy \d\.\d{3}, \d\.\d{3} to \d\.\d{3}",
    ):
        assert re.search(pattern, printed, re.MULTILINE), pattern
    assert (
        "onnxruntime-dnnl     cpu   no: cannot use cpu here" in printed or "onnxruntime-dnnl     cpu   works" in printed
    )


def test_a_backend_that_fails_or_is_wrong_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def outputs(self, x: object) -> object:
            raise MemoryError("no room")

        def __call__(self) -> None: ...

    class Wrong(Broken):
        def outputs(self, x: object) -> object:
            return real(candidate[0], "eager", "cpu", 1, 2).outputs(x) * 1.5  # type: ignore[arg-type]

    real, candidate = doctor.prepare, []

    def prepare(given: object, backend: str, *rest: object) -> object:
        candidate[:] = [given]
        return {"torchscript": Broken(), "eager": Wrong()}.get(backend) or real(given, backend, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "prepare", prepare)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else object())
    run_doctor(DoctorConfig(("torchscript", "eager", "openvino", "onnxruntime"), seconds=0.0))
    printed = capsys.readouterr().out
    for words in (
        "torchscript          cpu   fails: MemoryError: no room",
        "eager                cpu   wrong: its outputs differ from PyTorch's by 5.0e-01",
        "openvino             cpu   no: is not installed; pip install openvino",
        "onnxruntime          cpu   works",
    ):
        assert words in printed


def test_an_unknown_backend_is_refused_before_anything_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("doctor", "--backend", "eager,tvm") == 2
    captured = capsys.readouterr()
    assert "'tvm' is unknown; there are eager" in captured.err and captured.out == ""


@pytest.mark.long
def test_a_network_against_its_own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = quietness(0.0)
    assert found.ratio_low <= found.ratio <= found.ratio_high and found.spread >= 0
    for spread, low, high, verdict in (
        (0.01, 0.99, 1.01, "quiet"),
        (0.1, 0.99, 1.01, "restless"),
        (0.01, 0.9, 1.01, "restless"),
        (0.01, 0.99, 1.5, "busy"),
        (0.5, 0.99, 1.01, "busy"),
    ):
        assert Quietness(spread, 1.0, low, high, None).verdict == verdict
    monkeypatch.delattr(quiet.os, "getloadavg")
    assert quietness(0.0).load is None


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(("--version",))
    assert re.fullmatch(r"rmprune \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("slim", "--ratoi", "0.5"),
            "Unrecognized options: --ratoi, 0.5; did you mean --ratio? (python -m rmprune slim --help",
        ),
        (("slim", "--ratio", "abc"), "--ratio: could not convert string to float: 'abc' (python"),
        (("convert", "resnet20"), "Missing from python -m rmprune convert: --out PATH (python"),
        (("slim", "--measure.seconds"), "Missing value for argument '--measure.seconds'"),
        (
            ("slim", "extra"),
            "Unrecognized options: extra; a value follows its flag, and several of one flag are separated by commas",
        ),
        (
            ("convert", "resnet20", "--output", "x"),
            "Missing from python -m rmprune convert: --out PATH; did you mean --out? (python",
        ),
        (("inspect",), "Missing from python -m rmprune inspect: MODEL (python"),
        (("inspect", "--model", "resnet20"), "; give it as a word of its own, without --model (python"),
        (("measure", "--runs", "x"), "; give it as a word of its own, without --runs (python"),
        (("slim", "--nothing", "x" * 60), "x" * 60),
    ],
)
def test_errors_of_flags_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rmprune: error: ") and error.count("\n") == 1 and not re.search("[│╭╰─]", error)
    assert message in error


def test_boxes_and_colours_of_a_terminal_are_taken_off() -> None:
    box = (
        "╭─ Unrecognized options ───────────╮\n│ Unrecognized options: \x1b[1m--ratoi\x1b[0m,     │\n│ 0.5                              │\n"
        "│ ──────────────────────────────── │\n│ Perhaps you meant:               │\n│     --ratio FLOAT                │\n"
        "╰──────────────────────────────────╯\n"
    )
    assert one_line(box) == "Unrecognized options: --ratoi, 0.5"
    plain = "Parsing error\n------------\nno such flag.\n------------\nFor full helptext, run x --help"
    assert one_line(plain) == "no such flag"
    assert one_line("said\n otherwise") == "said otherwise"


def test_help_is_still_tyro_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("doctor", "--help") == 0
    captured = capsys.readouterr()
    assert "--backend" in captured.out and captured.err == ""
    assert set(BACKENDS) > {"eager", "onnxruntime", "openvino", "torchscript", "compile"}  # names of records of today
