"""Checkpoints of formats 1 to 4, which name no kinds, are read as they were."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import twofold

# By format: what makes layers that it was the first to have.
ROWS = {
    1: [{"form": "plain"}, {"form": "gauge"}],
    2: [{"objective": "modegpt"}, {"objective": "dense-columns"}],
    3: [{"objective": "basis-sharing"}],
    4: [{"bits": "4", "dense_bits": "8"}, {"objective": "eora", "bits": "4", "rank": 4, "keep": None}],
}
FORMS = {
    "quantized": "dense",
    "corrected": "corrected",
    "embedding": "embedding",
    "tied": "tied",
}  # that named a kind before


def before(settings: dict[str, object]) -> dict[str, object]:
    """Return settings of a layer as formats up to 4 had them: the kind was told by the form, or by a key."""
    old = {key: value for key, value in settings.items() if key != "kind"}
    return {**old, "form": FORMS[str(settings["kind"])]} if settings["kind"] in FORMS else old


@pytest.mark.long
@pytest.mark.parametrize(
    ("version", "settings"), [(version, one) for version, several in ROWS.items() for one in several]
)
def test_a_checkpoint_of_an_earlier_format_computes_the_same(version, settings, checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    given = {"keep": 0.6, "calibration": text_file, "tokens": 256, "window": 32, "eval_windows": 0, **settings}
    twofold.compress(
        str(checkpoint), out, quiet=True, **{name: value for name, value in given.items() if value is not None}
    )
    ids = torch.arange(20)[None]
    expected = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    path = out / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"]
    assert stored["format_version"] == 5
    stored["modules"] = {name: before(layer) for name, layer in stored["modules"].items()}
    stored["format_version"] = version
    path.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(ids).logits, expected)
    again.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["format_version"] == 5
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new")(ids).logits, expected)
