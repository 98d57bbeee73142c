"""Images and labels: data sets by name (load), their splits in memory or as a folder of files, and where they come from (sources)."""

from rmprune.data.load import DATASETS, Dataset, load_dataset
from rmprune.data.splits import Split, TensorSplit

__all__ = ["DATASETS", "Dataset", "Split", "TensorSplit", "load_dataset"]
