"""Quality and size, measured: perplexity, divergence and agreement, bytes on disk and in memory."""

from twofold.evaluate.quality import Quality, measure_quality
from twofold.evaluate.reference import Reference
from twofold.evaluate.size import Size, disk_bytes, memory_bytes, model_size
from twofold.evaluate.text import evaluation_windows

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
