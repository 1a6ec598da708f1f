"""The tokenizer of a model, and why there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from twofold.host.quiet import first_line, quiet_bars

OWN_CODE = "has code of its own; look at its *.py files, and run them by `trust_remote_code`"


def needs_trust(error: Exception) -> bool:
    """Tell whether transformers failed because it may not run the code of a checkpoint."""
    return "trust_remote_code=True" in str(error)


def read_tokenizer(source: str | Path, where: dict[str, Any]) -> tuple[Any, str]:
    """Load the tokenizer of a model; None and the reason if there is none."""
    try:
        with quiet_bars():
            return AutoTokenizer.from_pretrained(source, **where), ""
    except Exception as error:  # a model of another modality has none; who needs it says so
        return None, _why_none(Path(source), error)


def _why_none(folder: Path, error: Exception) -> str:
    """Say why a folder gives no tokenizer; what transformers tries last says little of what it lacks."""
    if needs_trust(error):
        return f"it {OWN_CODE}"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"tokenizer.json"}
    pieces = sorted(name for name in names if name.endswith(".model"))
    if "tokenizer.json" not in names and pieces and importlib.util.find_spec("sentencepiece") is None:
        return f"{pieces[0]} needs a library that is not installed: pip install sentencepiece"
    if not any(
        name.endswith((".model", ".tiktoken")) or name.startswith(("tokenizer.json", "vocab")) for name in names
    ):
        return "its folder has no tokenizer.json, and no vocabulary to make one of"
    return first_line(error)
