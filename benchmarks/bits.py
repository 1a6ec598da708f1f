"""Loss against bytes: low rank alone, integers alone, and rank and bits chosen together, at the same bytes.

    python benchmarks/bits.py                                 # SmolLM2, whose weights are moved off their 4-bit grid first
    python benchmarks/bits.py --model DIR --bits 4 3 --tokens 16384 --windows 4

The bits are those of a targeted weight on average: codes, scales, orders and guards over the number of weights. Whatever is no
target (embeddings, norms) stays as it is in all three, and is not counted. Low rank alone stores its factors in the dtype of the
model, 16 bits; integers alone are the same allocator over the same losses without ranks, so a mix of 2, 3, 4, 5, 6 and 8 bits.

SmolLM2 comes from a Q4_1 file: its weights lie on a 4-bit grid, to which rounding to four bits could lead back. So each targeted
matrix gets Gaussian noise first, ``--noise`` times its standard deviation; the perplexity before and after says what that costs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "wikitext-2-raw"
NO_RANKS = 10**9  # a smallest rank that leaves the whole rank alone, which dense integers beat
WAYS = ("low rank", "integers", "both")


@dataclass(frozen=True)
class Row:
    """One way at one size."""

    bits: float
    way: str
    stored_bits: float  # a weight, on average
    perplexity: float
    divergence: float
    predicted: float | None


def perturbed(name: str, noise: float, folder: Path) -> None:
    """Write a model in bfloat16 with noise on its targeted weights, the same for the same seed."""
    import torch

    from twofold.model.load import load_model
    from twofold.model.weights import find_targets
    from twofold.nn.places import cast_weights

    loaded = load_model(name)
    generator = torch.Generator().manual_seed(0)
    for target in find_targets(loaded.model).targets:
        weight = loaded.model.get_submodule(target.name).weight.data
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    cast_weights(loaded.model, torch.bfloat16)
    loaded.model.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)


def measure(given: argparse.Namespace, folder: Path) -> tuple[list[Row], float, float]:
    """All rows, and the perplexities of the model as it is named and with its noise."""
    import torch

    from twofold.host.clock import Stopwatch
    from twofold.model.load import load_model, need_tokenizer
    from twofold.nn.places import dense_again
    from twofold.planning.make import make_plan
    from twofold.recipe import make_recipe
    from twofold.run.open import open_for
    from twofold.run.prepare import prepare
    from twofold.task.output.quality import Predict, measure_quality
    from twofold.task.text.held_out import evaluation_windows

    settings: dict[str, Any] = {
        "model": str(folder), "calibration": [str(given.train)], "tokens": given.tokens, "window": given.window,
        "budget": "999GB", "bits": "auto", "dense_bits": "none", "seed": 0, "group_size": given.group_size,
    }  # fmt: skip
    recipe = make_recipe(settings)
    opened = open_for(recipe)
    found = prepare(recipe, opened, Stopwatch())
    loaded, element = found.loaded, found.loaded.stored_dtype.itemsize
    model, task = loaded.model, opened.need_task()
    windows = evaluation_windows(
        str(given.test), need_tokenizer(loaded), window=given.eval_window, windows=given.windows or None
    )

    def predict(one: Any) -> Predict:
        return lambda i: task.outputs(one, windows.batch(i, i + 1))

    logits = predict(model)
    before, dense = measure_quality([predict(load_model(given.model).model), logits], windows, task)
    rows = []
    for bits in given.bits:
        total = found.plan.model_copy(update={"entries": []}).bytes_after + found.targets.target_numbers * bits / 8
        for way in WAYS:
            changed = {"budget": f"{int(total) / 1e3:.3f}KB"}
            changed |= {"bits": None} if way == "low rank" else {}
            changed |= {"min_rank": NO_RANKS} if way == "integers" else {}
            plan = make_plan(
                loaded.name,
                found.targets,
                found.spectra.values,
                recipe.model_copy(update=changed),
                element,
                found.evidence,
            )
            plan, replaced = found.apply(plan)

            def whole(i: int, replaced: Any = replaced) -> torch.Tensor:
                with dense_again(model, replaced):
                    return logits(i)

            _, quality = measure_quality([whole, logits], windows, task)
            targets = plan.bytes_after - plan.dense_bytes
            assert plan.bytes_after <= total
            rows.append(
                Row(bits, way, 8 * targets / found.targets.target_numbers, quality.perplexity, quality.divergence or 0.0,
                    plan.predicted_divergence)
            )  # fmt: skip
            print(rows[-1], flush=True)
            for name, module in replaced.items():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
    return rows, before.perplexity, dense.perplexity


def table(rows: list[Row], bits: list[float]) -> tuple[str, bool]:
    """The table of the docs, and whether all bars are met."""
    lines = [
        "| bits a weight | low rank alone | integers alone | both | both over the better | bar | met |",
        "|---|---|---|---|---|---|---|",
    ]
    met = True
    for one in bits:
        here = {row.way: row for row in rows if row.bits == one}
        alone = min(here["low rank"].perplexity, here["integers"].perplexity)
        ratio = here["both"].perplexity / alone
        most = 1.0 if one <= 3 else 1.01
        good = ratio < most if one <= 3 else ratio <= most
        met = met and good
        cells = [f"{here[way].perplexity:.4g} ({here[way].stored_bits:.2f} bits)" for way in WAYS]
        bar = "< 1" if one <= 3 else f"≤ {most}"
        lines.append(f"| {one:g} | {' | '.join(cells)} | {ratio:.4f} | {bar} | {'yes' if good else '**no**'} |")
    return "\n".join(lines) + "\n", met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--noise", type=float, default=0.03, help="of each targeted matrix's standard deviation")
    parser.add_argument("--bits", type=float, nargs="+", default=[8, 6, 4, 3])
    parser.add_argument("--train", type=Path, default=DATA / "wiki.train.part.raw")
    parser.add_argument("--test", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of the test text; 0: all")
    parser.add_argument("--eval-window", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-output")
    given = parser.parse_args()
    named = given.model
    for path in (given.train, given.test):
        if not path.is_file():
            sys.exit(f"there is no text {path}; name it with --train and --test")
    from twofold.model.builtin import smollm2_folder

    given.out.mkdir(parents=True, exist_ok=True)
    if given.model == "smollm2":
        given.model = str(smollm2_folder())  # fetched once, to the cache of the user
    os.environ["TWOFOLD_CACHE"] = str(given.out.resolve() / "cache-bits")
    with tempfile.TemporaryDirectory(dir=given.out) as place:
        folder = Path(place) / "perturbed"
        perturbed(given.model, given.noise, folder)
        rows, before, dense = measure(given, folder)
    text, met = table(rows, given.bits)
    text += (
        f"\n{named}, perplexity {before:.4g}; with noise of {given.noise:g} standard deviations in bfloat16 {dense:.4g}. "
        f"{given.tokens} calibration tokens, seed 0, {given.windows or 'all'} windows of {given.eval_window} tokens, groups of "
        f"{given.group_size}.\n"
    )
    (given.out / "bits.md").write_text(text, encoding="utf-8")
    (given.out / "bits.json").write_text(json.dumps([vars(row) for row in rows], indent=1), encoding="utf-8")
    print(text)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
