"""Settings in a YAML file."""

from __future__ import annotations

from pathlib import Path

import yaml

from twofold.errors import TwofoldError


def read_settings(path: Path) -> dict[str, object]:
    """Read a YAML recipe as settings that flags may still override.

    Raises:
        TwofoldError: if the file is missing or holds no mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TwofoldError(f"the recipe {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a date or number that is none, or much nesting
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise TwofoldError(f"the recipe {path} is not YAML: {where}{reason}") from error
    if not isinstance(settings, dict):
        raise TwofoldError(f"the recipe {path} holds no settings; write one as in: keep: 0.8")
    if settings.get("trust_remote_code"):
        raise TwofoldError(
            f"the recipe {path} asks to run a checkpoint's code; take that out, and give `trust_remote_code` if you trust it"
        )
    return settings
