"""Kills real runs at random moments: `python tests/kill.py --kills 50 --seed 0` (some ten minutes of one core).

A run (train, slim, a comparison of two methods, amc, grid (with forked workers in submitit's place),
measure, report, deploy, convert; in miniature, one thread) is killed by SIGKILL up
to three times, each time at a random moment of what is left of it: of its CPU seconds, or just before a random one of the changes that it
makes to its files. Then the same command runs to its end. What it leaves must be what an undisturbed run of another interpreter leaves: the
same files, networks and records bit by bit but for times, no temporary file, nothing twice in a log. Exit status 1 where it is not.

`--fault interrupt` and `--fault end` send SIGINT and SIGTERM instead: one line, exit status 130 or 143, no temporary file left. `--fault
full` (as root) puts the run on a small file system of its own, with a random rest of it free: one error and exit status 2.

`--fork tries` starts no interpreter for each try, which takes half the time, `--fork all` none for the undisturbed run either: then the
seed of Python's hashes is the same in all.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forked_workers import Forked, import_before_forks

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # this rmprune, not one that is installed

DATA = "--dataset digits --train-images 48 --batch-size 16 --device cpu --checkpoint-seconds 1e-9 --finetune.checkpoint-seconds 1e-9"
MEASURE = (
    " --measure.backend eager --measure.threads 1 --measure.batch-size 1 --measure.seconds 0 --measure.min-rounds 1"
)
SLIM = f"slim --model short_resnet --width 2 --epochs 2 --finetune.epochs 2 --round-to 1 {DATA}{MEASURE} --out run"
COMMANDS = {
    "train": f"train --model short_resnet --width 2 --epochs 2 {DATA.partition(' --finetune')[0]}{MEASURE} --out run",
    "slim": f"{SLIM} --macs-ratio 0.7 --method rm",
    "auto": f"{SLIM} --macs-ratio 0.7 --method auto --search-minutes 0.01",
    "comparison": f"{SLIM} --macs-ratio 0.8,0.6 --method rm,inner",
    "gradual": f"{SLIM} --macs-ratio 0.7 --gradual --cuts 3",
    "amc": "amc --model mobilenet_v2_digits --width 0.1 --epochs 1 --finetune.epochs 1 --multiple 1 --budget 0.7 --episodes 6 "
    f"--warm-up 3 --images 32 --calibration 16 --method rm-amc {DATA}{MEASURE} --out run",
    "measure": f"measure run{MEASURE.replace('--measure.', '--')}",
    "grid": f"grid{SLIM.removeprefix('slim')} --macs-ratio 0.7 --method residual,inner --jobs 1",
    "report": "report run --out run/page",
    "deploy": "deploy run --out run/deployed",
    "convert": "convert short_resnet --width 2 --image-size 8 --in-channels 1 --out run/plain",
}
FINISHED = ("measure", "report", "deploy")
"""Commands that take a finished run."""
FAULTS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "end": signal.SIGTERM, "full": None}
STATUS = {"interrupt": 130, "end": 143, "full": 2}
SAYS = {"interrupt": "rmprune: interrupted; ", "end": "rmprune: interrupted; ", "full": "rmprune: error: "}
CHANGES = {"os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0, "open": 0}
"""Audit events of changes to files, and which of their arguments is the path."""
TIMES = {"latency", "seconds", "images_per_second", "episodes_per_minute", "environment"}
"""What no two runs have alike, under these names."""


def child(command: str, before: int, fault: str = "kill", amid: str = "") -> None:
    """Run the command, with the fault's signal before its change number `before` to the files of the run; or write what it changed.

    amid: only changes of paths with this in them count.
    """
    import slim_runs  # noqa: F401  # it knows short_resnet

    from rmprune.cli import main
    from rmprune.pipelines import grid

    tasks = itertools.count()
    grid._workers = lambda config: lambda *work: Forked(Path(f"worker-{os.getpid()}-{next(tasks)}"), *work)
    changes: list[str] = []

    first = os.getpid()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if os.getpid() != first or event not in CHANGES or not str(arguments[CHANGES[event]]).startswith("run"):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        changes.append(str(arguments[CHANGES[event]]))
        if amid in changes[-1] and sum(amid in path for path in changes) == before:
            os.kill(os.getpid(), FAULTS[fault] or 0)

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell in the background may have had it ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.addaudithook(count)
    main(command.split())
    Path("changes").write_text("\n".join(changes))


def start(
    command: str, place: Path, *, before: int = 0, fault: str = "kill", amid: str = "", fork: bool = False
) -> int:
    """The id of a process that runs the command in a folder; what it says goes to a file there."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(place)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        if not fork:
            os.execv(sys.executable, [sys.executable, __file__, "--child", command, str(before), fault, amid])
        child(command, before, fault, amid)
    except SystemExit as stopped:
        os._exit(int(stopped.code or 0))
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def wait(pid: int, seconds: float = 1e9, fault: str = "kill") -> int | None:
    """Send the process the fault's signal after so many CPU seconds; its exit status, or None where it was killed."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return (
                None
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                else os.waitstatus_to_exitcode(status)
            )
        if cpu_seconds(pid) >= seconds:
            os.kill(pid, FAULTS[fault] or 0)
            seconds = 1e9
        time.sleep(0.005)


def ended(status: int | None, place: Path, fault: str = "kill") -> bool:
    """Whether a process ended well, and the fault did not end it. Raises AssertionError where it ended in an error, or not as it should."""
    said = (place / "said.txt").read_text()[-2000:]
    if status == STATUS.get(fault) and "this run is finished; see it" not in said:
        last = (said.splitlines() or [""])[-1]
        assert fault == "kill" or (last.startswith(SAYS[fault]) and "Traceback" not in said), f"it said {said}"
        assert fault != "full" or "No space left" in last or "only" in last, f"it said {said}"
        left = [str(path) for path in (place / "run").rglob(".*") if path.name not in (".lock", ".complete")]
        assert fault == "kill" or not left, f"left behind: {left}"
        return False
    assert status == 0 or "this run is finished; see it" in said, f"exit status {status}: {said}"
    return True


def finish(command: str, place: Path, fork: bool) -> tuple[list[str], float]:
    """Run the command to its end: the paths that it changed in turn, and its CPU seconds. Raises AssertionError where it fails."""
    before = sum(os.times()[2:4])
    assert ended(wait(start(command, place, fork=fork)), place), "killed by somebody else"
    count = place / "changes"
    return count.read_text().splitlines() if count.exists() else [], sum(os.times()[2:4]) - before


def without_times(value: Any) -> Any:
    """A JSON value without what is under the names of TIMES."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def left(run: Path) -> dict[str, Any]:
    """{file of a run: what must be the same in every run}."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if "teacher" in path.parts and not path.name.startswith("."):
            continue  # kept to save time; an epoch that was begun twice has none
        if path.parent.name == "deploy":  # of networks that do equally well the one that was measured to be faster
            found["deploy"] = None
            continue
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            entries = [(line.get("label"), line.get("epoch", line.get("episode"))) for line in lines]
            assert len(set(entries)) == len(entries), f"{name} says something twice: {entries}"
            found[name] = without_times(lines)
        else:  # checkpoints and reports hold times
            times = path.suffix == ".pt" or path.name == "search.safetensors" or "report" in path.parts
            found[name] = None if times else path.read_bytes()
    return found


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises AssertionError that names the files that differ."""
    extra, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    assert not extra and not missing, f"left besides: {extra}; missing: {missing}"
    differ = [name for name in found if found[name] != expected[name]]
    assert not differ, f"differ: {differ}"


@contextlib.contextmanager
def nearly_full(folder: Path, size: int) -> Iterator[None]:
    """So many bytes of the small disk that a run lies on are free."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    os.truncate(filler, max(0, filler.stat().st_size - size))
    yield
    filler.unlink()


def size_of(folder: Path) -> int:
    """Bytes in all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rounds(
    kills: int, seed: int, names: list[str], forks: str, fault: str = "kill", amids: Sequence[str] = ("",)
) -> int:
    """Kill so many times, the commands in turn; prints each round, returns how many of them went wrong.

    amids: in turn, what the path must have in it before whose change a run is killed ("checkpoint": while a network is trained).
    """
    draw, done, wrong, fork = random.Random(seed), 0, 0, forks != "none"
    with tempfile.TemporaryDirectory() as folder:
        references: dict[str, tuple[Path, list[str], float]] = {}
        number = 0
        while done < kills:
            name = names[number % len(names)]
            command, place = COMMANDS[name], Path(folder) / f"{number}-{name}"
            number += 1
            if name not in references:
                for forked in {"none": [False], "tries": [False, True], "all": [True]}[forks]:
                    whole = Path(folder) / f"{name}-{forked}"
                    prepare(name, whole, fork)
                    references[name] = (references.get(name, (whole,))[0], *finish(command, whole, forked))
                compare(left(whole / "run"), left(references[name][0] / "run"))
            whole, changed, seconds = references[name]
            prepare(name, place, fork, fault)
            moments: list[str] = []
            try:
                for _ in range(min(draw.randint(1, 3), kills - done)):
                    amid = amids[done % len(amids)]
                    changes = sum(amid in path for path in changed)
                    aimed, at = fault != "full" and (draw.random() < 0.5 or amid != ""), draw.random()
                    before, after = 1 + int(at * changes) if aimed else 0, 1e9 if aimed else at * seconds
                    moment = f"change {before} of {changes}" if aimed else f"{after:.1f} of {seconds:.1f} s"
                    with contextlib.ExitStack() as full:
                        if fault == "full":
                            free, after = int(at**3 * size_of(whole / "run")), 1e9
                            moment = f"{free} bytes free"
                            full.enter_context(nearly_full(place / "disk", free))
                        pid = start(command, place, before=before, fault=fault, amid=amid, fork=fork)
                        if ended(wait(pid, after, fault), place, fault):
                            break
                    done += 1
                    moments.append(moment)
                else:
                    finish(command, place, fork)
                compare(left(place / "run"), left(whole / "run"))
                verdict = "the same"
            except (AssertionError, ValueError) as error:
                wrong, verdict = wrong + 1, f"WRONG: {error}"
            take_away(place)
            print(f"{name:10} {fault} at {', '.join(moments) or 'no moment'}: {verdict}", flush=True)
    print(f"{done} {fault}s in {number} runs, {wrong} of them wrong")
    return wrong


def prepare(name: str, place: Path, fork: bool, fault: str = "kill") -> None:
    """A folder to run the command in, `run` on a small disk where that is to be full; FINISHED commands find a finished run there."""
    (place / "disk" / "run").mkdir(parents=True)
    if fault == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place / "disk"], check=True)
        (place / "disk" / "run").mkdir()
    (place / "run").symlink_to(place / "disk" / "run")
    if name in FINISHED:
        finished = place.parent / "finished"
        if not finished.exists():
            prepare("train", finished, fork)
            finish(COMMANDS["train"], finished, fork)
        shutil.copytree(finished / "run", place / "run", dirs_exist_ok=True)


def take_away(place: Path) -> None:
    """The folder, and the small disk in it."""
    if (place / "disk").is_mount():
        subprocess.run(["umount", "-l", place / "disk"], check=True)
    shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--fork", choices=("none", "tries", "all"), default="none")
    parser.add_argument("--fault", choices=FAULTS, default="kill")
    parser.add_argument("--amid", default="", help="only before changes of paths with this in them")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], int(options.child[1]), *options.child[2:])
    if options.fork != "none":
        import_before_forks()
    commands = options.commands.split(",")
    sys.exit(rounds(options.kills, options.seed, commands, options.fork, options.fault, (options.amid,)) > 0)


if __name__ == "__main__":
    main()
