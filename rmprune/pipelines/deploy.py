"""`deploy`: a network of a finished run ready to be used: ONNX, int8 where that holds its accuracy, predict.py, a model card, a ranking.

Validation images choose, never test images. What is written needs nothing of rmprune.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune import artifact
from rmprune.config import DeployConfig
from rmprune.data.load import Dataset, Load, load_dataset
from rmprune.errors import ArtifactError, ConfigError, RmpruneError
from rmprune.measure import calibration_images
from rmprune.measure.accuracy import candidate_accuracy
from rmprune.measure.candidate import Candidate
from rmprune.measure.quantise import onnx_int8
from rmprune.onnx.export import export_onnx
from rmprune.pipelines.measure import dataset_of, network_directory
from rmprune.pipelines.stages import on_validation
from rmprune.runs.directory import runs_of
from rmprune.runs.reading import read_json
from rmprune.runs.records import CONFIG_FILE, find_records, networks, read_record
from rmprune.runs.writing import sweep_beside, whole, write_text

logger = logging.getLogger("rmprune")
FOLDER, FACTS, RANKING, CARD, PROGRAM = "deploy", "model.json", "ranking.json", "README.md", "predict.py"
FLOAT32, INT8 = "model.onnx", "model-int8.onnx"
SCHEMA = 1
RULE = (
    "the best accuracy on validation images among the networks that meet the budget they were made for; of equal ones the least loss "
    "there, then the shortest time"
)


def run_deploy(config: DeployConfig, *, load: Load = load_dataset) -> Path:
    """Deploy a network of a finished run, from its files alone; returns the folder.

    Raises ArtifactError for what is no run, ConfigError for a network that it does not have, and what `deploy` and opening the run's data
    raise.
    """
    data = dataset_of(_records(config.run), load, config.data_dir)
    return deploy(config.run, data, config.out, network=config.network, int8_loss=config.int8_loss)


def deploy(
    run: Path,
    data: Dataset,
    out: Path | None = None,
    *,
    network: str | None = None,
    int8_loss: float = DeployConfig.int8_loss,
) -> Path:
    """Write the folder `out` (default: deploy/ in the run), whole or not at all, in the place of one that is there; returns it.

    `data`: what the run trained on; training images choose the ranges of int8, validation images whether it may lose so much accuracy.
    `network`: as the ranking calls it (default: the first). Raises ArtifactError where `out` holds anything else.
    """
    out = out or run / FOLDER
    if out.exists() and not (out.is_dir() and ((out / RANKING).is_file() or not any(out.iterdir()))):
        raise ArtifactError(f"{out}: exists and is no deployed network; it is left alone, choose another --out")
    ranking = ranked(run, data)
    names = [entry["path"] for entry in ranking]
    if network is not None and network not in names:
        raise ConfigError(f"{run}: has no network {network!r}; there are: {', '.join(names)}")
    chosen = ranking[0 if network is None else names.index(network)]
    model = artifact.load(run / chosen["path"])
    logger.info("deploying %s of %s", chosen["path"], run)
    sweep_beside(out)
    with whole(out) as work:
        work.mkdir()
        facts = {
            "schema": SCHEMA,
            "network": chosen["path"],
            "chosen": "asked for by name" if network is not None else RULE,
            "record": chosen["record"],
            "input_shape": list(data.input_shape),
            "preprocessing": preprocessing(data),
            "classes": class_names(data),
            "test_is_validation": data.test is data.validation,
            "onnx_error": export_onnx(model, data.train.example(2), work / FLOAT32),
            "int8": _write_int8(model, data, work / INT8, int8_loss),
        }
        shutil.copyfile(Path(artifact.__file__).with_name(PROGRAM), work / PROGRAM)
        _write_json(work / FACTS, facts)
        _write_told(work, facts, run, ranking)
    return out


def renew_deployed(run: Path) -> None:
    """Write the model card and the ranking of a run's deploy/ again, where there is one: its networks were measured again.

    The network stays the one that it is. Raises ArtifactError for a damaged deploy/.
    """
    folder = run / FOLDER
    if (folder / RANKING).is_file():
        facts, before = (
            read_json(folder / name, missing="missing; deploy the run again", damaged="deploy the run again")
            for name in (FACTS, RANKING)
        )
        try:
            known = {entry["path"]: entry["validation"] for entry in before["networks"]}
            _write_told(folder, facts, run, ranked(run, None, known))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder}: not what deploying writes ({error!r}); deploy the run again") from error


def _write_told(folder: Path, facts: dict[str, Any], run: Path, ranking: list[dict[str, Any]]) -> None:
    from rmprune.report.card import model_card  # with it come pandas and matplotlib

    (entry,) = (entry for entry in ranking if entry["path"] == facts["network"])
    write_text(folder / CARD, model_card(read_record(run / facts["record"]), entry["network"], facts))
    _write_json(folder / RANKING, {"schema": SCHEMA, "chosen": facts["network"], "rule": RULE, "networks": ranking})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _records(run: Path) -> list[Path]:
    records = find_records([run])
    if not (run / CONFIG_FILE).is_file():
        runs = runs_of(records)  # of a grid the grid: its cells share networks
        outer = ", ".join([str(one) for one in runs if not {*one.parents} & {*runs}][:9])
        give = f"give one of {outer}" if outer else "there is none under it"
        raise ArtifactError(f"{run}: not the directory of one run, which holds {CONFIG_FILE}; {give}")
    return records


def ranked(run: Path, data: Dataset | None, known: Mapping[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every network of a finished run, the one to deploy first, as plain JSON (see `RULE`); those that were not pruned come last, where
    others were. For runs whose records do not yet say how networks do on validation images: `data`, or what was `known` by path. Raises
    ArtifactError for a part of a run.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in _records(run):
        record = read_record(path)
        own = networks(record)
        pruned = own.keys() - {"original", "plain"}
        for name, entry in own.items():
            place = network_directory(path.parent, name)
            if not place.is_relative_to(run):
                raise ArtifactError(f"{run}: is a part of {place.parent}, where its {name} lies; deploy that")
            if (key := place.relative_to(run).as_posix()) in found:
                continue  # shared by several cells
            # exact removal changes rounding alone, by which nothing shall be chosen
            judged, judge = (
                (entry, place) if name != "plain" else (own["original"], network_directory(path.parent, "original"))
            )
            validation = judged.get("validation") or (known or {}).get(key)
            if validation is None and data is not None:
                validation = on_validation(artifact.load(judge), data, torch.device("cpu"))
            budget = record.get("budget", {}) if name in pruned else {}
            found[key] = {
                "path": key,
                "record": path.relative_to(run).as_posix(),
                "network": name,
                "method": entry.get("method"),
                "seed": record["seed"],
                "budget": budget,
                "meets_budget": meets_budget(budget, record, entry),
                "candidate": name in pruned or not pruned,
                "validation": validation or {},
                "test": {score: entry[score] for score in ("accuracy", "loss") if entry.get(score) is not None},
                **{kind: entry[kind] for kind in ("macs", "params")},
                **{f"{kind}_ratio": entry[kind] / record["original"][kind] for kind in ("macs", "params")},
                "latency": entry["latency"],
            }
    return sorted(found.values(), key=_rank)


def _rank(entry: dict[str, Any]) -> tuple[Any, ...]:
    validation, times = entry["validation"], entry["latency"]
    accuracy, loss = validation.get("accuracy"), validation.get("loss")
    return (
        not entry["candidate"],
        not entry["meets_budget"],
        -(accuracy or 0.0),
        math.inf if loss is None else loss,
        times[0]["median_ms"] if times else math.inf,
    )


def meets_budget(budget: dict[str, float], record: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether a network of a record is within its budget. In measured time: unless its time there is over it by more than chance, or was
    measured elsewhere since, which says nothing.
    """
    counted = {"macs_ratio": "macs", "params_ratio": "params", "memory_ratio": "activation_bytes"}
    if any(
        entry[counted[kind]] > limit * record["original"][counted[kind]]
        for kind, limit in budget.items()
        if kind in counted
    ):
        return False
    if (allowed := budget.get("latency_ratio")) is None:
        return True
    measure = record["config"].get("measure") or {}
    at = [(measure.get(name) or [None])[0] for name in ("backends", "threads", "batch_sizes")]
    times = [one for one in entry["latency"] if [one["backend"], one["threads"], one["batch_size"]] == at]
    return all(one.get("ratio_low", one.get("ratio", 0.0)) <= allowed for one in times)


def preprocessing(data: Dataset) -> dict[str, Any] | None:
    """What becomes of an image before the network sees it, for predict.py; None where somebody else's loader did it."""
    if data.statistics is None:
        return None
    _, height, width = data.input_shape
    side = data.config.photo_side if data.config.dataset == "imagefolder" else height if height == width else None
    return {"resize": side, "depth": data.depth, "mean": data.statistics.mean, "std": data.statistics.std}


def class_names(data: Dataset) -> list[str] | None:
    """In the order of the network's outputs; None where it is no classifier."""
    return [*data.classes] or [str(number) for number in range(data.num_classes)] or None


def _write_int8(model: nn.Module, data: Dataset, path: Path, limit: float) -> dict[str, Any]:
    """What int8 loses on validation images in ONNX Runtime; where that is within the limit the file is written."""
    if data.validation.loss is not None:
        return {"refused": "a loss of one's own says nothing of accuracy in int8"}
    try:
        candidate = Candidate("network", model, data.train.example(1), calibration_images(data.train))
        before, after = (
            candidate_accuracy(candidate, data.validation, backend) for backend in ("onnxruntime", "onnxruntime-int8")
        )
        kept = before - after <= limit + 1e-9
        facts = {"kept": kept, "images": len(data.validation), "float32": before, "int8": after, "limit": limit}
        if kept:
            path.write_bytes(candidate.form(onnx_int8))
            facts["test_accuracy"] = candidate_accuracy(candidate, data.test, "onnxruntime-int8")
    except RmpruneError as error:
        return {"refused": str(error)}
    said = "kept" if kept else "left out"
    logger.info("int8: %.2f %% of the validation images, float32 %.2f %%: %s", 100 * after, 100 * before, said)
    return facts
