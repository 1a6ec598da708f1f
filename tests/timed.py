"""Models and settings of the tests of the bench, which time neither layers nor the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import make_model, make_tokenizer
from factored import model_of_form
from twofold.inference import latency
from twofold.inference.latency import Times
from twofold.speed import bench as bench_module
from twofold.speed import layers
from twofold.speed.record import Roofs
from twofold.speed.runtimes import Settings

SHORT: dict[str, Any] = {"prompt": 4, "new": 3, "prefill": 40, "batch": (1, 2), "repeats": 2, "quiet": True}
QUIET = Settings(quiet=True)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Return a dense and a factored checkpoint; layers and roofs are not really timed."""

    def take(m: int, n: int, ranks: list[int], tokens: int, form: str = "gauge", **_: Any) -> Times:
        return Times(dense=10.0, ranks=ranks, factored=[5.0 for _ in ranks])

    for module in (latency, layers):
        monkeypatch.setattr(module, "time_shape", take)
    monkeypatch.setattr(latency, "columns_pay", lambda dtype, device: True)
    monkeypatch.setattr(bench_module, "measure_roofs", lambda *_: Roofs(bytes_per_second=1e10, flops=1e11))
    for name, model in (("dense", make_model()), ("small", model_of_form("llama", "mixed"))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "dense"), str(tmp_path / "small")
