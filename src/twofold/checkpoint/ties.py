"""Which weights of a model are one, and that its configuration says so.

transformers ties weights on loading by ``tie_word_embeddings`` and the names that a class declares; where a file holds both
and they differ, it keeps them apart. Other readers, and ``tie_weights`` at any later time, take config.json by its word.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from twofold.nn.compact import Compact

FLAG = "tie_word_embeddings"


def settle_ties(model: Any) -> str | None:
    """Let a model's configuration call weights tied only where they are one, so that whatever is written is read as it is.

    Weights of which some are tied, and classes that compute by the setting, keep it: their files hold both weights, and
    transformers keeps these apart.

    Returns:
        What was changed, in a sentence; None if nothing was.
    """
    changed = ""
    for prefix, part in _parts(model):
        if getattr(part.config, FLAG, None) is False:
            _say_that_tied(part)
        ties = _declared(part)
        apart = [name for name, source in ties.items() if not _same(_weight(part, name), _weight(part, source))]
        if apart and len(apart) == len(ties) and not _computes_by_flag(part):
            setattr(part.config, FLAG, False)
            changed = changed or f"{prefix}{apart[0]} is not {prefix}{ties[apart[0]]}"
        once: set[int] = set()
        for name in apart:
            model.all_tied_weights_keys.pop(f"{prefix}{name}", None)
            if id(_weight(part, name)) in once:  # one with another that is parted: a file would hold it once
                part_weight(part, name)
            once.add(id(_weight(part, name)))
    if not changed:
        return None
    return (
        f"config.json says `{FLAG}: true`, and the model has two weights: {changed}; both are kept, and what is written says "
        f"`{FLAG}: false`"
    )


def forget_ties(model: Any) -> None:
    """Let transformers tie only weights that are there: a layer that stands for another has a guard in their place."""
    if _declares(model):
        ties = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {name: source for name, source in ties if _dense(model, name, source)}


def tie(model: Any, names: Iterable[str]) -> None:
    """Make weights one again with those that the model's class declares them to be; others stay as they are."""
    names = set(names)
    for prefix, part in _parts(model):
        for name, source in _declared(part).items():
            if prefix + name in names:
                owner, _, leaf = name.rpartition(".")
                setattr(part.get_submodule(owner), leaf, _weight(part, source))
                model.all_tied_weights_keys[prefix + name] = prefix + source


def part_weight(model: nn.Module, name: str) -> None:
    """Give a weight that is one with others numbers of its own."""
    owner, _, leaf = name.rpartition(".")
    weight = _weight(model, name)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(weight.detach().clone(), weight.requires_grad))


def tied_names(model: Any) -> dict[str, str]:
    """Return the weights that are one with those that the model's class declares them to be: weight → the one that it is."""
    return {
        prefix + name: prefix + source
        for prefix, part in _parts(model)
        for name, source in _declared(part).items()
        if _weight(part, name) is _weight(part, source)
    }


def rounding_apart(model: Any, names: Iterable[str]) -> list[str]:
    """Return those of some weights that only rounding tells from what their class declares them to be."""
    names = set(names)
    return [
        prefix + name
        for prefix, part in _parts(model)
        for name, source in _declared(part).items()
        if prefix + name in names and _close(_weight(part, name), _weight(part, source))
    ]


def _declares(module: Any) -> bool:
    """Say whether a module is a model of transformers, which declares ties."""
    return hasattr(module, "get_expanded_tied_weights_keys")


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the models inside a model that declare ties of their own, with what stands before their names."""
    for name, module in model.named_modules():
        if _declares(module):
            yield f"{name}." if name else "", module


def _declared(part: Any) -> dict[str, str]:
    """Return the ties of a model that its configuration asks for: weight → the one that it is, both of which are there."""
    try:
        ties = part.get_expanded_tied_weights_keys(all_submodels=False)
    except ValueError:  # the names of a pattern are none of this model's: other layers stand there
        return {}
    return {name: source for name, source in ties.items() if _dense(part, name, source)}


def _say_that_tied(part: Any) -> None:
    """Let a configuration say that weights are tied, where it denies that, and they are one: a file holds them once."""
    setattr(part.config, FLAG, True)
    ties = _declared(part)
    one = [name for name, source in ties.items() if _weight(part, name) is _weight(part, source)]
    if one and len(one) == len(ties) and not _computes_by_flag(part):
        return
    setattr(part.config, FLAG, False)
    for name in one:  # so that the file holds each of them
        part_weight(part, name)


def _dense(model: nn.Module, *names: str) -> bool:
    """Say whether weights are there, and none is the guard of a layer that stands for a dense one."""
    try:
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    except AttributeError:
        return False
    leaves = [name.rpartition(".")[2] for name in names]
    return all(
        not isinstance(owner, Compact) and isinstance(getattr(owner, leaf, None), Tensor)
        for owner, leaf in zip(owners, leaves, strict=True)
    )


def _weight(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    weight = getattr(model.get_submodule(owner), leaf)
    assert isinstance(weight, Tensor)
    return weight


def _same(first: Tensor, second: Tensor) -> bool:
    """Say whether two weights are one, or equal, so that it is no matter."""
    if first is second:
        return True
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and not first.is_meta and torch.equal(first, second)


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    eps = torch.finfo(first.dtype).eps
    return float((first - second).abs().max()) <= 8 * eps * float(second.abs().max())


def _computes_by_flag(part: Any) -> bool:
    """Say whether a model computes otherwise where the setting says false, as some encoder-decoders scale their last states.

    Some classes of configurations turn it into another setting, and say that weights are tied whatever it was.
    """
    settings = part.config.to_dict()
    denied = type(part.config).from_dict({**settings, FLAG: False}).to_dict()
    if denied.pop(FLAG, None) is not False or denied != {name: held for name, held in settings.items() if name != FLAG}:
        return True
    try:
        return FLAG in inspect.getsource(type(part).forward)
    except (OSError, TypeError):
        return False
