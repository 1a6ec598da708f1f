"""The words of the command line: sentences with flags in the place of settings, and flags with several values."""

from __future__ import annotations

import re

SETTING = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")


def with_flags(sentence: str) -> str:
    """Turn the settings of a sentence, which stand between backticks, into flags.

    >>> with_flags("give `keep=0.8`, or leave `eval_windows` out")
    'give --keep 0.8, or leave --eval-windows out'
    """

    def flag(match: re.Match[str]) -> str:
        name = "--" + match[1].replace("_", "-")
        return name if match[2] is None else f"{name} {match[2]}"

    return SETTING.sub(flag, sentence)


def one_line(error: Exception) -> str:
    """Return what an error says, as one line without what a terminal would obey: it may hold names from a checkpoint."""
    words = with_flags(" ".join(str(error).split()))
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in words)


SEVERAL = (  # flags that may take several values
    "--calibration", "--text", "--include", "--exclude", "--override", "--objectives", "--other-text", "--baselines", "--data"
)  # fmt: skip


def repeat_flags(arguments: list[str]) -> list[str]:
    """Let a flag take several values, as a shell gives for ``--calibration texts/*.txt``: repeat the flag before each.

    >>> repeat_flags(["compress", "m", "--calibration", "a.txt", "b.txt", "--keep", "0.8"])
    ['compress', 'm', '--calibration', 'a.txt', '--calibration', 'b.txt', '--keep', '0.8']

    Only where the model stands before the flags, or in a recipe; else the last value could be the model.
    """
    if len(arguments) < 2 or (arguments[1].startswith("-") and "--recipe" not in arguments):
        return arguments
    spread = arguments[:1]
    flag = None
    for argument in arguments[1:]:
        if argument.startswith("-") and argument != "-":
            flag = argument if argument in SEVERAL else None
        elif flag is not None and spread[-1] != flag:
            spread.append(flag)
        spread.append(argument)
    return spread
