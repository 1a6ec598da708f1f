"""ONNX Runtime on the processor."""

from __future__ import annotations

from typing import ClassVar

from twofold.speed.runtimes import runtime
from twofold.speed.runtimes._graphs import Graphs


@runtime
class Onnx(Graphs):
    """Graphs of ``twofold export --to onnx``."""

    name: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)
