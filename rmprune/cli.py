"""The command line: one small function for each subcommand, flags and help generated from the configs. The work is done elsewhere,
and imported once the flags are read: that takes seconds, which nobody who mistyped one or asks for --help should wait."""

import contextlib
import difflib
import functools
import importlib.metadata
import logging
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rmprune import config as settings
from rmprune.config.flags import parse
from rmprune.errors import LOADER_KILLED, RmpruneError, loader_killed, out_of_memory

Config = TypeVar("Config")
LEFT = dict.fromkeys(("slim", "grid", "amc", "train"), "what was done is saved") | dict.fromkeys(
    ("convert", "report", "deploy"), "files that were finished stay"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand. Exit status: 0 done, 2 for anything the user can mend (one line says what), 130 after Ctrl-C and 143 after
    SIGTERM (of `kill`, `docker stop`, Slurm), which is handled alike, 141 where nobody reads on (`| head`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("torch", "onnxscript", "onnx_ir", "httpx", "matplotlib", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        with _end_as_interrupt() as told, _alone_or_together() as first:
            if first:
                _do(arguments)
                print(end="", flush=True)  # now, while a reader who has gone is no error yet
    except BrokenPipeError as error:
        if _is_read():
            _fail(str(error))  # another pipe than that
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        sys.exit(141)
    except RmpruneError as error:
        _fail(str(error))
    except OSError as error:  # a file or folder that no stage expected to be out of reach
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if loader_killed(error):
            if told:  # and so was the loader
                _interrupted("", arguments, told)
            _fail(LOADER_KILLED)
        if not out_of_memory(error):
            raise
        _fail("out of memory; take a smaller width, batch size or image size")
    except KeyboardInterrupt as interrupt:
        _interrupted(str(interrupt), arguments, told)


def _is_read() -> bool:
    """Whether what this process prints still has a reader."""
    with contextlib.suppress(OSError, ValueError):  # printed to no file
        printed = select.poll()
        printed.register(sys.stdout.fileno(), 0)
        return not any(event & select.POLLERR for _, event in printed.poll(0))
    return True


def _interrupted(said: str, arguments: list[str], told: list[int]) -> NoReturn:
    """`said`: by whoever had changed something by then, what."""
    again = shlex.join(["python", "-m", "rmprune", *(word for word in arguments if word != "--overwrite")])
    name = arguments[0] if arguments else ""
    left = said or LEFT.get(name, "nothing was changed")
    on = "To go on" if name in ("slim", "grid", "amc", "train") else "Again"
    print(f"\nrmprune: interrupted; {left}. {on}: {again}", file=sys.stderr)
    sys.exit(143 if told else 130)


@contextlib.contextmanager
def _end_as_interrupt() -> Iterator[list[int]]:
    """Within, SIGTERM does what Ctrl-C does at that moment, a checkpoint between two steps included; yields where it is noted."""
    told: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        told.append(number)
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(number, frame)

    here = threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1"
    usual = here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # torchrun's ends the other processes at once
    if usual:
        signal.signal(signal.SIGTERM, end)
    try:
        yield told
    finally:
        if usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _alone_or_together() -> contextlib.AbstractContextManager[bool]:
    """Yields whether this process does the command: the first, where torchrun started several."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return contextlib.nullcontext(True)
    from rmprune.training.together import together

    return together()


def _do(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"rmprune {importlib.metadata.version('rmprune')}")
        return
    if arguments[0] not in COMMANDS:
        close = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(arguments[0], COMMANDS, 1))
        _fail(f"unknown command {arguments[0]!r}{close or '; there are: ' + ', '.join(COMMANDS)}")
    COMMANDS[arguments[0]](arguments[1:])


def _fail(message: str) -> NoReturn:
    print(f"rmprune: error: {message}", file=sys.stderr)
    sys.exit(2)


def _overview() -> str:
    lines = (f"  {name:9}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items())
    return (
        "usage: python -m rmprune COMMAND [flags]     (COMMAND --help lists the flags, --version says which this is)\n\n"
        + "\n".join(lines)
    )


def _parse(kind: type[Config], arguments: list[str], command: str) -> Config:
    return parse(kind, arguments, f"python -m rmprune {command}", COMMANDS[command].__doc__ or "")


def _command_line(command: str, arguments: list[str]) -> str:
    return shlex.join(["python", "-m", "rmprune", command, *arguments])


def slim(arguments: list[str]) -> None:
    """train with sparsity, remove residuals (all of them, or where that pays), prune, fine-tune, measure, record"""
    config = _parse(settings.SlimConfig, arguments, "slim")
    from rmprune.pipelines.slim import run_slim

    _run(run_slim, config, _command_line("slim", arguments))


def grid(arguments: list[str]) -> None:
    """slim's comparison of methods, budgets and seeds, each on a worker of its own: processes here, or jobs of Slurm"""
    config = _parse(settings.GridConfig, arguments, "grid")
    from rmprune.pipelines.grid import run_grid

    _run(run_grid, config, _command_line("grid", arguments), deploys=False)


def amc(arguments: list[str]) -> None:
    """train MobileNetV2, remove residuals and fuse, let an agent choose every width, fine-tune, measure, record"""
    config = _parse(settings.AmcConfig, arguments, "amc")
    from rmprune.pipelines.amc import run_amc

    _run(run_amc, config, _command_line("amc", arguments))


def train(arguments: list[str]) -> None:
    """train a network, remove its residuals for deployment and measure both; nothing is pruned"""
    config = _parse(settings.TrainRunConfig, arguments, "train")
    from rmprune.pipelines.train import run_train

    _run(run_train, config, _command_line("train", arguments))


def _run(run: Callable[..., list[Path]], config: Any, command: str, *, deploys: bool = True) -> None:
    """Do a run, or only its deploy/ and report where it was killed before these; its tables on the screen, and what to do next."""
    from rmprune.data.load import load_dataset
    from rmprune.pipelines.deploy import run_deploy
    from rmprune.report.build import COMMAND, build_report, show
    from rmprune.runs.directory import Finished
    from rmprune.runs.records import find_records

    directory = config.directory
    opened = {"load": functools.lru_cache(1)(load_dataset)} if deploys else {}  # deploying takes the same data
    try:
        records = run(config, command=command, **opened)
    except Finished:
        if (directory / "report" / COMMAND).is_file():
            raise
        records = find_records([directory])
    show(records)
    try:
        deployed = _deployed(run_deploy(settings.DeployConfig(directory), **opened)) if deploys else "next:   "
    except RmpruneError as error:  # the run itself is done, and its record written
        deployed = f"deploy: none ({error})\nnext:   "
    files = build_report(records, directory / "report", command)  # last: where it is, nothing is left to do
    print(f"figure: {', '.join(str(file) for file in files if file.suffix == '.png')}")
    print(f"page:   {directory / 'report' / 'index.html'}")
    print(f"{deployed}python -m rmprune measure {shlex.quote(str(directory))} --backend eager,onnxruntime")


def _deployed(folder: Path) -> str:
    """Where a deployed network is and how to run it; another command may follow."""
    program = shlex.join(["python", str(folder / "predict.py"), "IMAGE"])
    return f"deploy: {folder}\nnext:   {program}\n        "


def inspect(arguments: list[str]) -> None:
    """each residual of a network: removable or why not, in which form, and what it costs"""
    config = _parse(settings.InspectConfig, arguments, "inspect")
    from rmprune.pipelines.convert import run_inspect

    run_inspect(config)


def convert(arguments: list[str]) -> None:
    """remove residuals and write the plain network as an artifact with ONNX; nothing is pruned"""
    config = _parse(settings.ConvertConfig, arguments, "convert")
    from rmprune.pipelines.convert import run_convert

    run_convert(config)


def measure(arguments: list[str]) -> None:
    """measure the networks of finished runs again, all interleaved in one process, and update their records; or ONNX files"""
    config = _parse(settings.RemeasureConfig, arguments, "measure")
    from rmprune.onnx.file import is_onnx
    from rmprune.pipelines.deploy import renew_deployed
    from rmprune.pipelines.measure import run_measure
    from rmprune.pipelines.measure_files import run_measure_files
    from rmprune.report.build import renew_reports, show
    from rmprune.runs.directory import runs_of

    if any(is_onnx(path) for path in config.runs):
        run_measure_files(config)
        return
    records = run_measure(config)
    try:
        show(records)
        figures = renew_reports(runs_of(records), _command_line("measure", arguments))
        for run in runs_of(records):
            renew_deployed(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("all records hold the new times, reports in the runs may not") from None
    if figures:
        print(f"figure: {', '.join(map(str, figures))}")
    runs = shlex.join(map(str, config.runs))
    print(f"next:   python -m rmprune report {runs} --out reports")


def report(arguments: list[str]) -> None:
    """tables and figures from the records of runs"""
    config = _parse(settings.ReportConfig, arguments, "report")
    from rmprune.report.build import run_report

    run_report(config, command=_command_line("report", arguments))


def deploy(arguments: list[str]) -> None:
    """a network of a finished run as ONNX (int8 too where that holds its accuracy), with predict.py and a model card"""
    config = _parse(settings.DeployConfig, arguments, "deploy")
    from rmprune.pipelines.deploy import run_deploy

    folder = run_deploy(config)
    print(_deployed(folder).rstrip())


def doctor(arguments: list[str]) -> None:
    """what is installed, which backends work here, what the processor can do, whether the machine is quiet enough to time"""
    config = _parse(settings.DoctorConfig, arguments, "doctor")
    from rmprune.pipelines.doctor import run_doctor

    run_doctor(config)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    function.__name__: function
    for function in (slim, grid, amc, train, inspect, convert, measure, report, deploy, doctor)
}
