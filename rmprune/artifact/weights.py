"""A network from what a user names: a model name, an artifact directory, or a file of weights for a named model. Nothing is executed."""

import pickle
from pathlib import Path

from torch import Tensor, nn

from rmprune import artifact
from rmprune.artifact.tensors import first_line, is_plain, read_pickled, read_safetensors
from rmprune.errors import ArtifactError


def load_checkpoint_into(model: nn.Module, path: Path, name: str) -> nn.Module:
    """`model` with the weights of an artifact directory or of a file (.safetensors, or a .pt/.pth state dict read with weights_only).

    Raises ArtifactError where the file is missing or damaged or holds another network.
    """
    if not path.exists():
        raise ArtifactError(
            f"{path}: there is no such checkpoint; give an artifact directory or a .safetensors, .pt or .pth file"
        )
    state = artifact.load(path).state_dict() if path.is_dir() else read_state_dict(path)
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape] + [
        key for key in state if key not in own
    ]
    if wrong:
        raise ArtifactError(
            f"{path}: these are the weights of another network than {name} (first difference: {wrong[0][:80]})"
        )
    model.load_state_dict(state)
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict that torch.save wrote (also under the key state_dict or model)."""
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path}: not a plain state dict ({first_line(error)}), and nothing in it is run; load it where it was made, and save "
            "model.state_dict()"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as weights ({first_line(error)}); copy or save it again") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise ArtifactError(f"{path}: not a state dict (name -> tensor); save model.state_dict()")
    for key, value in content.items():
        if not is_plain(value) or value.is_complex():
            raise ArtifactError(f"{path}: {key[:80]} is no plain tensor; save the state_dict() of a plain model")
    return {key.removeprefix("module."): value for key, value in content.items()}
