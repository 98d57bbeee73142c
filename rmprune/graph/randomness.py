"""Calls that draw random numbers in eval mode, too: a network with one is no function, and nothing can be equal to it."""

import random
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import argument, arguments, module_around, writes
from rmprune.graph.double import in_double
from rmprune.graph.network import Network, named
from rmprune.graph.tensors import tensors_in, to_double

RANDOM = (
    "the network draws random numbers in eval mode: the same inputs give other outputs each time. Draw them only if self.training "
    "(torch.rand and its kin), or keep fixed ones as a buffer"
)
_ALWAYS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "normal", "uniform", "random",
    "poisson", "binomial", "multinomial", "exponential", "cauchy", "geometric", "log_normal", "gumbel_softmax",
    "fractional_max_pool2d", "fractional_max_pool2d_with_indices",
}  # fmt: skip
_TRAINING = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu",
    "stochastic_depth", "drop_block2d", "drop_block3d",
}  # fmt: skip


def refuse_random(network: Network) -> None:
    """Raises UnsupportedModel that names the first random call that the outputs depend on, and what to write instead."""
    for node in network.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
        layer = network.layer(node)
        if isinstance(layer, nn.Module) and named(layer, ("FractionalMaxPool2d",)):
            raise UnsupportedModel(
                f"{node.target}: FractionalMaxPool2d draws its windows in eval mode, too: use another pool"
            )
        if node.op not in ("call_function", "call_method"):
            continue
        if name in _TRAINING and _active(node):
            module = ", or use nn.Dropout" if "dropout" in name else ""
            raise UnsupportedModel(
                f"{_place(node)}: {name} is random in eval mode, too, as it is written (its training flag is True); write "
                f"{name}(..., training=self.training){module}"
            )
        if name in _ALWAYS or (name == "scaled_dot_product_attention" and argument(node, 4, "dropout_p")):
            raise UnsupportedModel(
                f"{_place(node)}: {name} draws random numbers in eval mode, too; call it only if self.training (drop_path and "
                "stochastic_depth take training=self.training), or keep fixed numbers as a buffer"
            )


def is_pure(node: fx.Node) -> bool:
    """Whether a call neither draws nor changes what it reads."""
    name = str(getattr(node.target, "__name__", node.target))
    return not writes(node) and "out" not in node.kwargs and name not in _ALWAYS | _TRAINING


def _place(node: fx.Node) -> str:
    path, _ = module_around(node)
    return f"{path}.{node.name}" if path else node.name


def _active(node: fx.Node) -> bool:
    given = arguments(node)
    return bool(given.get("train", given.get("training", True))) and given.get("p", 1) != 0


def draws() -> tuple[Any, ...]:
    """Where the generators of torch (on the CPU) and of Python stand."""
    return bytes(torch.get_rng_state().numpy()), random.getstate()


@torch.no_grad()
def refuse_drawn(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> None:
    """Raises UnsupportedModel where numbers that were drawn while `model` (float64) was traced, and so became fixed, reach its outputs."""
    image = tuple(to_double(x[:1]) for x in example_inputs)
    first, second = (tensors_in(in_double(model, image)) for _ in range(2))
    pairs = zip(first, second, strict=True)
    if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        raise UnsupportedModel(RANDOM)
