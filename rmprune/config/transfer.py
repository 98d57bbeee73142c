"""The defaults of a training that starts from pretrained weights. What is set by a flag or in TOML comes before them."""

from typing import Any

TRANSFER: dict[str, dict[str, Any]] = {
    "data": {"augment": "light"},
    "train": {"epochs": 15, "learning_rate": 0.01, "head_rate": 5.0, "warmup_epochs": 1.0},
    "sparsity": {"strength": 0.2},
    "finetune": {"epochs": 15, "learning_rate": 0.01, "warmup_epochs": 0.0},
}
"""Stage -> settings, of those commands that have the stage."""


def transfer_flags(stages: set[str]) -> list[str]:
    """These defaults as flags of a command with these stages; those of data and training have no prefix.

    >>> rmprune.config.transfer.transfer_flags({"sparsity"})
    ['--sparsity.strength', '0.2']
    """
    return [
        word
        for stage, settings in TRANSFER.items()
        if stage in stages
        for name, value in settings.items()
        for word in (f"--{'' if stage in ('data', 'train') else stage + '.'}{name.replace('_', '-')}", str(value))
    ]
