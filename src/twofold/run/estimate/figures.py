"""The sizes of a model that memory and time depend on."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from twofold.calibrate.request import request_statistics
from twofold.model.blocks import Chain
from twofold.model.load import LoadedModel
from twofold.model.source import choose_device, compute_dtype
from twofold.model.weights import list_weights
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.settings.price import Figures


def figures_of(loaded: LoadedModel, chain: Chain | None, groups: dict[str, str], recipe: Recipe) -> Figures:
    """Take the sizes of a model without weights.

    Args:
        groups: target → the first target with the same input.
    """
    model = loaded.model
    targets = list_weights(model, recipe.include, recipe.exclude).targets
    request = request_statistics(targets, groups, OBJECTIVES.get(recipe.objective).needs)
    blocks = chain.blocks if chain is not None else ()
    inside: Counter[str] = Counter()  # block, "" for none → numbers
    for name, parameter in model.named_parameters():
        index = chain.block_of(name) if chain is not None else None
        inside["" if index is None else blocks[index]] += parameter.numel()
    embedding = head = None
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [p.numel() for m in (embedding, head) if m is not None for p in m.parameters()]
    largest = max(blocks, key=lambda block: inside[block], default="")
    block_targets = [t for t in targets if chain is not None and t.name.startswith(f"{largest}.")] or targets
    names = {t.name for t in block_targets}
    head_weight = getattr(head, "weight", None)
    return Figures(
        numbers=inside.total(),
        block=inside[largest],
        blocks=len(blocks),
        table=max(tables, default=0),
        outside=max(inside[""] - sum(dict.fromkeys(tables)), 0),
        vocabulary=int(head_weight.shape[0]) if head_weight is not None else 0,
        targets=targets,
        block_targets=block_targets,
        request={kind: request.numbers_of(kind) for kind in request.sizes},
        block_request={kind: request.numbers_of(kind, names) for kind in request.sizes},
        element=compute_dtype(recipe.dtype, loaded.stored_dtype, choose_device(recipe.device)).itemsize,
        stored=loaded.stored_dtype.itemsize,
        backward=request.backward,
    )
