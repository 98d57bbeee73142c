"""Whether networks of reports/pruning-coverage whose removal is "not proved" are themselves that uncertain: what an exact rewrite without
any removal, folding batch norms in float64, changes of their outputs, and what one rounding of every weight and statistic does.

python experiments/own_rounding.py tv:efficientnet_b1 tv:efficientnet_b6     # 4 CPU seconds; tv:regnet_y_32gf takes 4 GiB
"""

import sys

import torch
from pruning_coverage import build, randomise
from torch.fx.experimental.optimization import fuse

from rmprune.graph.double import in_double
from rmprune.graph.equivalence import own_rounding, reference_copy
from rmprune.graph.relative_error import Comparison, comparison_inputs


@torch.no_grad()
def measure(net: str) -> str:
    """One line for a network."""
    model, x = build(net)
    randomise(model, x)
    checked, groups = comparison_inputs((x,), 2, 4)
    twin = reference_copy(model)
    comparison = Comparison(checked, groups, in_double(twin, checked))
    own = own_rounding(twin, comparison)
    folded = comparison.error(in_double(fuse(twin), checked))
    return f"{net}: folding batch norms {folded:.1e}, one rounding {own:.1e}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(measure(name), flush=True)
