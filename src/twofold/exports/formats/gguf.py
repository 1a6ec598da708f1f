"""GGUF of the merged model, for llama.cpp: a GGUF file of the original, with the weights that were factorized replaced.

The `gguf` package writes tensors, and has no converter of whole models: how a text is cut into tokens, and in which order
llama.cpp keeps the rows of a weight, stand in the original's file alone. So both are taken from there, each weight is checked
against it, and the result is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.exports.decoding import ModelDecoder
from twofold.exports.formats import Source, Written, export_format

FILE = "model.gguf"
Turn = Callable[[np.ndarray], np.ndarray]
CONVERTER = "without one, use `to=dense` and then llama.cpp's own convert_hf_to_gguf.py, which no package has"


@export_format("gguf", integers=True, takes=("base",), weights=(".gguf",))
def write_gguf(source: Source, folder: Path) -> Written:
    """Write the merged weights in float32, bfloat16 or float16, and everything else as the original's file has it.

    Raises:
        TwofoldError: if no GGUF file of the original is named, or it is of another model.
    """
    import gguf

    if source.base is None or not source.base.endswith(".gguf") or not Path(source.base).expanduser().is_file():
        raise TwofoldError(
            f"`to=gguf` takes the tokenizer and the layout from a GGUF file of the original: name it with `base=model.gguf`; "
            f"{CONVERTER}"
        )
    original = source.read(source.base).model
    merged = source.model.dequantize() if getattr(source.model, "hf_quantizer", None) is not None else source.model
    reader = gguf.GGUFReader(Path(source.base).expanduser())
    arch = str(reader.fields["general.architecture"].contents())
    names = _names(gguf, arch, original)
    before, after = original.state_dict(), merged.state_dict()
    for key, value in before.items():
        if key not in after or after[key].shape != value.shape:
            raise TwofoldError(
                f"{source.base} has the weight {key} {tuple(value.shape)}, and {source.loaded.name} has none of that shape; "
                "name a GGUF file of its original with `base`"
            )
    kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[source.dtype]
    merged_type = gguf.GGMLQuantizationType[kind]

    writer = gguf.GGUFWriter(folder / FILE, arch)
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            first = field.types[0]
            inner = field.types[-1] if first == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), first, sub_type=inner)
    replaced = 0
    for tensor in reader.tensors:
        key, data, stored_type = names.get(tensor.name), tensor.data, tensor.tensor_type
        if key is not None and not torch.equal(before[key], after[key]):
            turn = _turn(before[key], gguf.quants.dequantize(data, stored_type), original.config, tensor.name)
            data, stored_type = gguf.quants.quantize(turn(after[key].float().numpy()), merged_type), merged_type
            replaced += 1
        writer.add_tensor(tensor.name, data, raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(
        lambda: ModelDecoder(source.read(folder / FILE).model),
        [
            f"{replaced} merged weights in {kind}, the others as in {source.base}; read again by transformers, not by llama.cpp.",
            "As large as the original or larger: llama.cpp has no layer of two products. Quantize the file with its own tools.",
        ],
    )


def _names(gguf: Any, arch: str, model: Any) -> dict[str, str]:
    """Map GGUF's names of weights to transformers', and refuse an architecture that the gguf package does not know."""
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise TwofoldError(f"the gguf package does not know the architecture {arch}; {CONVERTER}")
    names = gguf.get_tensor_name_map(known[arch], model.config.num_hidden_layers)
    pairs = ((names.get_name(key, try_suffixes=(".weight", ".bias")), key) for key in model.state_dict())
    return {name: key for name, key in pairs if name is not None}


def _turn(weight: Tensor, stored: np.ndarray, config: Any, name: str) -> Turn:
    """Find how the file keeps a weight: as it is, transposed, or with the halves of each head's rows woven (rotary positions)."""
    wanted = weight.float().numpy()
    turns: list[Turn] = [lambda w: w, lambda w: np.ascontiguousarray(w.T)]
    for heads in {getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", 0)} - {0, None}:
        turns.append(lambda w, n=heads: w.reshape(n, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape))  # type: ignore[misc]
    for turn in turns:
        with suppress(ValueError):  # the rows are not so many heads
            if np.array_equal(turn(wanted), stored):
                return turn
    raise TwofoldError(f"the order of {name} in the GGUF file is none that Twofold knows; {CONVERTER}")
