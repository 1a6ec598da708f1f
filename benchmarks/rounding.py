"""Why groups of 64, plain factors below eight bits, and a rotation: what rounding loses on real layers, in the two-sided metric.

    python benchmarks/rounding.py                                    # SmolLM2, blocks 4 and 20, 4,096 tokens
    python benchmarks/rounding.py --model DIR --blocks 0 2 --tokens 4096

Losses are tr(G E C Eᵀ) / tr(G W C Wᵀ) with both metrics whole, the mean over the layers. Weights get noise of 2 % of their
standard deviation first, so that a 4-bit grid that they may lie on counts for nothing. Bits are those of a weight on average,
with scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "wikitext-2-raw"
KEEP = 0.7  # share of the numbers, for factors


def collected(given: argparse.Namespace) -> list[tuple[Any, Any, Any]]:
    """Weight, C and G of every linear layer of the blocks."""
    import torch

    from twofold.calibrate.moments import Moments
    from twofold.calibrate.request import request_statistics
    from twofold.calibrate.sweep import collect_moments
    from twofold.linalg.metric import damp
    from twofold.model.load import load_model
    from twofold.model.streamed import Resident
    from twofold.model.weights import find_targets
    from twofold.task.causal_lm import CausalLM
    from twofold.task.text.texts import TokenWindows

    loaded = load_model(given.model)
    targets = [t for t in find_targets(loaded.model).targets if t.layer in given.blocks]
    text = given.train.read_text(encoding="utf-8")[: 8 * given.tokens]
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][0]
    ids = ids[: len(ids) // given.window * given.window][: given.tokens].view(-1, given.window)
    windows = TokenWindows(ids, given.train.name)
    request = request_statistics(targets, {}, {"input", "gradient"}, both_sides=True)
    moments = collect_moments(
        Resident(loaded.model), targets, request, windows, CausalLM(), empty=Moments({}, 0, {}, "")
    )
    generator = torch.Generator().manual_seed(0)
    found = []
    for target in targets:
        weight = loaded.model.get_submodule(target.name).weight.detach().double()
        weight = weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
        layer = moments.layer(target.name)
        found.append((weight, damp(layer.input.double(), 1e-2), damp(layer.gradient.double(), 1e-2)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--train", type=Path, default=DATA / "wiki.train.part.raw")
    given = parser.parse_args()
    from twofold.linalg.gauge import gauge_rank
    from twofold.linalg.spectrum import gram, smaller_side, spectrum_of, truncate
    from twofold.nn.int_matrix import IntLinear, int_bytes
    from twofold.nn.layers.factored import FactoredLinear
    from twofold.quantize.factors import factor_bytes, integer_factors
    from twofold.quantize.rounding import round_matrix

    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for weight, c, g in collected(given):
        m, n = weight.shape
        whole = float(((g @ weight @ c) * weight).sum())

        def add(
            kind: str, how: str, product: Any, size: int, w: Any = weight, c: Any = c, g: Any = g, whole: float = whole
        ) -> None:
            error = w - product
            loss = float(((g @ error @ c) * error).sum()) / whole
            rows.setdefault((kind, how), []).append((8 * size / w.numel(), loss))

        for bits in (8, 4, 3):
            for group in (None, 128, 64, 32):
                name = "whole rows" if group is None else f"groups of {group}"
                matrix = round_matrix(weight, bits, group, IntLinear).weight
                add(f"dense, {bits} bits", name, matrix.double(), int_bytes(m, n, bits, group))
        side = smaller_side(m, n)
        near, far = (g, c) if side == "rows" else (c, g)
        spectrum = spectrum_of(near, gram(weight, far), side)
        for bits, group in ((8, None), (4, 64), (3, 64)):
            kind = f"factors, {bits} bits"
            rank = int(KEEP * m * n / (m + n))
            plain = FactoredLinear.from_factors(*truncate(weight, spectrum, near, rank), form="plain")
            a, b = (round_matrix(part.weight, bits, group, IntLinear) for part in (plain.expand, plain.reduce))
            add(kind, "plain, each rounded as it is", a.weight.double() @ b.weight.double(), a.bytes + b.bytes)
            for form in ("plain", side):
                at = rank if form == "plain" else gauge_rank(m, n, KEEP * m * n)
                made = integer_factors(weight, spectrum, near, at, form, bits, group)
                if made is not None:
                    how = "plain, rotated, the second solved for" if form == "plain" else "gauge, the second solved for"
                    size = factor_bytes(form, m, n, at, bits, group)
                    add(kind, how, made.layer(None, False, weight.dtype).to_dense(weight.dtype), size)
    print("| what | how | bits a weight | relative loss |\n|---|---|---|---|")
    for (kind, how), found in rows.items():
        size, loss = (sum(one[i] for one in found) / len(found) for i in (0, 1))
        print(f"| {kind} | {how} | {size:.2f} | {loss:.2e} |")


if __name__ == "__main__":
    main()
