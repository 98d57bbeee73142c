"""What networks cost: multiply-accumulates and parameters (cost), measured time (latency), predicted time
(latency_model).
"""

from rmprune.measure.backends import BACKENDS
from rmprune.measure.cost import count_macs, count_params
from rmprune.measure.latency import Latency, check_available, measure_latencies, measure_latency
from rmprune.measure.latency_model import LatencyModel

__all__ = [
    "BACKENDS",
    "Latency",
    "LatencyModel",
    "check_available",
    "count_macs",
    "count_params",
    "measure_latencies",
    "measure_latency",
]
