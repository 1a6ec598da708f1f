"""A model that is looked at, not trained; afterwards all is as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Let a model evaluate within the block, without dropout; layers that are new by then train as the model does."""
    training = model.training
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, training)


@contextmanager
def frozen(model: Any, hooks: Iterable[Any] = ()) -> Iterator[None]:
    """Freeze a model and let it evaluate within the block; then remove the hooks, as they are by then."""
    was_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
            for parameter, required in was_grad:
                parameter.requires_grad_(required)


def no_cache(model: Any) -> dict[str, bool]:
    """Return the argument that keeps a model from filling a cache of keys and values."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
