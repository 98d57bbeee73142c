from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rmprune.artifact import files as artifact
from rmprune.artifact.weights import load_checkpoint_into, read_state_dict
from rmprune.errors import ArtifactError
from rmprune.models.families import create_network


def net(width: int = 4) -> torch.nn.Module:
    return create_network("resnet8", num_classes=3, input_shape=(1, 8, 8), width=width)


@pytest.mark.parametrize("form", ["artifact", "safetensors", "pt", "wrapped"])
def test_weights_from_every_form(tmp_path: Path, form: str) -> None:
    trained = net()
    path = tmp_path / f"weights.{form}"
    if form == "artifact":
        artifact.save(trained, path)
    elif form == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save(trained.state_dict() if form == "pt" else {"state_dict": trained.state_dict(), "epoch": 3}, path)
    loaded = load_checkpoint_into(net(), path, "resnet8").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(net(8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="weights of another network than resnet8"):
        load_checkpoint_into(net(), tmp_path / "other.pt", "resnet8")


def test_a_missing_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such checkpoint"):
        load_checkpoint_into(net(), tmp_path / "none.pt", "resnet8")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing else")
    (tmp_path / "empty.pt").touch()
    for name in ("damaged.pt", "empty.pt"):
        with pytest.raises(ArtifactError, match=r"cannot be read|not a plain state dict"):
            read_state_dict(tmp_path / name)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match="not a plain state dict"):
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_small_images_get_a_small_stem() -> None:
    small = create_network("resnet18", num_classes=10, input_shape=(1, 28, 28))
    large = create_network("resnet18", num_classes=10, input_shape=(3, 224, 224))
    assert small.conv1.stride == (1, 1) and large.conv1.stride == (2, 2)
