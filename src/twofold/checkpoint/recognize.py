"""What a folder is that is no checkpoint of a Transformers model, and whose names a wrapper has put before its weights.

Adding a kind is one entry of a table.
"""

from __future__ import annotations

import json
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

ADAPTER = "adapter_config.json"
PICKLES = "Twofold reads no pickles, which can run code: load it in a program that you trust, and write it with save_pretrained"


@dataclass(frozen=True)
class Sign:
    """A kind of folder, known by its files.

    Args:
        patterns: one of them matches a file or folder in it.
        words: what it is and what to do; ``{found}`` is what matched last in the order of names, ``{beside}`` the folder of that,
            ``{folder}`` the folder itself, ``{base}`` the model that an adapter was trained on.
    """

    patterns: tuple[str, ...]
    words: str


SIGNS = (  # the first that fits counts
    Sign((ADAPTER,), "is a PEFT adapter of {base}; merge it first: twofold merge {base} {folder} --out NEW"),
    Sign(("adapter_model.*", "adapters.safetensors"), f"holds the weights of an adapter, without its {ADAPTER}; name a model"),
    Sign(("model_index.json",), "is a diffusers pipeline; name the folder of one model in it, such as its text_encoder"),
    Sign(("*_Transformer/config.json",), "is a sentence-transformers folder; name the model in it: {beside}"),
    Sign(("checkpoint-*/config.json", f"checkpoint-*/{ADAPTER}"), "is the folder of a training run; name a checkpoint: {beside}"),
    Sign(("zero_to_fp32.py", "global_step*", "*_optim_states.pt"),
         "is the state of a DeepSpeed run; join it first: python zero_to_fp32.py . NEW --safe_serialization"),
    Sign(("*.distcp", "*/*.distcp", "pytorch_model_fsdp*"),
         "is the sharded state of an FSDP run; join it first: accelerate merge-weights SHARDS NEW"),
    Sign(("*.gguf",), "holds a GGUF file; name the file itself: {found}"),
    Sign(("openvino_*.xml", "openvino/*.xml"), "holds an OpenVINO graph ({found}); name the model that it was exported from"),
    Sign(("*.onnx", "onnx/*.onnx"), "holds an ONNX graph ({found}); name the model that it was exported from"),
    Sign(("weights*.npz",), "holds weights of MLX ({found}); name the model that it was converted from"),
    Sign(("consolidated*", "original/consolidated*"),
         "holds weights in the layout of their maker ({found}); name the Transformers version of the model, or convert it"),
    Sign(("pytorch_model*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"), f"holds weights as a pickle ({{found}}); {PICKLES}"),
    Sign(("*.msgpack", "*.h5"),
         "holds weights of Flax or TensorFlow ({found}); write the model with save_pretrained from PyTorch"),
    Sign(("*.safetensors",),
         "holds {found}, and transformers reads model.safetensors or the files of model.safetensors.index.json; rename it"),
    Sign(("tokenizer*", "vocab*", "merges.txt", "*.tiktoken"), "holds a tokenizer alone; put its model beside it"),
)  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """What programs put into the names of weights."""

    mark: str
    start: bool  # whether names begin with it
    words: str  # who does it, and what to save in its place


WRAPPERS = (
    Wrapper("_orig_mod.", False, "torch.compile; save the model's _orig_mod"),
    Wrapper("_fsdp_wrapped_module.", False, "FSDP; gather the state dict of the model inside"),
    Wrapper("_forward_module.", False, "Lightning Fabric; save the model inside"),
    Wrapper(".base_layer.", False, "PEFT beside adapters; call merge_and_unload() and save what it returns"),
    Wrapper(".original_module.", False, "PEFT; call merge_and_unload() and save what it returns"),
    Wrapper("base_model.model.", True, "PEFT; call merge_and_unload() and save what it returns"),
    Wrapper("module.", True, "DataParallel or DeepSpeed; save the model's module"),
    Wrapper(
        "language_model.", False, "a multimodal model around this one; put that model's config.json beside the weights"
    ),
    Wrapper("model.", True, "Lightning or another class around the model; save the model inside"),
)


def recognize(folder: Path) -> str | None:
    """Say what a folder is that is no checkpoint of a model, and what to do; None if there is no sign of anything."""
    for sign in SIGNS:
        found = sorted((path for pattern in sign.patterns for path in folder.glob(pattern)), key=_in_order)
        if found:
            return sign.words.format(found=found[-1], beside=found[-1].parent, folder=folder, base=_base(folder))
    return None


def _in_order(path: Path) -> tuple[Any, ...]:
    """Sort checkpoint-1000 behind checkpoint-500."""
    digits = "".join(sign for sign in path.parent.name if sign.isdigit())
    return int(digits or 0), str(path)


def _base(folder: Path) -> str:
    """Return the name of the model that an adapter was trained on."""
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if isinstance(base, str) and base:
            return base
    return "BASE"


def check_checkpoint(folder: Path, name: str) -> None:
    """Refuse a folder that transformers would not load as the model in it: an adapter, or one without a configuration.

    Args:
        name: of the model, for messages.

    Raises:
        TwofoldError: saying what it is.
    """
    config = folder / "config.json"
    if (folder / ADAPTER).is_file():
        if not config.is_file() or not any(folder.glob("model*.safetensors")):
            raise TwofoldError(f"{name} {recognize(folder)}")
        # transformers would load the adapter's base model, wherever that is, in the place of these weights.
        raise TwofoldError(
            f"{name} holds a model and a PEFT adapter of {_base(folder)}; put the adapter ({ADAPTER} and adapter_model.*) in a "
            "folder of its own, and merge it: twofold merge"
        )
    if not config.exists():
        what = recognize(folder) if not any(folder.glob("model*.safetensors")) else None
        raise TwofoldError(
            f"{name} is not a Transformers checkpoint: it has no config.json{f', and {what}' if what else ''}"
        )


def check_names(strange: Set[str], missing: Set[str], prefix: str) -> None:
    """Refuse weights whose names something that was around the model has changed.

    Args:
        strange: the tensors of the files that no weight of the model is made of.
        missing: the weights of the model that no tensor of the files is for.
        prefix: of the part without a head, which transformers puts before names and takes away.

    Raises:
        TwofoldError: naming what changed them, and how to go without.
    """
    for wrapper in WRAPPERS:
        for name in sorted(strange):
            between = "." if wrapper.mark.startswith(".") else ""
            without = name.removeprefix(wrapper.mark) if wrapper.start else name.replace(wrapper.mark, between)
            if without != name and not missing.isdisjoint((without, prefix + without, without.removeprefix(prefix))):
                raise TwofoldError(
                    f"the weight {name} is {without} in the model: the name comes from {wrapper.words}, or take "
                    f"{wrapper.mark!r} out of the names in the file"
                )
