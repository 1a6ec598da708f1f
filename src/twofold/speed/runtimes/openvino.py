"""OpenVINO on the processor, in float32."""

from __future__ import annotations

from typing import ClassVar

from twofold.speed.runtimes import runtime
from twofold.speed.runtimes._graphs import Graphs


@runtime
class OpenVino(Graphs):
    """Graphs of ``twofold export --to openvino``."""

    name: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
