"""OpenVINO on the processor, in float32."""

from __future__ import annotations

from typing import ClassVar

from twofold.speed.runtimes.base import register
from twofold.speed.runtimes.graphs import Graphs


@register
class OpenVino(Graphs):
    """Graphs of ``twofold export --to openvino``."""

    name: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
