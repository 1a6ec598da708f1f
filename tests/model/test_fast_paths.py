"""PyTorch's own attention and encoder layers hand weights to one operation, past the layers: these stay dense, and say so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twofold.model.kinds.linear import READ_AS_IT_IS
from twofold.model.weights import find_targets
from twofold.nn import FactoredLinear


class Plain(nn.Module):
    """A few blocks of PyTorch between two layers of ours."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(12, 16), nn.Linear(16, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length, 12)
        states = self.encoder(self.before(x))
        mixed, _ = self.attention(states, x, x, need_weights=False)
        return self.after(self.decoder(states, mixed))


def test_what_the_fast_paths_read_is_listed_dense():
    targets = find_targets(Plain())
    reasons = {weight.name: weight.reason for weight in targets.dense}
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"):
        assert reasons[f"encoder.layers.0.{name}"] == READ_AS_IT_IS
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
        assert reasons[f"attention.{name}"] == READ_AS_IT_IS
    # A decoder layer has no fast path: its MLP is called layer by layer.
    assert [t.name for t in targets.targets] == ["before", "after", "decoder.linear1", "decoder.linear2"]


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_outputs_are_right_on_the_fast_path(settings):
    """In eval mode without gradients PyTorch takes it, and it would read a guard in the place of a weight."""
    torch.manual_seed(0)
    model = Plain(**settings).eval()
    x = torch.randn(3, 7, 12)
    with torch.no_grad():
        dense = model(x)
    reasons = [weight.reason for weight in find_targets(model).dense]
    assert reasons.count(READ_AS_IT_IS) == 2 * 4 + 4 + 2 * 2
    for target in find_targets(model).targets:
        place = model.get_submodule(target.name)
        u, s, v = torch.linalg.svd(place.weight.detach(), full_matrices=False)
        layer = FactoredLinear.from_factors(u * s, v, place.bias, "plain", False, dtype=torch.float32)
        parent, _, leaf = target.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-5)
