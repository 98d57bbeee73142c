"""What networks cost: multiply-accumulates and parameters (cost), measured time (latency), predicted time
(latency_model).
"""

from rmprune.measure.backends import BACKENDS
from rmprune.measure.cost import count_macs, count_params
from rmprune.measure.latency import Latency, measure_latencies, measure_latency

__all__ = ["BACKENDS", "Latency", "count_macs", "count_params", "measure_latencies", "measure_latency"]
