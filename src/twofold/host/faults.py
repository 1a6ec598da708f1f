"""Whose fault an error is: a model's own code may fail in any way; what fails in ours must not be told as the model's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import dropwhile
from pathlib import Path

from twofold.errors import TwofoldError

PACKAGE = str(Path(__file__).resolve().parents[1])


def is_ours(error: BaseException) -> bool:
    """Say whether an error comes from our code: a hook or a layer that the model's code has called."""
    ours = (frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__))
    inner = list(dropwhile(bool, ours))  # without what leads to the model
    return any(inner) or not inner


@contextmanager
def errors_in_words(
    words: Callable[[Exception], str], but: Callable[[Exception], bool] = lambda error: False
) -> Iterator[None]:
    """Turn an error of another library within the block into a sentence.

    Args:
        but: says which errors go on as they are.

    Raises:
        TwofoldError: with the words for the error.
    """
    try:
        yield
    except TwofoldError:
        raise
    except Exception as error:
        if but(error):
            raise
        raise TwofoldError(words(error)) from error


def models_errors(words: Callable[[Exception], str]) -> AbstractContextManager[None]:
    """Turn an error of a model's own code within the block into a sentence; a fault of ours goes on as it is."""
    return errors_in_words(words, is_ours)
