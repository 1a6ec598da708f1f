"""Folders that are no checkpoint, and names that a wrapper changed: each is told as what it is, by every command alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import twofold
from bases import logits
from conftest import TEXT, make_model, make_tokenizer
from twofold.model.load import load_model, load_skeleton

FOREIGN = {  # its files, whether config.json is beside them, and what the sentence says
    "pickle": (["pytorch_model.bin"], True, "as a pickle .*pytorch_model.bin.*save_pretrained"),
    "sharded pickle": (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], True, "as a pickle"),
    "pickle of another name": (["epoch3.pt"], False, "as a pickle .*epoch3.pt"),
    "gguf": (["small.Q4_K.gguf"], False, "name the file itself: .*small.Q4_K.gguf"),
    "gguf beside a configuration": (["small.gguf"], True, "name the file itself: .*small.gguf"),
    "flax": (["flax_model.msgpack"], True, "of Flax or TensorFlow .*flax_model.msgpack"),
    "tensorflow": (["tf_model.h5"], True, "of Flax or TensorFlow .*tf_model.h5"),
    "diffusers": (["model_index.json", "unet/config.json"], False, "a diffusers pipeline"),
    "sentence-transformers": (["modules.json", "0_Transformer/config.json"], False, "name the model in it: .*/0_Transformer"),
    "onnx": (["onnx/model.onnx", "tokenizer.json"], True, "an ONNX graph .*model.onnx"),
    "openvino": (["openvino_model.xml", "openvino_model.bin"], True, "an OpenVINO graph"),
    "mlx": (["weights.00.npz"], True, "weights of MLX"),
    "of their maker": (["consolidated.00.pth", "params.json"], False, "in the layout of their maker"),
    "deepspeed": (["zero_to_fp32.py", "global_step10/state.pt"], True, "DeepSpeed.*zero_to_fp32.py . NEW"),
    "fsdp": (["pytorch_model_fsdp_0/__0_0.distcp"], True, "FSDP.*accelerate merge-weights"),
    "a training run": (["checkpoint-500/config.json", "checkpoint-1000/config.json"], False, "a checkpoint: .*/checkpoint-1000"),
    "a run of adapters": (["checkpoint-20/adapter_config.json", "trainer_state.json"], False, "a checkpoint: .*/checkpoint-20"),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json"], False, "a tokenizer alone"),
    "another name": (["finetuned.safetensors"], True, "holds .*finetuned.safetensors.*rename it"),
    "an adapter without settings": (["adapter_model.safetensors"], False, "an adapter, without its adapter_config.json"),
    "nothing": ([], False, "it has no config.json$"),
}  # fmt: skip
PREFIXES = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning Fabric",
    "language_model.": "a multimodal model",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    folder = base.parent / "adapter"
    get_peft_model(load_model(str(base)).model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_folder_is_told_as_what_it_is(kind, base, tmp_path):
    files, configured, says = FOREIGN[kind]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    if configured:
        shutil.copy(base / "config.json", tmp_path)
    for load in [load_model, *([] if configured else [load_skeleton])]:
        with pytest.raises(twofold.TwofoldError, match=says):
            load(str(tmp_path))


def renamed(base: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_that_a_wrapper_changed_are_told_as_such(prefix, base, tmp_path):
    folder = renamed(base, tmp_path / "wrapped", lambda name: prefix + name)
    for load in (load_model, load_skeleton, partial(twofold.plan, keep=0.5, stream="always", quiet=True)):
        with pytest.raises(twofold.TwofoldError, match=rf"{PREFIXES[prefix]}.*take '{prefix}' out of the names"):
            load(str(folder))


def test_names_inside_of_a_multimodal_model_are_told(base, tmp_path):
    folder = renamed(base, tmp_path / "inside", lambda name: name.replace("model.", "model.language_model."))
    for load in (load_model, load_skeleton):
        with pytest.raises(twofold.TwofoldError, match=r"the name comes from a multimodal model .* config.json beside"):
            load(str(folder))


def test_names_that_a_wrapper_changed_in_an_adapter_are_told(base, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    wrapped = {name.replace("base_model.model.", "base_model.model._orig_mod."): t for name, t in tensors.items()}
    save_file(wrapped, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(twofold.TwofoldError, match=r"torch.compile.*take '_orig_mod\.' out of the names"):
        twofold.merge(str(base), str(folder), tmp_path / "out")


def test_a_copy_under_a_wrapper_s_name_does_no_harm(base, tmp_path):
    """As averaged weights beside the model's own: they are left over, and said to be."""
    folder = shutil.copytree(base, tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    copies = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(tensors | copies, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(folder))
    assert torch.equal(logits(loaded.model), logits(load_model(str(base)).model))
    assert any(f"{len(copies)} tensors" in note for note in loaded.notes)


def test_layers_that_an_adapter_stands_on_are_told(base, tmp_path):
    folder = renamed(base, tmp_path / "wrapped", lambda name: name.replace("q_proj.", "q_proj.base_layer."))
    with pytest.raises(twofold.TwofoldError, match=r"q_proj.base_layer.weight .* PEFT.*merge_and_unload"):
        load_model(str(folder))


def test_names_that_transformers_understands_go_on_working(base, tmp_path):
    folder = renamed(base, tmp_path / "lightning", lambda name: f"model.{name}")
    assert (logits(load_model(str(folder)).model) == logits(load_model(str(base)).model)).all()
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    folder = shutil.copytree(base, tmp_path / "headless")
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load_model(str(folder)).model).__name__ == "LlamaModel"


@pytest.mark.parametrize("configured", [False, True])
def test_an_adapter_is_told_by_every_command(configured, base, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    if configured:
        shutil.copy(base / "config.json", folder)
    (tmp_path / "text.txt").write_text(TEXT)
    text, out, name = str(tmp_path / "text.txt"), tmp_path / "out", str(folder)
    commands: list[Callable[[], Any]] = [
        lambda: twofold.inspect(name),
        lambda: twofold.plan(name, keep=0.5),
        lambda: twofold.compress(name, out, keep=0.5, calibration=[text], quiet=True),
        lambda: twofold.evaluate(name, text),
        lambda: twofold.export(name, "dense", out, quiet=True),
        lambda: twofold.tune(name, out, data=[str(tmp_path / "rows.jsonl")]),
        lambda: twofold.merge(name, name, out),
        lambda: twofold.extract(name, str(base), out, rank=2),
        lambda: twofold.chat(name),
    ]
    said = f"is a PEFT adapter of .*; merge it first: twofold merge .* {folder} --out NEW"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    for command in commands:
        with pytest.raises(twofold.TwofoldError, match=said):
            command()


def test_an_adapter_beside_a_model_is_refused(base, adapter, tmp_path):
    """By itself transformers loads the adapter's own base there, whatever weights stand beside it."""
    folder = shutil.copytree(base, tmp_path / "both")
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, folder)
    with pytest.raises(twofold.TwofoldError, match=r"holds a model and a PEFT adapter of .*in a folder of its own"):
        load_model(str(folder))
