"""ONNX's Resize as torch's interpolation, where both take each pixel from the same place; everything else is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F

from rmprune.graph.obstacle import Obstacle
from rmprune.onnx.drawing import Call

_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


def resize(call: Call) -> Any:
    """Resize and Upsample, by scales or to sizes. Raises Obstacle for a rule that torch does not have."""
    size = call.shape()
    where = call.attribute("coordinate_transformation_mode", b"half_pixel").decode()
    if call.op == "Upsample" or call.opset < 11:
        where = "asymmetric"
    mode, rounds = (
        call.attribute("mode", b"nearest").decode(),
        call.attribute("nearest_mode", b"round_prefer_floor").decode(),
    )
    if call.op == "Upsample" or call.opset < 11:
        rounds = "floor"
    for name, value in (
        ("exclude_outside", 0),
        ("antialias", 0),
        ("axes", None),
        ("keep_aspect_ratio_policy", b"stretch"),
    ):
        call.only(name, value)
    call.attribute("extrapolation_value")
    a = call.attribute("cubic_coeff_a", -0.75)
    at = 2 if call.op == "Resize" and call.opset >= 11 else 1
    scales = np.array(call.attribute("scales") or [], np.float32)
    scales = call.known(at, "scales") if call.given(at) else scales
    sizes = [int(n) for n in call.known(3, "sizes")] if call.given(3) else []
    factors = [out / n for out, n in zip(sizes, size, strict=True)] if sizes else [float(s) for s in scales.reshape(-1)]
    if len(factors) != len(size) or factors[:2] != [1, 1] or not all(0 < f < 2**16 for f in factors):
        raise Obstacle(f"it resizes {list(size)} by {factors[:8]}; read is a change of height and width")
    if all(f == 1 for f in factors):
        return call.source()
    given = {"size": tuple(sizes[2:])} if sizes else {"scale_factor": tuple(factors[2:])}
    return call.ask(
        F.interpolate, call.source(), **given, **_interpolation(mode, where, rounds, factors[2:], a, len(size))
    )


def _interpolation(mode: str, where: str, rounds: str, factors: list[float], a: float, rank: int) -> dict[str, Any]:
    """ONNX's rule for where a pixel comes from, as torch's mode. Raises Obstacle where torch has none that is the same."""
    centred = where in ("half_pixel", "pytorch_half_pixel")
    if mode == "nearest":
        whole = all(f.is_integer() for f in factors)
        floors = where == "asymmetric" and rounds == "floor"
        doubles = where == "asymmetric" and rounds == "round_prefer_floor" and set(factors) <= {1.0, 2.0}
        if floors or (whole and centred and rounds.startswith("round_prefer")) or doubles:
            return {"mode": "nearest"}
    elif mode == "linear" and rank in _MODES and (centred or where == "align_corners"):
        return {"mode": _MODES[rank], "align_corners": where == "align_corners"}
    elif mode == "cubic" and rank == 4 and a == -0.75 and where in ("half_pixel", "align_corners"):
        return {"mode": "bicubic", "align_corners": where == "align_corners"}
    raise Obstacle(f"mode={mode!r}, {where}, {rounds} by {factors} is not what torch computes")
