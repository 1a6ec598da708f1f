"""What a process makes of our checkpoints before it has imported twofold, and after."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import twofold
from conftest import TEXT, make_model, make_tokenizer
from factored import factored_model, with_lora
from twofold.checkpoint.peft.lora import whole_layers

CODE = """
import json, sys
sys.modules["torchao"] = None  # an extra, which none of this needs
import torch
from transformers import AutoModelForCausalLM
refused = []
for folder in ("small", "integers"):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        refused.append(folder)
import twofold
integers = AutoModelForCausalLM.from_pretrained("integers")
with torch.no_grad():
    total = integers(input_ids=torch.arange(20)[None]).logits.double().sum().item()
model = AutoModelForCausalLM.from_pretrained("small")
from peft import PeftModel
adapted = PeftModel.from_pretrained(model, "adapter")
layers = sum(type(module).__name__ == "CompactLora" for module in adapted.modules())
print(json.dumps({"refused": refused, "total": total, "layers": layers}))
"""


@pytest.mark.long
def test_a_fresh_process_fails_loudly_without_twofold_and_needs_no_more_than_its_import(tmp_path: Path) -> None:
    """One process for all, since each takes seconds to load the libraries."""
    model = factored_model()
    model.save_pretrained(tmp_path / "small")
    with_lora(model).save_pretrained(tmp_path / "adapter")
    given = {"keep": 0.6, "bits": 4, "dense_bits": 8, "texts": [TEXT], "tokens": 64, "window": 32}
    integers = twofold.factorize(make_model(), make_tokenizer(), quiet=True, **given)
    integers.save_pretrained(tmp_path / "integers")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mismatch" in done.stderr.lower()
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["refused"] == ["small", "integers"]
    assert said["layers"] == len(whole_layers(factored_model()))
    with torch.no_grad():
        assert said["total"] == pytest.approx(float(integers(input_ids=torch.arange(20)[None]).logits.double().sum()))
