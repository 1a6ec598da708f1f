"""Targets and groups are found from the modules; every parameter is listed once, with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import ARCHITECTURES, make_model
from twofold.errors import TwofoldError
from twofold.model.kinds import dense_weight
from twofold.model.weights import find_groups, find_targets, list_weights, matches

SHARED = {
    "gpt2": {},
    "llama": {"q_proj": {"q_proj", "k_proj", "v_proj"}, "gate_proj": {"gate_proj", "up_proj"}},
    "mistral": {"q_proj": {"q_proj", "k_proj", "v_proj"}, "gate_proj": {"gate_proj", "up_proj"}},
    "qwen2": {"q_proj": {"q_proj", "k_proj", "v_proj"}, "gate_proj": {"gate_proj", "up_proj"}},
    "gpt_neox": {},
    "opt": {"k_proj": {"k_proj", "v_proj", "q_proj"}},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_listed_once(architecture):
    model = make_model(architecture)
    found = find_targets(model)
    names = [f"{t.name}.weight" for t in found.targets] + [d.name for d in found.dense]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(d.reason for d in found.dense)
    assert found.total_numbers == sum(p.numel() for p in model.parameters())
    linear = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not model.get_output_embeddings()
    ]
    assert [t.name for t in found.targets] == linear
    for target in found.targets:
        assert dense_weight(model.get_submodule(target.name)).shape == (target.out_features, target.in_features)
        assert target.layer in (0, 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_are_the_modules_with_one_input(architecture):
    model = make_model(architecture)
    found = find_targets(model)
    groups = find_groups(model, found.targets, lambda: model(input_ids=torch.arange(12)[None]))
    members: dict[str, set[str]] = {}
    for name, leader in groups.items():
        members.setdefault(leader, set()).add(name.rpartition(".")[2])
    together = {leader.rpartition(".")[2]: kinds for leader, kinds in members.items() if len(kinds) > 1}
    assert together == SHARED[architecture]


def test_embeddings_and_head_say_why():
    reasons = {d.name: d.reason for d in find_targets(make_model("mistral")).dense}
    assert "output embedding" in reasons["lm_head.weight"]
    assert "embedding" in reasons["model.embed_tokens.weight"]
    assert "norm" in reasons["model.norm.weight"]


def test_patterns():
    model = make_model()
    only = find_targets(model, include=["q_proj"])
    assert {t.kind for t in only.targets} == {"q_proj"}
    less = find_targets(model, exclude=["mlp.*"])
    assert {t.kind for t in less.targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reasons = {d.name: d.reason for d in less.dense}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "excluded"
    with pytest.raises(TwofoldError, match="'qproj' matches no linear layer"):
        find_targets(model, include=["qproj"])
    assert matches("model.layers.1.self_attn.q_proj", ["layers.1.*"])
    assert not matches("model.layers.11.self_attn.q_proj", ["layers.1.*"])


def test_what_can_not_be_factorized_says_why():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(4, 8, 16))
            self.tiny = nn.Linear(3, 16)
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.second.weight = self.first.weight

    reasons = {d.name: d.reason for d in list_weights(Experts()).dense}
    assert "unsupported layer type: a parameter of 3 dimensions" in reasons["gate_up"]
    assert reasons["tiny.weight"] == "too small: 16 × 3"
    assert "shared with" in reasons["first.weight"]
    with pytest.raises(TwofoldError, match="nothing to factorize"):
        find_targets(Experts())


def test_groups_look_at_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            y = x + 1
            return self.a(x) + self.b(y) + self.a(y) + self.c(x[:0]).sum()

    model = Twice()
    groups = find_groups(model, find_targets(model).targets, lambda: model(torch.randn(4, 16)))
    assert groups == {"a": "a", "b": "b", "c": "c"}
