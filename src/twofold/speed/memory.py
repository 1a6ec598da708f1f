"""The peak memory of one model: a process of its own loads it, reads prompts and writes tokens, and says how much it took.

python -m twofold.speed.memory '{"model": …}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from twofold.errors import TwofoldError
from twofold.host.clock import peak_memory
from twofold.speed.runtimes import Session, Settings, get_runtime


def random_ids(session: Session, batch: int, length: int) -> torch.Tensor:  # (batch, length)
    """Return token ids, always the same for a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(session.vocabulary, (batch, length), generator=generator)


def peak_of(
    model: str, runtime: str, settings: Settings, prompt: int, new: int, prefill: int, name: str | None = None
) -> int:
    """Measure the bytes of resident memory at the peak, in a process of its own with as many threads as this one.

    Args:
        model: what the runtime loads.
        name: of the model, for messages, where it is an export that is loaded.

    Raises:
        TwofoldError: if that process fails.
    """
    numbers = {"prompt": prompt, "new": new, "prefill": prefill, "threads": torch.get_num_threads()}
    asked = {"model": model, "runtime": runtime, "settings": {**asdict(settings), "quiet": True}, **numbers}
    command = [sys.executable, "-m", "twofold.speed.memory", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed, as for lack of memory"])[-1]
        raise TwofoldError(f"the memory of {name or model} in {runtime} can't be measured: {last}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory"])


def main() -> None:
    """Do what the JSON in the first argument says."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    runtime, settings = get_runtime(asked["runtime"]), Settings(**asked["settings"])
    session = runtime.session(runtime.load(asked["model"], settings), settings)
    state = session.begin(random_ids(session, 1, asked["prompt"]), asked["new"])
    for _ in range(asked["new"]):
        session.step(state)
    session.begin(random_ids(session, 1, asked["prefill"]), 1)
    print(json.dumps({"peak_memory": peak_memory()}))


if __name__ == "__main__":
    main()
