"""A network on disk, without pickle: written and read (files), its description (describe) and the way back (rebuild), weights."""

from rmprune.artifact.files import is_artifact, load, read_extra, save

__all__ = ["is_artifact", "load", "read_extra", "save"]
