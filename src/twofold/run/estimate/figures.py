"""The sizes of a model that memory and time depend on."""

from __future__ import annotations

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
    """The sizes of a model without weights."""
    model = loaded.model
    found = list_weights(model, recipe.include, recipe.exclude)
    objective = OBJECTIVES.get(recipe.objective)
    request = request_statistics(found.targets, groups, objective.needs)
    sizes: dict[str, int] = {}
    inside: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            sizes[name] = parameter.numel()
    blocks = chain.blocks if chain is not None else ()
    for name, size in sizes.items():
        index = chain.block_of(name) if chain is not None else None
        key = blocks[index] if index is not None else ""
        inside[key] = inside.get(key, 0) + size
    embedding = head = None
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [p.numel() for m in (embedding, head) if m is not None for p in m.parameters()]
    largest = max(blocks, key=lambda block: inside.get(block, 0), default="")
    of_block = [t for t in found.targets if chain is not None and t.name.startswith(f"{largest}.")] or found.targets
    names = {t.name for t in of_block}
    stored = loaded.stored_dtype
    compute = compute_dtype(recipe.dtype, stored, choose_device(recipe.device))
    table = max(tables, default=0)
    head_weight = getattr(head, "weight", None)
    return Figures(
        numbers=sum(sizes.values()),
        block=inside.get(largest, 0),
        blocks=len(blocks),
        table=table,
        outside=max(inside.get("", 0) - sum(dict.fromkeys(tables)), 0),
        vocabulary=int(head_weight.shape[0]) if head_weight is not None else 0,
        targets=found.targets,
        block_targets=of_block,
        request={kind: request.numbers_of(kind) for kind in request.sizes},
        block_request={kind: request.numbers_of(kind, names) for kind in request.sizes},
        element=compute.itemsize,
        stored=stored.itemsize,
        backward=request.backward,
    )
