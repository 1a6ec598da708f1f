"""The merged checkpoint: every factored layer as the one matrix that it stands for, for programs that know nothing else."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from twofold.checkpoint.ties import settle_ties
from twofold.exports.decoding import ModelDecoder
from twofold.exports.formats import Source, Written, export_format
from twofold.model.load import load_model
from twofold.nn.places import cast_weights


@export_format("dense", integers=True)
def write_dense(source: Source, folder: Path) -> Written:
    """Write products multiplied in float64 and rounded once to the stored dtype, in files of the original's architecture."""
    save_dense(source, folder)
    return Written(
        lambda: ModelDecoder(load_model(str(folder), device="cpu").model),
        ["As large as the original: merging gives up what was saved, in memory and in time."],
    )


def save_dense(source: Source, folder: Path) -> None:
    """Merge the model in place and save it with its tokenizer."""
    model = source.model
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
    cast_weights(model, source.dtype)
    model.config.dtype = source.dtype
    settle_ties(model)
    model.save_pretrained(folder)
    save_beside(source, folder)


def save_beside(source: Source, folder: Path) -> None:
    """Save what stands beside the weights: the tokenizer, and how the model generates."""
    if source.loaded.tokenizer is not None:
        source.loaded.tokenizer.save_pretrained(folder)
    generation = getattr(source.model, "generation_config", None)
    if isinstance(generation, GenerationConfig) and source.model.can_generate():
        generation.save_pretrained(folder)
