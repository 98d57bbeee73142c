"""Where the channels of an input stand: what TensorFlow trained takes (N, H, W, C). Reads the graph, and changes nothing."""

from __future__ import annotations

from rmprune.onnx.file import OnnxFile, OnnxInput

_CHANNELS_SECOND = (
    "Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "BatchNormalization", "InstanceNormalization", "MaxPool", "AveragePool",
    "LpPool", "GlobalAveragePool", "GlobalMaxPool", "LRN", "SpaceToDepth", "DepthToSpace",
)  # fmt: skip
_SAME_AXES = (
    "Identity", "Cast", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Abs", "Neg", "Relu", "Clip", "Pad", "Slice", "Resize", "Upsample",
    "Concat", "Split", "QuantizeLinear", "DequantizeLinear", "Dropout",
)  # fmt: skip
_FEW = (1, 3, 4)  # channels of images as cameras give them


def channel_axis(file: OnnxFile, entry: OnnxInput) -> int:
    """The axis of an input's channels: as the first layer sees it that has a rule for that, through what stands before. Where there is
    none, the last one if it alone says a number, as of colors, else 1.
    """
    rank = len(entry.sizes)
    axes = {entry.name: list(range(rank))}  # of what is computed from the input, in the input's own numbers
    for node in file.nodes if rank > 2 else ():
        found = next((axes[name] for name in node.input if name in axes), None)
        if found is None:
            continue
        if node.op_type in _CHANNELS_SECOND and node.input[0] in axes:
            return found[1] or 1
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [*reversed(range(rank))])
            if sorted(order) == list(range(rank)):
                axes[node.output[0]] = [found[axis] for axis in order]
        elif node.op_type in _SAME_AXES:
            axes |= dict.fromkeys(node.output, found)
    alone = rank > 3 and entry.sizes[-1] in _FEW and set(entry.sizes[1:-1]) == {None}
    return rank - 1 if alone else 1
