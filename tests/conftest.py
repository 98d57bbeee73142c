"""One thread in each process: the suite runs in two of them side by side, and what its tests start inherits this."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
