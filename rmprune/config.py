"""The settings: one frozen dataclass for each stage. Command-line flags, their help and config.toml are generated from these."""

from dataclasses import dataclass
from pathlib import Path

