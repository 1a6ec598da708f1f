"""The merged checkpoint: every factored layer as the one matrix that it stands for, for programs that know nothing else."""

from __future__ import annotations

from pathlib import Path

from twofold.checkpoint.beside import WHOLE
from twofold.exports.decoding import ModelDecoder
from twofold.exports.formats import Source, Written, export_format
from twofold.model.written import save_model
from twofold.nn.places import cast_weights


@export_format("dense", integers=True, beside=WHOLE)
def write_dense(source: Source, folder: Path) -> Written:
    """Write products multiplied in float64 and rounded once to the stored dtype, in files of the original's architecture."""
    save_dense(source, folder)
    return Written(
        lambda: ModelDecoder(source.read(folder).model),
        ["As large as the original: merging gives up what was saved, in memory and in time."],
    )


def save_dense(source: Source, folder: Path) -> None:
    """Merge the model in place and save it."""
    model = source.model
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
    own = source.loaded.own_dtypes if source.dtype == source.loaded.stored_dtype else {}
    cast_weights(model, source.dtype, own)
    model.config.dtype = source.dtype
    save_model(model, folder)
