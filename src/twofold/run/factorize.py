"""The work in one call: a factored model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PretrainedConfig

from twofold.calibrate.opened import Opened
from twofold.checkpoint.plugin import attach
from twofold.errors import TwofoldError
from twofold.host.clock import Stopwatch
from twofold.model.frozen import evaluating
from twofold.nn.places import cast_weights
from twofold.recipe import Recipe, make_recipe
from twofold.refine.steps.series import refine
from twofold.run.open import open_for, open_loaded
from twofold.run.prepare import prepare
from twofold.run.sizing import Sizing
from twofold.scratch.start import factorize_start
from twofold.settings.base import from_call
from twofold.task import Batch
from twofold.task.data.own import OwnTask


def factorize(
    model: Any,
    processor: Any = None,
    *,
    tokenizer: Any = None,
    init: str | None = None,
    texts: Iterable[str] | None = None,
    samples: Iterable[Any] | int | None = None,
    outputs: Callable[[Any, Batch], Tensor] | None = None,
    labels: Callable[[Batch], Tensor | None] | None = None,
    output: Literal["categorical", "gaussian"] = "categorical",
    calibration: str | Path | list[str | Path] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Any:
    """Factorize a model: the main job in one call, or the start of a training from scratch.

    >>> model = twofold.factorize("smollm2", keep=0.8, calibration="texts.txt")    # doctest: +SKIP
    >>> model.save_pretrained("small")                                             # doctest: +SKIP
    >>> model = twofold.factorize(LlamaConfig(), init="spectral", keep=0.5)        # doctest: +SKIP

    Args:
        model: a folder, a hub id, ``smollm2``, or a loaded transformers model, which is changed in place; or a configuration,
            from which a model with random weights is built.
        processor: of a loaded model: its tokenizer, image processor or feature extractor, or one that has several of them.
        tokenizer: another name for the processor of a language model.
        init: for a training from scratch, where nothing is calibrated: "spectral" (for a configuration the default) truncates
            the weights that the model has, "random" draws factors whose product is as large (docs/train.md).
        texts: an iterable of texts to calibrate on.
        samples: in their place, what the model's task reads: clips, images, sentences or pairs, as files, arrays or rows; with
            ``outputs``, batches of one sample each, as the arguments of the model's forward. A number is how many are read.
        outputs: for a task of your own, from the model and a batch to what it predicts (predictions, k): logits, or features with
            ``output="gaussian"``.
        labels: with ``outputs``, what is right for each prediction of a batch, −1 where nothing is known.
        calibration: text files or data set names; "self" (the default) samples texts from the model.
        settings: any field of ``twofold.Recipe``: one of keep, budget, perplexity_at_most and kl_at_most; tokens, objective,
            allocate, seed, …

    Returns:
        The model with ``FactoredLinear`` layers. ``model.twofold_plan`` tells what was done with every weight,
        ``model.twofold_tokenizer`` is the tokenizer that was loaded with it;
        ``save_pretrained``, ``push_to_hub``, ``generate`` and ``dequantize`` work as for any transformers model.

    Raises:
        TwofoldError: for whatever the caller can put right.
    """
    if init is not None or isinstance(model, PretrainedConfig):
        if texts is not None or calibration is not None or samples is not None:
            raise TwofoldError("a start for a training from scratch is not calibrated; leave out what it would read")
        return factorize_start(model, init or "spectral", **settings)
    named = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if calibration is not None:
        settings["calibration"] = calibration
    if isinstance(samples, int):
        settings["samples"], samples = samples, None
    recipe = from_call(Recipe, make_recipe, str(named) or type(model).__name__, settings)
    own, given = None if outputs is None else OwnTask(outputs, labels, output), texts if samples is None else samples
    if own is not None and samples is None:
        raise TwofoldError("`outputs` makes a task of your own, which is given its `samples`: an iterable of batches")
    if isinstance(model, str | Path):
        opened = open_for(recipe, own, quiet=quiet)
    else:
        opened = open_loaded(model, tokenizer or processor, recipe, own)
    if opened.loaded.residence.streamed:
        raise TwofoldError(
            "this model is worked through block by block, so it can't be factorized in place; compress it to a folder: twofold "
            "compress"
        )
    return _factorize(recipe, opened, given, quiet=quiet)


def _factorize(recipe: Recipe, opened: Opened, given: Iterable[Any] | None, *, quiet: bool) -> Any:
    """Factorize a model that is opened in memory, in place."""
    loaded, result = opened.loaded, opened.loaded.model
    with evaluating(result):
        recipe = opened.fitted(recipe, quiet=quiet)
        sizing = Sizing(opened, recipe, quiet=quiet) if recipe.goal is not None else None
        prepared = prepare(recipe, opened, Stopwatch(), given=given, sizing=sizing, quiet=quiet)
        replaced = prepared.factorize(quiet=quiet)
        refine(prepared, replaced, recipe, quiet=quiet)
    cast_weights(result, loaded.stored_dtype, loaded.own_dtypes)
    attach(result)
    result.twofold_plan, result.twofold_tokenizer = prepared.plan, loaded.tokenizer
    return result
