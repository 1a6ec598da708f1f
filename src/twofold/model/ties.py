"""Weights that config.json says are one, and whether the files agree: what they hold is what is meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from twofold.checkpoint.shards import Shards
from twofold.model.stored import Stored


def ties_of(model: Any) -> dict[str, str]:
    """Return the weights that config.json says are one: name → the name whose weight it shares."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    return {} if expand is None else dict(expand(all_submodels=True))


def settle_ties(model: Any, stored: Stored, shards: Shards | None) -> None:
    """Make a model's ties those that its files have, as transformers does when it loads them; the config says so from here on.

    Two weights that config.json ties are two if the files hold both with different numbers; with the same numbers they are one,
    and the second copy is not used.

    Args:
        model: with its weights as transformers loaded them, or without weights.
        stored: what the files hold; the ties are written down in it.
    """
    ties = ties_of(model)
    parted = []
    for name, source in ties.items():
        ours, theirs = stored.keys.get(name), stored.keys.get(source)
        if ours is None or theirs is None or ours == theirs or shards is None:
            if _is_two(model, name, source):
                parted.append(name)
        elif _equal(shards, ours, theirs):
            stored.unused[ours] = f"the same numbers as {theirs}, which is used in its place"
            stored.keys[name] = theirs
        else:
            parted.append(name)
    if parted:
        stored.notes.append(
            f"config.json says that {parted[0]} and {ties[parted[0]]} are one weight, the files hold two with different "
            "numbers: they are kept apart, and the result's config.json says so"
        )
        untie(model, ties)


def _is_two(model: Any, name: str, source: str) -> bool:
    """Say whether two weights of a model in memory are not one tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters or source not in parameters or parameters[name].is_meta:
        return False
    return parameters[name] is not parameters[source]


def _equal(shards: Shards, first: str, second: str) -> bool:
    """Say whether two tensors of the files hold the same numbers."""
    if shards.headers[first].shape != shards.headers[second].shape:
        return False
    (_, one), (_, other) = shards.read([first, second])
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def untie(model: Any, ties: Iterable[str] | None = None) -> None:
    """Give each tied weight numbers of its own, and let the model's configuration say that nothing is tied.

    Args:
        ties: the names of the weights that share another's; by default those that the configuration ties.
    """
    for name in list(ties_of(model) if ties is None else ties):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        weight = module._parameters.get(leaf)
        if weight is not None:
            module._parameters[leaf] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    for module in [module for module in model.modules() if ties_of(module)]:
        module.config.tie_word_embeddings = False
        module.all_tied_weights_keys = {}
