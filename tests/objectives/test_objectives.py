"""Each objective is the metric that its paper names. A new objective adds one row here."""

from __future__ import annotations

import pytest
import torch

from twofold.errors import TwofoldError
from twofold.linalg.spectrum import gram, spectrum_of, truncate
from twofold.objectives import OBJECTIVES, LayerMoments

SHAPES = [(9, 16), (16, 9), (12, 12)]
DAMPING = 1e-3


def damped(moment):
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def diagonal(vector):
    return torch.diag(vector + DAMPING * vector.mean())


# name → the full metrics (left (m, m), right (n, n)) of x (T, n), g (T, m)
ROWS = {
    "svd": lambda x, g: (torch.eye(g.shape[1], dtype=x.dtype), torch.eye(x.shape[1], dtype=x.dtype)),
    "fwsvd": lambda x, g: (
        diagonal((g.square() * x.square().sum(1, keepdim=True)).mean(0)),
        torch.eye(x.shape[1], dtype=x.dtype),
    ),
    "asvd": lambda x, g: (torch.eye(g.shape[1], dtype=x.dtype), diagonal(x.abs().mean(0))),
    "svd-llm": lambda x, g: (torch.eye(g.shape[1], dtype=x.dtype), damped(x.T @ x / len(x))),
    "lite-asr": lambda x, g: (torch.eye(g.shape[1], dtype=x.dtype), x.T @ x / len(x)),  # centred: test_centred.py
    "two-sided": lambda x, g: (damped(g.T @ g / len(g)), damped(x.T @ x / len(x))),
}
INPUTS = {
    "plain": lambda x: torch.eye(x.shape[1], dtype=x.dtype), "abs": lambda x: diagonal(x.abs().mean(0)),
    "diagonal": lambda x: diagonal(x.square().mean(0)), "whitened": lambda x: damped(x.T @ x / len(x)),
}  # fmt: skip
OUTPUTS = {
    "plain": lambda x, g: torch.eye(g.shape[1], dtype=x.dtype), "rows": lambda x, g: ROWS["fwsvd"](x, g)[0],
    "diagonal": lambda x, g: diagonal(g.square().mean(0)), "whitened": lambda x, g: damped(g.T @ g / len(g)),
}  # fmt: skip


def metrics_of(name, x, g):
    """The full metrics of an objective by name, or of two that are combined."""
    if name in ROWS:
        return ROWS[name](x, g)
    left, _, right = name.partition("+")
    return OUTPUTS[right](x, g), INPUTS[left](x)


COMBINED = [f"{left}+{right}" for left in INPUTS for right in OUTPUTS]


def moments_of(weight, x, g, small):
    """The moments of given activations: the smaller side of each pair, or C and G themselves."""
    m, n = weight.shape
    t = len(x)
    c, gg = x.T @ x / t, g.T @ g / t
    wide = m <= n
    return LayerMoments(
        input=None if small and wide else c,
        output=weight @ c @ weight.T if small and wide else None,
        gradient=gg if wide or not small else None,
        input_gradient=weight.T @ gg @ weight if small and not wide else None,
        input_trace=float(c.trace()),
        gradient_trace=float(gg.trace()),
        input_abs=x.abs().mean(0),
        input_square=x.square().mean(0),
        gradient_square=g.square().mean(0),
        fisher_rows=(g.square() * x.square().sum(1, keepdim=True)).mean(0),
    )


def test_every_objective_has_a_row():
    assert set(ROWS) == {one.name for one in OBJECTIVES.all() if one.build is not None}
    # Those without are in test_structures.py, test_cut_columns.py, test_basis_sharing.py and test_quantize.py.
    structural = {"modegpt", "dense-columns", "basis-sharing", "lqer", "qera-exact", "eora"}
    assert {one.name for one in OBJECTIVES.all() if one.build is None} == structural


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*sorted(ROWS), *COMBINED])
def test_minimizes_its_own_loss(name, shape, small):
    torch.manual_seed(0)
    m, n = shape
    weight = torch.randn(m, n, dtype=torch.float64)
    x = torch.randn(60, n, dtype=torch.float64) * torch.linspace(0.1, 3, n, dtype=torch.float64)
    g = torch.randn(60, m, dtype=torch.float64) * torch.linspace(2, 0.2, m, dtype=torch.float64)
    left, right = metrics_of(name, x, g)
    problem = OBJECTIVES.get(name).build(weight, moments_of(weight, x, g, small), DAMPING)
    spectrum = spectrum_of(problem.metric, problem.gram, problem.side)
    # σ are the singular values of left^½ W right^½
    a, b = torch.linalg.cholesky(left), torch.linalg.cholesky(right)
    singular = torch.linalg.svdvals(a.T @ weight @ b)
    torch.testing.assert_close(spectrum.values, singular**2, rtol=1e-8, atol=1e-8)
    rank = min(shape) // 2
    first, second = truncate(weight, spectrum, problem.metric, rank)
    difference = weight - first @ second
    loss = float(torch.trace(left @ difference @ right @ difference.T))
    assert loss == pytest.approx(float(spectrum.tails[rank]), rel=1e-7)


def test_what_each_collects():
    assert OBJECTIVES.get("svd").needs == frozenset()
    assert OBJECTIVES.get("two-sided").needs == {"input", "gradient"}
    assert {o.loss for o in OBJECTIVES.all()} == {"nats", "output", "weight"}
    assert all(o.source for o in OBJECTIVES.all())
    with pytest.raises(TwofoldError, match="no objective 'svdllm'; choose one of asvd"):
        OBJECTIVES.get("svdllm")


def test_combined_metrics_are_the_named_objectives():
    torch.manual_seed(1)
    weight, x, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 16), (50, 16), (50, 9)))
    moments = moments_of(weight, x, g, True)
    same = {"plain+plain": "svd", "abs+plain": "asvd", "plain+rows": "fwsvd", "whitened+plain": "svd-llm"}
    for name, own in {**same, "whitened+whitened": "two-sided"}.items():
        found, expected = (OBJECTIVES.get(one) for one in (name, own))
        assert (found.loss, found.needs) == (expected.loss, expected.needs)
        first, second = (one.build(weight, moments, DAMPING) for one in (found, expected))
        torch.testing.assert_close(first.gram, second.gram)
        assert (first.metric is None) == (second.metric is None)
    assert OBJECTIVES.get("diagonal+diagonal").loss == "nats"
    for wrong in ("whitened+", "+rows", "whitened+abs", "rows+whitened", "whitened+rows+rows"):
        with pytest.raises(TwofoldError, match=r"two metrics as in whitened\+rows"):
            OBJECTIVES.get(wrong)


def test_layers_that_were_never_reached_still_have_a_metric():
    weight = torch.randn(4, 6, dtype=torch.float64)
    zeros = LayerMoments(output=torch.zeros(4, 4), gradient=torch.zeros(4, 4), input=None)
    problem = OBJECTIVES.get("two-sided").build(weight, zeros, 0.0)
    torch.testing.assert_close(problem.gram, gram(weight, None))
    torch.testing.assert_close(problem.metric, torch.eye(4, dtype=torch.float64))
