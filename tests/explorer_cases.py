"""Made-up plans for the live page: what its own tests plan (web/tests/plans.json), and pages for them to open.

python tests/explorer_cases.py                    # writes web/tests/plans.json anew
python tests/explorer_cases.py --pages FOLDER     # writes the pages that the browser opens
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twofold.allocate import Choice
from twofold.evidence.beside import Beside
from twofold.evidence.rounding import AUTO_BITS, Rounding
from twofold.model.target import DenseWeight, Target, Targets
from twofold.planning.evidence import Evidence
from twofold.planning.make import Problem, make_plan
from twofold.planning.menu import PlanRequest
from twofold.planning.plan import Plan
from twofold.recipe import Recipe
from twofold.report.explorer import explorer_data
from twofold.report.messages import Words
from twofold.report.page import write_page

PLANS = Path(__file__).resolve().parents[1] / "web" / "tests" / "plans.json"
KEEPS = [round(0.38 + 0.03 * i, 2) for i in range(21)]
SHAPES = {"q_proj": (24, 24), "v_proj": (8, 24), "up_proj": (64, 24), "down_proj": (24, 64)}
SMOLLM2 = {
    "q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576), "gate_proj": (1536, 576),
    "up_proj": (1536, 576), "down_proj": (576, 1536),
}  # fmt: skip
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def made_up(
    seed: int, *, ties: bool = False, layers: int = 3, shapes: dict[str, tuple[int, int]] = SHAPES, more: str = ""
) -> tuple[Targets, dict[str, np.ndarray]]:
    """Return targets of some blocks with spectra that fall as those of real weights do; with ties, two blocks are alike."""
    drawn, targets, spectra = np.random.default_rng(seed), [], {}
    for layer in range(layers):
        for kind, (m, n) in shapes.items():
            targets.append(Target(f"model.layers.{layer}.{kind}{more}", m, n, False, False))
            falling = np.exp(-drawn.uniform(1.2, 9.6) / min(m, n) * np.arange(min(m, n))) * drawn.lognormal(-6, 1.5)
            spectra[targets[-1].name] = np.sort(falling * drawn.uniform(0.5, 1.5, len(falling)))[::-1]
    if ties:
        for kind in SHAPES:
            spectra[f"model.layers.2.{kind}"] = spectra[f"model.layers.1.{kind}"] = np.full(min(SHAPES[kind]), 1e-4)
    return Targets(targets, [DenseWeight("embed.weight", (100, 24), "embedding")]), spectra


def rounded(targets: Targets) -> Evidence:
    """Return made-up losses of rounding: a quarter for each bit."""
    shares = {bits: np.full(3, 4.0**-bits) for bits in AUTO_BITS}
    ranks = np.array([1, 4, 7])
    return Evidence(
        rounding={t.name: Rounding({b: 0.01 * 4.0**-b for b in AUTO_BITS}, ranks, shares) for t in targets.targets}
    )


def request_for(seed: int, **settings: Any) -> PlanRequest:
    targets, spectra = made_up(seed, ties=settings.pop("ties", False))
    recipe = Recipe.model_validate({"model": "made-up", "calibration": ["text.txt"], **settings})
    evidence = rounded(targets) if recipe.bits == "auto" else Evidence()
    return PlanRequest(targets, spectra, recipe, 2, evidence)


def planned(request: PlanRequest) -> Plan:
    return make_plan("made-up", request.targets, request.spectra, request.recipe, request.element, request.evidence)


def position(plan: Plan, problem: Problem, i: int) -> int:
    """Return where the plan's choice for a weight stands among those of the page, of which dense is the first."""
    candidate, entry = problem.candidates[i], plan.entries[i]
    first = candidate.dense_cost is not None
    if not entry.replaced and first:
        return 0
    for index in range(len(candidate.ranks)):
        made = problem.menu.entries(candidate, Choice(index))[0]
        if (made.rank, made.bits) == (entry.rank, entry.bits):
            return index + first
    raise AssertionError(entry.name)

    return Choice(index)


CASES: dict[str, dict[str, Any]] = {
    "gauge": {"seed": 1},
    "plain factors": {"seed": 2, "form": "plain"},
    "ties": {"seed": 3, "ties": True},
    "multiples and a smallest rank": {"seed": 4, "rank_multiple": 4, "min_rank": 3},
    "overrides": {"seed": 5, "overrides": {"*.q_proj": {"dense": True}, "*.1.up_proj": {"rank": 9}}},
    "a budget of bytes": {"seed": 6, "budget": True},
    "integers of 8 bits": {"seed": 7, "budget": True, "bits": 8},
    "bits chosen with ranks": {"seed": 8, "budget": True, "bits": "auto"},
}


def sizes(settings: dict[str, Any]) -> Iterator[PlanRequest]:
    """Yield the requests of one case at twenty-one sizes."""
    settings, whole = dict(settings), 0.0
    in_bytes = settings.pop("budget", False)
    if in_bytes:
        targets, _ = made_up(1)
        whole = 2.0 * targets.total_numbers
    for keep in KEEPS:
        size = {"budget": f"{whole * (0.35 + 0.6 * keep) / 1e3:.3f}kB"} if in_bytes else {"keep": keep}
        yield request_for(**settings, **size)


def case(name: str) -> dict[str, Any]:
    """Return what the page plans from and what the program plans, at each size."""
    requests = list(sizes(CASES[name]))
    found = []
    for request in requests:
        plan, problem = planned(request), Problem.of(request)
        found.append([problem.amount, [position(plan, problem, i) for i in range(len(problem.candidates))]])
    first = requests[0]
    assert isinstance(first.recipe, Recipe)
    return {"name": name, "data": explorer_data(first, planned(first), first.recipe), "planned": found}


def write_pages(folder: Path) -> None:
    """Write a page in each language, one of hostile names, and one as large as SmolLM2's."""
    folder.mkdir(parents=True, exist_ok=True)
    pages: dict[str, tuple[str, dict[str, Any]]] = {
        "en": ("en", {}), "es": ("es", {}), "hostile": ("en", {"more": ATTACK}),
        "smollm2": ("en", {"layers": 30, "shapes": SMOLLM2}),
    }  # fmt: skip
    for name, (language, how) in pages.items():
        targets, spectra = made_up(1, **how)
        model = ATTACK if name == "hostile" else "made-up"
        recipe = Recipe.model_validate({"model": model, "calibration": ["text.txt"], "keep": 0.7})
        request = PlanRequest(targets, spectra, recipe, 2, Evidence())
        plan = make_plan(model, targets, spectra, recipe, 2)
        some = {target: values for target, values in spectra.items() if ".1." in target}
        beside = Beside(dict.fromkeys(("plain", "inputs", "both"), some), {8: 1e-4, 4: 1e-2})
        data = explorer_data(request, plan, recipe, beside)
        write_page(folder / f"{name}.html", recipe, plan, spectra, data, words=Words(language))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pages"]:
        write_pages(Path(sys.argv[2]))
    else:
        cases = [case(name) for name in CASES]
        PLANS.write_text(json.dumps(cases, separators=(",", ":")) + "\n", encoding="utf-8")
