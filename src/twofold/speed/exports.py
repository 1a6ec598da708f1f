"""Exports that are made to be timed, by a process of its own: the exporters leave their marks in the process that they run in.

python -m twofold.speed.exports '{"format": …}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.exports.export import export


def export_all(models: dict[str, Path], to: str, trust_remote_code: bool, quiet: bool) -> None:
    """Export models into folders, one after another.

    Raises:
        TwofoldError: if one can't be exported.
    """
    folders = {name: str(folder) for name, folder in models.items()}
    asked = {"format": to, "models": folders, "trust_remote_code": trust_remote_code, "quiet": quiet}
    command = [sys.executable, "-m", "twofold.speed.exports", json.dumps(asked)]
    stderr = subprocess.PIPE if quiet else None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if done.returncode != 0:
        said = [line for text in (done.stdout, done.stderr) for line in (text or "").strip().splitlines()[-1:]]
        killed = done.returncode < 0 or done.returncode == 137
        how = "was killed, as for lack of memory" if killed else f"failed (exit code {done.returncode})"
        raise TwofoldError(said[0] if said else f"the export to {to} {how}; leave {to} out of `runtime`")


def main() -> None:
    """Do what the JSON in the first argument says; the sentence of an error goes to standard output."""
    asked = json.loads(sys.argv[1])
    to, models = asked.pop("format"), asked.pop("models")
    for name, folder in models.items():
        try:
            export(name, to, folder, check_tokens=0, **asked)
        except TwofoldError as error:
            print(f"{name} can't be exported to be timed in {to} ({error}); or leave {to} out of `runtime`")
            sys.exit(2)


if __name__ == "__main__":
    main()
