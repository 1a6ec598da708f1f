"""Checkpoints whose blocks share bases, with settings or tensors that are wrong or missing: each is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import twofold
from bases import shared_model
from twofold.checkpoint.plugin import FORMAT_VERSION
from twofold.model.load import load_model
from twofold.nn.places import BASES

QUERY = "model.layers.0.self_attn.q_proj"
BASIS = f"model.{BASES}.model-layers-0-self_attn-q_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    shared_model(allocate="uniform").save_pretrained(folder)
    return folder


def spoiled(sound, tmp_path, modules=None, tensors=None, **settings):
    """A copy of a sound checkpoint with other settings of its layers, or other tensors."""
    config = json.loads((sound / "config.json").read_text())
    config["quantization_config"] |= settings
    if modules is not None:
        modules(config["quantization_config"]["modules"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(sound / "model.safetensors")
    if tensors is not None:
        tensors(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    return tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"basis": None}, "the name of its basis, without dots, got None"),
        ({"basis": ""}, "the name of its basis, without dots, got ''"),
        ({"basis": "a.b"}, "the name of its basis, without dots, got 'a.b'"),
        ({"basis": ["a"]}, "the name of its basis"),
        ({"basis": 3}, "the name of its basis"),
        ({"rank": 3}, "32 inputs, rank 3 .*in another layer, here it has 32 inputs, rank 15"),
        ({"form": "shared-plain"}, "in another layer, here it has 32 inputs"),
        ({"basis": "model-layers-0-mlp-up_proj", "rank": 2}, "in another layer, here it has 32 inputs, rank 2"),
        ({"form": "rows"}, "the form must be one of|in another layer"),
        ({"form": ["shared-plain"]}, "the form must be one of|in another layer"),
        ({"form": None}, "the form must be one of|in another layer"),
        ({"rank": "9"}, "a whole number as its rank"),
        ({"rank": True}, "a whole number as its rank"),
        ({"columns": 3}, "a whole number as its rank, and a form"),
        ({"rank": 10**12}, "must be between 1 and 31|in another layer"),
        ({"rank": 0}, "must be between 1 and 31|in another layer"),
    ],
)
def test_wrong_settings_are_refused(change, says, sound, tmp_path):
    folder = spoiled(sound, tmp_path, lambda modules: modules[QUERY].update(change))
    with pytest.raises(twofold.TwofoldError, match=rf"the plan of .*q_proj.* does not fit: .*({says})"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(twofold.TwofoldError, match=says):
        load_model(str(folder))


def test_a_layer_without_its_setting_and_an_old_reader(sound, tmp_path):
    folder = spoiled(sound, tmp_path, lambda modules: modules[QUERY].pop("basis"))
    with pytest.raises(twofold.TwofoldError, match="the name of its basis, without dots, got None"):
        AutoModelForCausalLM.from_pretrained(folder)
    # Formats up to 4 named no kind: without a basis it is a factored layer, of a form that those do not have.
    folder = spoiled(sound, tmp_path, lambda modules: [modules[QUERY].pop(key) for key in ("kind", "basis")])
    with pytest.raises(twofold.TwofoldError, match="the form must be one of plain, rows, columns"):
        AutoModelForCausalLM.from_pretrained(folder)
    folder = spoiled(sound, tmp_path, format_version=FORMAT_VERSION + 1)
    says = f"format version {FORMAT_VERSION + 1}, this Twofold reads up to {FORMAT_VERSION}; install a newer"
    with pytest.raises(twofold.TwofoldError, match=says):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{BASIS}.reduce.weight"), f"{BASIS}.reduce.weight"),
        (lambda t: t.pop(f"{QUERY}.expand.weight"), f"{QUERY}.expand.weight"),
        (lambda t: t.pop(f"{BASIS}.order"), f"{BASIS}.order"),
        (lambda t: t[f"{BASIS}.order"][:1].fill_(40), f"{BASIS}.order in the checkpoint is no order of its 32 columns"),
        (
            lambda t: t[f"{BASIS}.order"][:1].copy_(t[f"{BASIS}.order"][1:2]),
            f"{BASIS}.order in the checkpoint is no order",
        ),
        (lambda t: t.update({f"{BASIS}.reduce.weight": torch.ones(3, 29)}), f"{BASIS}.reduce"),
        (lambda t: t.update({f"{BASIS}.reduce.weight": t[f"{BASIS}.reduce.weight"].T}), f"{BASIS}.reduce"),
    ],
    ids=["no basis", "no expand", "no order", "order out of range", "order twice", "another rank", "turned"],
)
def test_tensors_that_are_missing_or_wrong_are_refused(change, says, sound, tmp_path):
    folder = spoiled(sound, tmp_path, tensors=change)
    with pytest.raises((twofold.TwofoldError, RuntimeError), match=f"{says}|mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(twofold.TwofoldError, match=says):
        load_model(str(folder))


@pytest.mark.slow
def test_without_twofold_it_fails_loudly(sound):
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(sound)!r}); print('LOADED')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "LOADED" not in done.stdout and "mismatch" in done.stderr.lower()
