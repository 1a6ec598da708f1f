"""A model that is looked at and not trained: no weight gets a gradient, and all is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def frozen(model: Any, hooks: Iterable[Any] = ()) -> Iterator[None]:
    """Within the block no parameter requires a gradient and the model evaluates; then the hooks, as they are by then, go."""
    was_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, required in was_grad:
            parameter.requires_grad_(required)
        model.train(was_training)


def no_cache(model: Any) -> dict[str, bool]:
    """The argument that keeps a model from filling a cache of keys and values."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
