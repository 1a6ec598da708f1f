"""A decoder in another process, which knows transformers and not Twofold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from twofold.errors import TwofoldError


class OtherProcess:
    """A portable checkpoint as any other program reads it; the process ends with the object.

    Args:
        folder: of the checkpoint.
        auto: the Auto class that it is loaded by.

    Raises:
        TwofoldError: if the process does not load it, with the last line of what it said.
    """

    def __init__(self, folder: Path, auto: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="twofold-export-")
        place = Path(self._folder.name)
        self._said = (place / "stderr").open("w+", encoding="utf-8")
        settings = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("reader_process.py")), str(folder), auto],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **settings},
        )
        self.model: dict[str, Any] = self._answer()
        self._begin = True

    def start(self) -> None:
        self._begin = True

    def read(self, ids: Tensor) -> Tensor:  # (batch, tokens, vocabulary)
        out = Path(self._folder.name) / "logits.safetensors"
        request = {"ids": ids.tolist(), "start": self._begin, "out": str(out)}
        with suppress(BrokenPipeError):  # it ended; its last words are told below
            print(json.dumps(request), file=self._process.stdin, flush=True)
        self._begin = False
        self._answer()
        logits: Tensor = load_file(out)["logits"]
        return logits.clone()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = [row.strip() for row in self._said if row.strip()]
            self._process.wait()
            raise TwofoldError(
                f"plain transformers can't read the portable checkpoint ({said[-1] if said else 'it said nothing'}); "
                "use `to=dense`, and please report it"
            )
        return dict(json.loads(line))

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._process.communicate()
            self._said.close()
            self._folder.cleanup()
