"""Quality and size, measured: perplexity, divergence and agreement, bytes on disk and in memory."""

from twofold.evaluation.reference import Reference
from twofold.evaluation.size import Size, disk_bytes, memory_bytes, model_size
from twofold.task.held_out import evaluation_windows
from twofold.task.quality import Quality, measure_quality

__all__ = [
    "Quality",
    "Reference",
    "Size",
    "disk_bytes",
    "evaluation_windows",
    "measure_quality",
    "memory_bytes",
    "model_size",
]
