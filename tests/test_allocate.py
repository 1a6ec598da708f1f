"""Allocations meet the budget, and global loses no more than any other on its own objective."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.allocate import ALLOCATIONS, Candidate, get_allocation
from twofold.allocate.base import cheapest
from twofold.allocate.effective_rank import entropy_rank
from twofold.budget import ModelSize, parse_budget, target_budget
from twofold.errors import TwofoldError
from twofold.linalg import gauge_storage


def candidates_of(shapes, seed):
    generator = np.random.default_rng(seed)
    made = []
    for i, (m, n) in enumerate(shapes):
        values = np.sort(generator.exponential(size=min(m, n)) ** 3)[::-1] * 10 ** generator.uniform(-2, 2)
        tails = np.append(np.cumsum(values[::-1])[::-1], 0.0)
        ranks = np.arange(1, min(m, n) + (m != n))
        costs = np.array([gauge_storage(m, n, int(r)) for r in ranks], dtype=float)
        made.append(Candidate(str(i), ranks, costs, tails[ranks], float(m * n), float(m * n), values))
    return made


def totals(candidates, choices):
    cost = sum(x.cost(c) for x, c in zip(choices, candidates, strict=True))
    return cost, sum(x.loss(c) for x, c in zip(choices, candidates, strict=True))


SHAPES = st.lists(st.tuples(st.integers(3, 30), st.integers(3, 30)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 10**6), keep=st.floats(0.35, 1.0))
def test_global_meets_the_budget_and_beats_uniform(shapes, seed, keep):
    candidates = candidates_of(shapes, seed)
    budget = max(keep * sum(c.full_cost for c in candidates), sum(c.costs.min() for c in candidates))
    cost, loss = totals(candidates, get_allocation("global")(candidates, budget))
    uniform_cost, uniform_loss = totals(candidates, get_allocation("uniform")(candidates, budget))
    assert cost <= budget * (1 + 1e-9)
    assert uniform_cost <= budget * (1 + 1e-9)
    assert loss <= uniform_loss * (1 + 1e-9) + 1e-12


def test_global_beats_uniform_by_far_when_layers_differ():
    candidates = candidates_of([(30, 40)] * 12, 3)
    budget = 0.6 * sum(c.full_cost for c in candidates)
    _, loss = totals(candidates, get_allocation("global")(candidates, budget))
    _, uniform_loss = totals(candidates, get_allocation("uniform")(candidates, budget))
    assert loss < 0.7 * uniform_loss


@pytest.mark.parametrize("seed", range(5))
def test_global_is_close_to_the_best_of_all(seed):
    candidates = candidates_of([(4, 5), (5, 4), (4, 6)], seed)
    budget = 0.7 * sum(c.full_cost for c in candidates)
    cost, loss = totals(candidates, get_allocation("global")(candidates, budget))
    options = [[(float(c.full_cost), 0.0), *zip(c.costs, c.losses, strict=True)] for c in candidates]
    best = min(sum(x[1] for x in pick) for pick in itertools.product(*options) if sum(x[0] for x in pick) <= budget)
    assert cost <= budget
    # A Lagrangian solution is at most one step of one weight from the optimum.
    assert loss <= best + max(float(c.losses.max()) for c in candidates)
    cheaper = [
        sum(x[1] for x in pick) for pick in itertools.product(*options) if sum(x[0] for x in pick) <= 0.85 * budget
    ]
    assert loss <= min(cheaper) + 1e-9


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize(("smallest", "multiple"), [(1, 1), (6, 1), (1, 4), (8, 8)])
def test_smallest_ranks_and_multiples_keep_the_budget(name, smallest, multiple):
    made = []
    for c in candidates_of([(30, 40), (12, 50), (20, 20), (9, 30)], 7):
        allowed = (c.ranks >= smallest) & (c.ranks % multiple == 0)
        made.append(replace(c, ranks=c.ranks[allowed], costs=c.costs[allowed], losses=c.losses[allowed]))
    for keep in (0.62, 0.7, 0.8):
        budget = keep * sum(c.full_cost for c in made)
        cost, _ = totals(made, get_allocation(name)(made, budget))
        assert cost <= budget * (1 + 1e-9)


def test_a_weight_with_nothing_to_lose_pays():
    flat, steep = candidates_of([(20, 20), (20, 20)], 0)
    flat = Candidate("flat", flat.ranks, flat.costs, np.zeros_like(flat.losses), flat.dense_cost, flat.full_cost)
    first, second = get_allocation("global")([flat, steep], 1.2 * 400)
    assert first.cost(flat) < second.cost(steep)
    assert second.index is None  # all of the steep one fits


def test_full_budget_keeps_all_dense():
    candidates = candidates_of([(8, 12), (9, 9)], 1)
    assert all(x.index is None for x in get_allocation("global")(candidates, 96 + 81))


def test_names():
    assert {"uniform", "global"} <= set(ALLOCATIONS)
    with pytest.raises(TwofoldError, match="no allocation 'even'"):
        get_allocation("even")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90M", (90e6, "parameters")), ("1.2B", (1.2e9, "parameters")), ("500K", (5e5, "parameters")),
        ("180MB", (180e6, "bytes")), ("1GiB", (2**30, "bytes")), ("70%", (0.7, "share")), ("0.7", (0.7, "share")),
        ("123456", (123456, "parameters")), (" 90 m ", (90e6, "parameters")),
    ],
)  # fmt: skip
def test_budgets_are_read(text, expected):
    assert parse_budget(text) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize("text", ["", "many", "-3M", "90X", "1e6", "%"])
def test_budgets_that_can_not_be_read(text):
    with pytest.raises(TwofoldError, match="is not understood"):
        parse_budget(text)


SIZE = ModelSize(target_numbers=1_000_000, dense_numbers=500_000, element_bytes=4, smallest=10_000)


def test_budgets_leave_what_the_dense_parts_do_not_need():
    assert target_budget(0.8, None, SIZE).amount == 800_000
    assert target_budget(None, "0.9M", SIZE).amount == 400_000
    assert target_budget(None, "60%", SIZE).amount == pytest.approx(400_000)
    made = target_budget(None, "4MB", SIZE)
    assert (made.amount, made.unit) == (2_000_000, "bytes")
    assert target_budget(None, "9M", SIZE).amount == 1_000_000


@pytest.mark.parametrize(
    ("keep", "budget", "message"),
    [
        (None, "0.3M", r"smallest possible is 0\.51M parameters \(34%\), of which 0\.50M"),
        (None, "1MB", r"smallest possible is 2\.04MB, of which 2\.00MB"),
        (0.001, None, r"below the smallest possible, 0\.01"),
        (0.0, None, "above 0 and at most 1, got 0"),
        (1.2, None, r"at most 1, got 1\.2"),
        (None, None, "either --keep"),
        (0.5, "70%", "either --keep"),
        (None, "150%", "at most 100%"),
    ],
)
def test_impossible_budgets_say_what_is_possible(keep, budget, message):
    with pytest.raises(TwofoldError, match=message):
        target_budget(keep, budget, SIZE)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 10**6), keep=st.floats(0.35, 1.0))
def test_every_allocation_meets_the_budget(name, shapes, seed, keep):
    candidates = candidates_of(shapes, seed)
    least = sum(cheapest(c).cost(c) for c in candidates)  # below it make_plan refuses
    budget = max(keep * sum(c.full_cost for c in candidates), least)
    cost, _ = totals(candidates, get_allocation(name)(candidates, budget))
    assert cost <= budget * (1 + 1e-9)


def test_energy_keeps_the_same_share_of_each():
    candidates = candidates_of([(20, 25), (25, 20), (24, 30)], 3)
    budget = 0.5 * sum(c.full_cost for c in candidates)
    choices = get_allocation("energy")(candidates, budget)
    kept, next_up = [], []
    for candidate, choice in zip(candidates, choices, strict=True):
        rank = candidate.ranks[choice.index]
        shares = np.cumsum(candidate.values) / candidate.values.sum()
        kept.append(shares[rank - 1])
        next_up.append(shares[rank - 2] if rank > 1 else 0.0)
    # One share lies between what each keeps and what one rank less would keep.
    assert max(next_up) <= min(kept)


def test_effective_rank_of_known_spectra():
    assert entropy_rank(np.ones(7)) == pytest.approx(7)
    assert entropy_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert entropy_rank(np.zeros(3)) == 1
    assert entropy_rank(np.array([0.5, 0.5, 0.0])) == pytest.approx(2)


def test_effective_rank_gives_ranks_in_proportion():
    flat, steep = np.ones(40), 2.0 ** -np.arange(40)
    ranks = np.arange(1, 40)
    costs = np.array([gauge_storage(40, 40, int(r)) for r in ranks], dtype=float)
    made = [
        Candidate(name, ranks, costs, np.append(np.cumsum(v[::-1])[::-1], 0.0)[ranks], 1600.0, 1600.0, v)
        for name, v in (("flat", flat), ("steep", steep))
    ]
    choices = get_allocation("effective-rank")(made, 900.0)
    first, second = (int(ranks[c.index]) for c in choices)
    assert first / second == pytest.approx(entropy_rank(flat) / entropy_rank(steep), rel=0.35)
    assert sum(c.cost(m) for c, m in zip(choices, made, strict=True)) <= 900
