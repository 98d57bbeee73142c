"""What networks cost: multiply-accumulates and parameters (cost), memory of activations (activation_memory), measured time
(latency), accuracy by number format (accuracy), predicted time (latency_model).
"""

from rmprune.measure.accuracy import backend_accuracy, calibration_images
from rmprune.measure.backends import BACKENDS, needs_calibration
from rmprune.measure.cost import count_macs, count_params
from rmprune.measure.latency import check_available, measure_latencies, measure_latency
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.planner import ActivationMemory, activation_memory
from rmprune.measure.results import Latency

__all__ = [
    "BACKENDS", "ActivationMemory", "Latency", "LatencyModel", "activation_memory", "backend_accuracy",
    "calibration_images", "check_available", "count_macs", "count_params", "measure_latencies", "measure_latency",
    "needs_calibration",
]  # fmt: skip
