"""What outputs mean: the curvature of their loss, how far two models are apart, and the loss of likeness."""

from __future__ import annotations

import pytest
import torch

from twofold import TwofoldError
from twofold.task.output.categorical import CATEGORICAL
from twofold.task.output.gaussian import GAUSSIAN


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("curvature", ["sampled", "gauss-newton", "empirical"])
def test_noise_of_features_has_the_identity_as_its_second_moment(curvature):
    many = drawn(40_000, 4)
    labels = many + torch.randn(many.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = GAUSSIAN.probe(many, labels, torch.Generator().manual_seed(2), curvature)
    assert v.dtype == many.dtype
    torch.testing.assert_close(v.T @ v / len(v), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.03)


def test_features_are_apart_by_half_their_squared_distance():
    """KL(N(a, I) ‖ N(b, I)), by numerical integration in one dimension."""
    a, b = torch.tensor([[0.3]]), torch.tensor([[1.7]])
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(float(mean), 1.0).log_prob(x) for mean in (a, b))
    exact = float(torch.trapezoid(p.exp() * (p - q), x))
    apart, agreed = GAUSSIAN.divergence(*(GAUSSIAN.score(y, None)[1] for y in (a, b)))
    assert apart == pytest.approx(exact, rel=1e-6) and agreed == pytest.approx(1)
    features = drawn(5, 7)
    assert GAUSSIAN.divergence(features, features) == pytest.approx((0, 5))
    assert GAUSSIAN.divergence(features, -features)[1] == pytest.approx(-5)


def test_the_loss_of_features_has_them_less_the_labels_as_its_gradient():
    features, labels = drawn(5, 7).requires_grad_(True), drawn(5, 7).flip(0)
    loss = GAUSSIAN.loss(features, labels)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, features.detach() - labels)
    assert GAUSSIAN.score(features, labels)[0] == pytest.approx(loss.item())
    assert GAUSSIAN.score(features, None)[0] == 0


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("output", [CATEGORICAL, GAUSSIAN], ids=lambda output: output.name)
def test_likeness_is_the_divergence_and_a_share_of_the_loss(output, share):
    teacher, head = drawn(6, 5), torch.nn.Linear(3, 5).double().requires_grad_(False)
    states = drawn(6, 3).flip(0).requires_grad_(True)
    labels = drawn(6, 5).flip(1) if output is GAUSSIAN else torch.tensor([0, 4, -1, 2, 2, -1])
    known = 6 if output is GAUSSIAN else 4
    outputs = head(states)
    loss = output.likeness(states, output.keep(teacher), labels, share, head)
    apart, _ = output.divergence(*(output.score(y.detach(), None)[1].double() for y in (teacher, outputs)))
    direct = (1 - share) * apart / 6 + share * output.loss(outputs.detach(), labels).item() / known
    assert loss.item() == pytest.approx(direct, rel=1e-5)
    (through_head,) = torch.autograd.grad(loss, states, retain_graph=True)
    (own,) = torch.autograd.grad(output.likeness(outputs, output.keep(teacher), labels, share), states)
    torch.testing.assert_close(through_head, own, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("output", [CATEGORICAL, GAUSSIAN], ids=lambda output: output.name)
def test_what_looks_at_labels_is_refused_without(output):
    with pytest.raises(TwofoldError, match="`curvature=empirical` looks at what is right for each prediction"):
        output.probe(drawn(2, 3), None, torch.Generator(), "empirical")
