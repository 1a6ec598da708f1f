"""The export of a model, from its loading to the folder in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import torch

from twofold.checkpoint.beside import LICENCE, Licence
from twofold.errors import TwofoldError
from twofold.evaluation.size import memory_bytes
from twofold.exports.compare import Comparison, check, compare, refer, words
from twofold.exports.formats import FORMATS, Format, Source
from twofold.exports.layers import check_plain, compact_layers, recorded_original
from twofold.host.faults import errors_in_words
from twofold.host.folders import EXPORTED, check_apart, check_output, check_space, staged_folder
from twofold.host.progress import progress
from twofold.host.quiet import quiet_bars
from twofold.model.load import LoadedModel, load_model
from twofold.model.work import TokenWork, work_of
from twofold.model.written import Companions
from twofold.version import __version__

TOKENS = 64  # decoded greedily for the comparison


class Exported(pydantic.BaseModel, extra="forbid"):
    """What was exported, and how it compares with the model."""

    format: str
    model: str
    out: str
    dtype: str  # of the exported weights
    weight_bytes: int  # of the model's own weights in that dtype, factors as factors
    file_bytes: int  # of the files that hold the exported weights, with their graph
    compared_in: str  # dtype of the computation
    comparison: Comparison
    notes: list[str]
    carried: list[str] = []  # files of the model that stand beside the weights as they were
    licence: Licence = {}  # of the original: what its card says, or the file that holds it
    work: TokenWork | None = None  # of a graph: what it moves and multiplies for a token
    twofold_version: str = __version__

    def words(self) -> list[str]:
        """Tell what was exported, a sentence or two a line."""
        share = self.file_bytes / self.weight_bytes
        return [
            f"Exported {self.model} as {self.format}: {self.out}",
            f"Size on disk: {self.file_bytes / 1e6:.2f} MB in {self.dtype}, {share:.1%} of the model's weights "
            f"({self.weight_bytes / 1e6:.2f} MB in the same type).",
            *words(self.comparison, self.compared_in),
            *self.notes,
        ]


def export(
    model: str,
    to: str,
    out: str | Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    dtype: str = "auto",
    check_tokens: int = TOKENS,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    quiet: bool = False,
) -> Exported:
    """Write a model in another form, read it again, and compare the two.

    Args:
        to: the name of the format: dense, portable, lora, onnx, openvino, gguf, lite-whisper, or one of another package.
        out: a folder, which appears whole or not at all.
        rank: of the adapter, for ``lora``; by default what is exact.
        base: the original model, for ``lora`` (by default the one that the checkpoint was made from), or its .gguf file, for
            ``gguf``.
        dtype: of the exported weights; "auto" is the stored one, or float32 for runtimes.
        check_tokens: to decode greedily in both, for the comparison.
        dequantize: turn weights that are quantized already into ordinary ones.

    Raises:
        TwofoldError: if the model can't be loaded or exported in that form, or the export does not say the same.
    """
    kind, folder = FORMATS.get(to), Path(out).expanduser()
    kind.check()
    _check_settings(kind, {"rank": rank, "base": base})
    check_output(folder, overwrite)
    with progress("Loading", 1, quiet=quiet) as tick:
        loaded = load_model(model, device="cpu", trust_remote_code=trust_remote_code, dequantize=dequantize)
        tick()
    _check_kind(kind, loaded)
    _check_place(kind, loaded, base, folder)
    stored = _dtype(dtype, loaded, kind)
    weight_bytes = memory_bytes(loaded.model, stored)
    work = work_of(loaded.model) if kind.graph else None
    check_space(folder, weight_bytes)
    companions = Companions.of(loaded, {LICENCE, *kind.beside})
    too_large = f"not enough memory to export {model}; exports hold the whole model twice"
    in_words = errors_in_words(lambda _: too_large, but=lambda error: not isinstance(error, MemoryError))
    with in_words, torch.no_grad(), quiet_bars():
        reference = refer(loaded, check_tokens)
        with staged_folder(folder, overwrite) as staged:
            with progress(f"Writing {to}", 1, quiet=quiet) as tick:
                written = kind.write(Source(loaded, stored, rank, base, trust_remote_code), staged)
                companions.write(staged)
                tick()
            with progress("Comparing", 1, quiet=quiet) as tick:
                comparisons = [compare(reference, decoder()) for decoder in (written.decoder, *written.also)]
                tick()
            narrower = min(stored, getattr(torch, written.dtype), key=lambda dtype: dtype.itemsize)
            for each in comparisons:
                check(each, narrower, rank is None, str(folder))
            result = Exported(
                format=to, model=model, out=str(folder), dtype=str(stored).removeprefix("torch."),
                weight_bytes=weight_bytes,
                file_bytes=sum(p.stat().st_size for p in staged.iterdir() if p.name.endswith(kind.weights)),
                compared_in=written.dtype, comparison=max(comparisons, key=lambda each: each.relative),
                notes=[*loaded.notes, *written.notes, *companions.notes], work=work, **companions.record,
            )  # fmt: skip
            (staged / EXPORTED).write_text(json.dumps(result.model_dump(), indent=1) + "\n", encoding="utf-8")
    return result


def _check_settings(kind: Format, given: dict[str, object]) -> None:
    """Refuse a setting that the format does not read."""
    for setting, value in given.items():
        if value is not None and setting not in kind.takes:
            takes = " and ".join(f"`to={other.name}`" for other in FORMATS.all() if setting in other.takes)
            raise TwofoldError(f"`{setting}` is of {takes}, and this is `to={kind.name}`; leave it out")


def _check_kind(kind: Format, loaded: LoadedModel) -> None:
    """Refuse a model that the format is not for."""
    check_plain(loaded.model, loaded.name, kind.integers)
    if kind.factored and not compact_layers(loaded.model):
        others = ", ".join(other.name for other in FORMATS.all() if not other.factored)
        raise TwofoldError(
            f"`to={kind.name}` takes a factored model, and {loaded.name} has no factored layer; "
            f"name the `out` of twofold compress, or use one of {others}"
        )
    if kind.refuse is not None:
        kind.refuse(loaded)


def _check_place(kind: Format, loaded: LoadedModel, base: str | None, folder: Path) -> None:
    """Refuse a folder that would take the place of what is read."""
    original = base or (recorded_original(loaded) if kind.original else None)
    check_apart(folder, [loaded.source, Path(original).expanduser() if original is not None else None])


def _dtype(name: str, loaded: LoadedModel, kind: Format) -> torch.dtype:
    if name == "auto":
        return getattr(torch, kind.dtypes[0]) if kind.dtypes else loaded.stored_dtype
    dtype: torch.dtype | None = getattr(torch, name, None)
    if dtype is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TwofoldError(f"`dtype` must be auto, float32, bfloat16 or float16, got {name!r}")
    if kind.dtypes and name not in kind.dtypes:
        raise TwofoldError(f"`to={kind.name}` writes {' or '.join(kind.dtypes)}, got `dtype={name}`; leave it out")
    return dtype
