"""The pipelines: the order of the stages and their files, nothing clever. One module for each command."""
