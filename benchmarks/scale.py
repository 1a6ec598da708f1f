"""The figures of models larger than memory, interrupted, and on many processes: docs/benchmarks.md.

    python benchmarks/scale.py streaming growth processes kills --data WIKITEXT --out DIR
    python benchmarks/scale.py big --model DIR --data WIKITEXT --out DIR      # a model of benchmarks/big_model.py

Every run is a process of its own, with a cache of its own, one after another; seconds and peak memory are those that the run
itself records. The results are kept in OUT/scale.json, and printed as a table.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GROWTH = ("--hidden", "768", "--intermediate", "2048", "--heads", "12", "--kv-heads", "4", "--vocab", "8192",
          "--shard-bytes", "64000000")  # fmt: skip


class Bench:
    """Where runs are made, and what they gave."""

    def __init__(self, out: Path, data: Path) -> None:
        self.out, self.text = out, data / "wiki.train.part.raw"
        self.results: dict[str, Any] = {}
        out.mkdir(parents=True, exist_ok=True)
        if (out / "scale.json").is_file():
            self.results = json.loads((out / "scale.json").read_text(encoding="utf-8"))

    def keep(self, name: str, value: Any) -> None:
        self.results[name] = value
        (self.out / "scale.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(value), flush=True)

    def command(self, model: str, name: str, *more: str) -> list[str]:
        return [
            "-m",
            "twofold",
            "compress",
            model,
            "--calibration",
            str(self.text),
            "--out",
            str(self.out / name),
            *more,
        ]

    def environment(self, cache: str, **more: str) -> dict[str, str]:
        return {**os.environ, "TWOFOLD_CACHE": str(self.out / cache), **more}

    def run(
        self, model: str, name: str, *more: str, launcher: tuple[str, ...] = (), **environment: str
    ) -> dict[str, Any]:
        """One run from nothing; gives its record, and the seconds of the whole process."""
        self.forget(name)
        command = [sys.executable, *launcher, *self.command(model, name, *more)]
        start = time.perf_counter()
        done = subprocess.run(
            command, env=self.environment(f"{name}-cache", **environment), capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
        record: dict[str, Any] = json.loads((self.out / name / "run.json").read_text(encoding="utf-8"))
        record["process_seconds"] = time.perf_counter() - start
        return record

    def forget(self, name: str) -> None:
        for folder in (name, f"{name}-cache", f"{name}.partial"):
            shutil.rmtree(self.out / folder, ignore_errors=True)

    def estimate(self, model: str, *more: str) -> dict[str, Any]:
        """What ``twofold plan`` says that the run will take."""
        command = [sys.executable, "-m", "twofold", "plan", model, "--json", *more]
        done = subprocess.run(command, env=self.environment("plan-cache"), capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"plan failed: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout)["estimate"]
        return found

    def against_estimate(self, name: str, record: dict[str, Any], model: str, *more: str) -> None:
        """Compare a run with its estimate; the seconds of the calibration texts are left out where they were not sampled."""
        found = self.estimate(model, *more)
        seconds = {k: v for k, v in found["seconds"].items() if k != "texts"}
        self.keep(f"estimate {name}", {
            "peak GiB estimated": round(found["peak_memory"] / 2**30, 2),
            "peak GiB measured": round(record["peak_memory"] / 2**30, 2),
            "peak ratio": round(found["peak_memory"] / record["peak_memory"], 3),
            "seconds estimated": round(sum(seconds.values()), 1),
            "seconds measured": round(record["process_seconds"], 1),
            "seconds ratio": round(sum(seconds.values()) / record["process_seconds"], 3),
            "stages estimated": seconds,
            "stages measured": {k: round(v, 1) for k, v in record["seconds"].items()},
            "memory of the stages": {k: round(v / 2**30, 2) for k, v in found["memory"].items()},
        })  # fmt: skip


def made(bench: Bench, name: str, *flags: str) -> str:
    """A model of random weights."""
    folder = bench.out / name
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, str(HERE / "big_model.py"), "--out", str(folder), *flags], check=True)
    return str(folder)


def smollm2() -> str:
    """The folder of the built-in model, fetched once and not by every run."""
    from twofold.model.builtin import smollm2_folder

    return str(smollm2_folder())


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def ranks(folder: Path) -> list[int | None]:
    return [entry["rank"] for entry in json.loads((folder / "plan.json").read_text(encoding="utf-8"))["entries"]]


def streaming(bench: Bench, tokens: int) -> None:
    """SmolLM2 in memory, with three quarters of the memory that this takes, and one block at a time."""
    flags = ("--keep", "0.6", "--tokens", str(tokens))
    whole = bench.run(smollm2(), "smollm2-memory", *flags, "--stream", "never")
    bench.against_estimate("SmolLM2 in memory", whole, smollm2(), *flags, "--stream", "never")
    less = ("--stream", "always", "--memory", f"{0.75 * whole['peak_memory'] / 1e6:.0f}MB")
    for name, way in (("three quarters", less), ("one block", ("--stream", "always"))):
        folder = f"smollm2-{name.replace(' ', '-')}"
        record = bench.run(smollm2(), folder, *flags, *way)
        first, second = tensors(bench.out / "smollm2-memory"), tensors(bench.out / folder)
        assert set(first) == set(second)
        bench.keep(f"streaming, {name}", {
            "tokens": tokens,
            "flags": way,
            "same plan": ranks(bench.out / "smollm2-memory") == ranks(bench.out / folder),
            "largest difference of a weight": max(
                float((first[k].double() - second[k].double()).abs().max()) for k in first
            ),
            "seconds in memory": round(whole["seconds"]["total"], 1),
            "seconds streamed": round(record["seconds"]["total"], 1),
            "ratio": round(record["seconds"]["total"] / whole["seconds"]["total"], 3),
            "peak GiB in memory": round(whole["peak_memory"] / 2**30, 2),
            "peak GiB streamed": round(record["peak_memory"] / 2**30, 2),
            "stages in memory": {k: round(v, 1) for k, v in whole["seconds"].items()},
            "stages streamed": {k: round(v, 1) for k, v in record["seconds"].items()},
        })  # fmt: skip
        bench.against_estimate(f"SmolLM2, {name}", record, smollm2(), *flags, *way)


def growth(bench: Bench, tokens: int) -> None:
    """Time and peak memory over 4, 8 and 16 identical layers."""
    counts = (4, 8, 16)
    flags = ("--keep", "0.6", "--tokens", str(tokens), "--stream", "always")
    records = []
    for count in counts:
        model = made(bench, f"layers-{count}", "--layers", str(count), *GROWTH)
        records.append(bench.run(model, f"grown-{count}", *flags))
    work = [sum(r["seconds"][s] for s in ("calibrate", "decompose", "factorize", "measure")) for r in records]
    total = [r["seconds"]["total"] for r in records]
    peaks = [r["peak_memory"] for r in records]
    bench.keep("growth", {
        "layers": counts,
        "seconds of the stages": [round(x, 1) for x in work],
        "seconds in all": [round(x, 1) for x in total],
        "exponents of the stages": [round(math.log2(b / a), 3) for a, b in itertools.pairwise(work)],
        "exponents in all": [round(math.log2(b / a), 3) for a, b in itertools.pairwise(total)],
        "peak GiB": [round(x / 2**30, 3) for x in peaks],
        "growth of the peak": round(peaks[-1] / peaks[0] - 1, 4),
    })  # fmt: skip
    bench.against_estimate("16 layers streamed", records[-1], str(bench.out / "layers-16"), *flags)


def processes(bench: Bench, tokens: int) -> None:
    """Two processes of one thread each against one of one thread."""
    from twofold.calibrate.moments import Moments

    records = {}
    for count in (1, 2):
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(count))
        name = f"processes-{count}"
        flags = ("--keep", "0.6", "--tokens", str(tokens), "--moments", str(bench.out / f"{name}-moments"))
        shutil.rmtree(bench.out / f"{name}-moments", ignore_errors=True)
        records[count] = bench.run(smollm2(), name, *flags, launcher=launcher, OMP_NUM_THREADS="1")
    one, two = (Moments.load(bench.out / f"processes-{count}-moments") for count in (1, 2))
    worst = max(float((one.sums[k] - two.sums[k]).norm() / one.sums[k].norm()) for k in one.sums)
    first, second = tensors(bench.out / "processes-1"), tensors(bench.out / "processes-2")
    bench.keep("processes", {
        "tokens": tokens,
        "same plan": ranks(bench.out / "processes-1") == ranks(bench.out / "processes-2"),
        "moments, largest relative difference": worst,
        "largest difference of a weight": max(
            float((first[k].double() - second[k].double()).abs().max()) if first[k].shape == second[k].shape else math.inf
            for k in first
        ),
        "seconds of calibration": [round(records[c]["seconds"]["calibrate"], 1) for c in (1, 2)],
        "ratio": round(records[2]["seconds"]["calibrate"] / records[1]["seconds"]["calibrate"], 3),
    })  # fmt: skip


def kills(bench: Bench, count: int, seed: int) -> None:
    """Kill runs at random moments and start them again; each must end with the same bits."""
    model = made(bench, "tiny", "--preset", "tiny")
    flags = ("--keep", "0.6", "--tokens", "1024", "--window", "256", "--stream", "always", "--eval-windows", "1")

    def digest(name: str) -> str:
        found = hashlib.sha256()
        for path in sorted((bench.out / name).glob("model*")):
            found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()

    whole = bench.run(model, "unharmed", *flags)
    expected, length = digest("unharmed"), whole["process_seconds"]
    draw = random.Random(seed)
    same, stages = 0, []
    for _ in range(count):
        bench.forget("killed")
        command = [sys.executable, *bench.command(model, "killed", *flags)]
        environment = bench.environment("killed-cache")
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.15 * length, 0.98 * length))  # the first part is the loading of the libraries
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = bench.out / "killed.partial" / "state.json"
        stages.append(
            json.loads(state.read_text(encoding="utf-8"))["stage"] if state.is_file() else "before or after all"
        )
        if not (bench.out / "killed").exists():
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stderr[-1000:], flush=True)
                continue
        left = [p.name for p in bench.out.iterdir() if "killed" in p.name and p.name not in ("killed", "killed-cache")]
        same += digest("killed") == expected and not left
    bench.keep("kills", {"tried": count, "bit-identical": same, "killed while": stages})


def big(bench: Bench, model: str) -> None:
    """A model of 3.2 billion parameters, with the moments of its inputs alone, in 3 GiB."""
    flags = ("--keep", "0.6", "--objective", "svd-llm", "--tokens", "2048", "--memory", "3GiB")
    record = bench.run(model, "big-small", *flags)
    bench.keep("big", {
        "parameters": record["parameters_before"],
        "peak GiB": round(record["peak_memory"] / 2**30, 3),
        "minutes": round(record["process_seconds"] / 60, 1),
        "stages": {k: round(v, 1) for k, v in record["seconds"].items()},
    })  # fmt: skip
    bench.against_estimate("3.2 billion", record, model, *flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["streaming", "growth", "processes", "kills", "big"])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "wikitext-2-raw")
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    parser.add_argument("--model", default="", help="the model of 3.2 billion parameters")
    parser.add_argument("--tokens", type=int, default=16384, help="of the runs on SmolLM2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bench = Bench(given.out.resolve(), given.data)
    if "streaming" in given.what:
        streaming(bench, given.tokens)
    if "growth" in given.what:
        growth(bench, 2048)
    if "processes" in given.what:
        processes(bench, min(given.tokens, 8192))
    if "kills" in given.what:
        kills(bench, given.kills, given.seed)
    if "big" in given.what:
        big(bench, given.model)


if __name__ == "__main__":
    main()
