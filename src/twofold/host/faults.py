"""Whose fault an error is: a model's own code may fail in any way; what fails in ours must not be told as the model's."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import dropwhile
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line

PACKAGE = str(Path(__file__).resolve().parents[1])
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
REPORT = "a failure of ours, please report it"
WRAPPERS = (contextlib.__file__, "_contextlib.py")  # decorators of the standard library and of PyTorch: nobody's code


def is_ours(error: BaseException) -> bool:
    """Say whether an error comes from our code: a hook or a layer that the model's code has called."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = (file.startswith(PACKAGE) for file in files if not file.endswith(WRAPPERS))
    inner = list(dropwhile(bool, ours))  # without what leads to the model
    return any(inner) or not inner


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error tells that memory is short, of the machine or of an accelerator."""
    words = str(error)
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


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
    """Turn an error of a model's own code within the block into a sentence; a fault of ours, or too little memory, goes on."""
    return errors_in_words(words, lambda error: is_ours(error) or is_out_of_memory(error))


@contextmanager
def decorating(what: str, notes: list[str]) -> Iterator[None]:
    """Let what only decorates a result fail without it: the reason becomes a note, which tells a fault of ours as one.

    A disk that takes no more goes on as an error: it would leave half a file, and not take the record either.

    Args:
        what: is missing then, as "sample answers".
        notes: of the result.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, TwofoldError) else error  # a sentence of ours for a full disk
        if isinstance(cause, OSError) and cause.errno in DISK:
            raise
        ours = is_ours(error) and not isinstance(error, TwofoldError | OSError) and not is_out_of_memory(error)
        notes.append(f"no {what}: {first_line(error)}" + (f" ({type(error).__name__}; {REPORT})" if ours else ""))
