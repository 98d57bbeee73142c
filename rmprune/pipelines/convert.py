"""`inspect` and `convert`: what RM would do to a network, and RM alone with its files. Nothing is trained or pruned."""

import dataclasses
import logging
import re
import shlex
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rmprune import artifact
from rmprune.artifact.weights import load_checkpoint_into, start_from
from rmprune.config import ConvertConfig, InspectConfig, NetworkConfig, architecture
from rmprune.errors import ConfigError, NotEquivalent
from rmprune.graph.build import destination_of
from rmprune.measure import count_macs, count_params
from rmprune.models.families import create_network
from rmprune.models.resnet import is_cifar_depth
from rmprune.onnx.compare import TOLERANCES, difference, is_off, outputs_of
from rmprune.onnx.file import is_onnx, open_onnx
from rmprune.onnx.read import OnnxNetwork
from rmprune.onnx.runtime import batch_for, checked_network, run_file
from rmprune.onnx.write import write_like
from rmprune.pipelines.stages import image_shape
from rmprune.pruning.options import block_options
from rmprune.pruning.plan import Choice
from rmprune.removal import BlockReport, Plan, plan_removal, remove_residuals
from rmprune.removal.remove import nothing_to_remove
from rmprune.runs.writing import sweep_beside

logger = logging.getLogger("rmprune")
_SHOWN: tuple[Choice, ...] = ("keep", "remove", "fuse", "merge", "drop")
_IMAGE_SIZES = {r"preact_resnet\d+|mobilenet_v2_small": 32, "mobilenet_v2_digits": 8}


def open_network(config: NetworkConfig) -> tuple[nn.Module, Tensor]:
    """The network of a name or artifact in eval mode, and one example image batch [2, C, H, W] with a fixed seed."""
    path = Path(config.model)
    if path.is_dir():  # whole or not, which reading it says
        model = artifact.load(path).eval()
        told = artifact.read_extra(path).get("input_shape")
        known = None if told is None else image_shape(told, path)
        fits = known is None or config.in_channels == known[0]
        _refuse_named_settings(config, "an artifact", ("model", "image_size", *["in_channels"] * fits))
        shape = known or _shape_from(config)
        if known is not None and config.image_size is not None:
            shape = (known[0], *_shape_from(config)[1:])
    else:
        shape = _shape_from(config)
        torch.manual_seed(0)
        model = create_network(
            config.model, num_classes=config.num_classes, input_shape=shape, **architecture(config)
        ).eval()
        if config.weights is not None:
            said = start_from(model, config.weights, config.model, by_order=config.weights_by_order)
            logger.info("%s of %s%s", config.model, config.weights, f": {said}" if said else "")
        if config.checkpoint is not None:
            model = load_checkpoint_into(model, config.checkpoint, config.model).eval()
    return model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def open_examples(config: NetworkConfig) -> tuple[nn.Module, tuple[Tensor, ...], OnnxNetwork | None]:
    """The network of a name, artifact or ONNX file in eval mode, one example batch of each of its inputs, and the file that was read."""
    if is_onnx(config.model):
        _refuse_named_settings(config, "an ONNX file", ("model", "image_size", "in_channels"))
        network = checked_network(config.model, config.image_size, config.in_channels)
        return network.model, network.examples, network
    model, example = open_network(config)
    return model, (example,), None


def _refuse_named_settings(config: NetworkConfig, what: str, free: tuple[str, ...]) -> None:
    """A file is what it is: raise ConfigError for a setting that only a network made by its name has."""
    for field in dataclasses.fields(config):
        if getattr(config, field.name) != field.default and field.name not in free:
            flag = field.name.replace("_", "-")
            raise ConfigError(f"{config.model} is {what}, which --{flag} cannot change; leave it out")


def _shape_from(config: NetworkConfig) -> tuple[int, int, int]:
    named = next((size for names, size in _IMAGE_SIZES.items() if re.fullmatch(names, config.model)), 224)
    usual = 32 if is_cifar_depth(config.model) else named
    size = usual if config.image_size is None else config.image_size
    if size < 1:
        raise ConfigError(f"image_size is {size}; it must be at least 1")
    return config.in_channels, size, size


def run_inspect(config: InspectConfig) -> list[BlockReport]:
    """Print each residual of the network: removable or why not, the form, and what it costs."""
    model, examples = open_examples(config.network)[:2]
    blocks = plan_removal(model, examples, **vars(config.removal))
    console = Console()
    options = block_options(model, examples, removal=config.removal)
    console.print(plan_table(config.network.model, blocks, count_macs(model, examples)))
    reasons: dict[tuple[str, str], list[str]] = {}
    for block in blocks:
        may = ", ".join(choice for choice in _SHOWN if not options[block.name][choice])
        reasons.setdefault(("a plan may choose", may), []).append(block.name)
        own = {"stays": block.reason} | {f"no {choice}": options[block.name][choice] for choice in _SHOWN[1:]}
        for said, reason in own.items():
            if reason and (said == "stays" or reason != block.reason):
                reasons.setdefault((said, reason), []).append(block.name)
    for (said, reason), names in reasons.items():
        console.print(f"{said} ({', '.join(names)}): {reason}", markup=False, highlight=False)
    for note in dict.fromkeys(block.note for block in blocks if block.note):
        noted = ", ".join(block.name for block in blocks if block.note == note)
        console.print(f"note ({noted}): {note}", markup=False, highlight=False)
    if not any(block.removable for block in blocks):
        console.print(
            f"{nothing_to_remove({}) if not blocks else 'no residual can go'}; slim --method residual prunes the network as it is"
        )
        return blocks
    out = f"runs/{Path(config.network.model).name.removesuffix('.onnx')}-plain"
    again = shlex.join(["python", "-m", "rmprune", "convert", *network_arguments(config.network), "--out", out])
    console.print(f"next: {again}", markup=False, soft_wrap=True)
    return blocks


def network_arguments(config: NetworkConfig) -> list[str]:
    """The command line's arguments that name this network; what is at its default is left out."""
    found = [config.model]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "model" and value != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            found += [flag] if value is True else [flag, str(value)]
    return found


def plan_table(name: str, blocks: Plan, macs: int) -> Table:
    """The blocks as a table; MACs and parameters are those of a block's own layers, for one image; `macs`: of the network."""
    change = f"{macs / 1e6:,.1f} → {(macs + blocks.macs_change) / 1e6:,.1f} MMACs"
    table = Table(title=f"{name}: {change}", pad_edge=False)
    table.add_column("block", no_wrap=True)
    table.add_column("residual", overflow="fold", min_width=len("removable"))
    table.add_column("form and shortcut", overflow="fold")
    for column in ("copies", "MMACs", "k parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for block in blocks:
        if block.removable:
            macs_change = f"{block.macs_before / 1e6:,.1f} → {block.macs_after / 1e6:,.1f}"
            params_change = f"{block.params_before / 1e3:,.1f} → {block.params_after / 1e3:,.1f}"
            table.add_row(
                block.name,
                "removable",
                f"{block.form}, {block.shortcut}",
                str(block.reserved),
                macs_change,
                params_change,
            )
        else:
            table.add_row(block.name, "stays", block.shortcut or "", "", "", "")
    return table


def run_convert(config: ConvertConfig) -> Path:
    """Remove residuals, write the artifact, and say what was done and what it costs."""
    _check_out(config)
    sweep_beside(config.out)
    model, examples, file = open_examples(config.network)
    removal = remove_residuals(model, examples, batch_norm=config.batch_norm, **vars(config.removal))
    facts: dict[str, object] = {"source": config.network.model, "removal": removal.facts}
    if len(examples) == 1 and examples[0].dim() == 4:
        facts["input_shape"] = list(examples[0].shape[1:])
    error = 0.0

    def write_onnx(path: Path) -> None:
        nonlocal error
        assert file is not None
        error = write_like(file, removal.model, path)

    artifact.save(
        removal.model,
        config.out,
        example_inputs=tuple(x[:1] for x in examples) if config.onnx and file is None else None,
        write_onnx=write_onnx if config.onnx and file is not None else None,
        extra=facts,
        overwrite=config.overwrite,
    )
    console = Console(soft_wrap=True, highlight=False)
    before, after = count_macs(model, examples), count_macs(removal.model, examples)
    console.print(
        f"{config.out}: {len(removal.removed)} residuals removed, {len(removal.kept)} kept, largest error {removal.max_error:.1e}\n"
        f"MACs {before / 1e6:,.1f} M -> {after / 1e6:,.1f} M, "
        f"parameters {count_params(model) / 1e6:,.2f} M -> {count_params(removal.model) / 1e6:,.2f} M (before pruning)",
        markup=False,
    )
    for name, reason in removal.kept.items():
        console.print(f"kept {name}: {reason}", markup=False)
    if config.onnx and file is not None:
        console.print(
            f"model.onnx differs from {file.file.path} by {error:.1e} of its scale in ONNX Runtime", markup=False
        )
    if config.check:
        inputs = examples if file is None else batch_for(file.file, examples)
        for name, error in check_written(config.out, model, inputs).items():
            console.print(f"check: {name} differs from the original by {error:.1e} of its scale", markup=False)
    return config.out


def _check_out(config: ConvertConfig) -> None:
    """Raise ConfigError where something stands at --out that is not to be replaced, or what is being converted lies there."""
    source = Path(config.network.model)
    if config.out.exists() and not (config.overwrite and artifact.is_artifact(config.out)):
        raise ConfigError(f"{config.out}: exists already; choose another --out, or --overwrite an artifact")
    if config.out.exists() and source.exists() and source.resolve().is_relative_to(config.out.resolve()):
        raise ConfigError(
            f"{config.out}: is what is being converted, or holds it, and would be lost; choose another --out"
        )


def check_written(path: Path, model: nn.Module, examples: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative difference of the loaded artifact, and of its ONNX file, to the original in its own format.

    Raises NotEquivalent over the format's tolerance and over what it does to the original itself.
    """
    expected = outputs_of(model.eval(), examples)
    found = {"the artifact": (outputs_of(artifact.load(path), examples), destination_of(model).dtype)}
    if (path / "model.onnx").is_file():
        file = open_onnx(path / "model.onnx").runnable
        found["model.onnx in ONNX Runtime"] = run_file(file, examples), file.dtype
    errors = {name: difference(outputs, expected) for name, (outputs, _) in found.items()}
    for name, error in errors.items():
        tolerance = TOLERANCES[found[name][1]]
        if is_off(error, tolerance, model, examples):
            raise NotEquivalent(f"{path}: {name} differs by {error:.1e}, more than {tolerance:.0e}; do not deploy it")
    return errors
