"""ONNX Runtime on the processor."""

from __future__ import annotations

from typing import ClassVar

from twofold.speed.runtimes.base import register
from twofold.speed.runtimes.graphs import Graphs


@register
class Onnx(Graphs):
    """Graphs of ``twofold export --to onnx``."""

    name: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)
