"""LoRA on factored layers through PEFT itself: trained, saved, loaded, switched, merged exactly; and adapters out of models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, make_model, make_tokenizer
from factored import factored_model, with_lora
from twofold.adapters.extract import extract
from twofold.adapters.folder import write_adapter
from twofold.adapters.merge import merge, recompress_to
from twofold.adapters.metric import Metrics
from twofold.adapters.ranks import by_budget, by_energy
from twofold.checkpoint.peft.grow import grow
from twofold.checkpoint.peft.lora import CompactLora, whole_layers
from twofold.checkpoint.peft.register import need_packages, register
from twofold.checkpoint.plugin import attach
from twofold.errors import TwofoldError
from twofold.model.kinds import dense_weight
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.sliced import SlicedLinear
from twofold.nn.places import replace_module
from twofold.quantize.rounding import round_matrix

IDS = torch.arange(24)[None]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def ranks(model: Any) -> set[int]:
    return {module.rank for module in model.modules() if isinstance(module, FactoredLinear)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_is_saved_loaded_and_merged_exactly(architecture: str, tmp_path: Path) -> None:
    model = factored_model(architecture)
    model.save_pretrained(tmp_path / "small")
    before = logits(model)
    adapted = with_lora(model)
    assert all(isinstance(module, CompactLora) for name, module in adapted.named_modules() if hasattr(module, "lora_A"))
    expected = logits(adapted)
    assert apart(expected, before) > 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "small"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    assert apart(logits(merged), expected) < 1e-5
    assert ranks(merged) == {6 + 3}
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))
    assert ranks(again) == {6 + 3}


def test_training_changes_the_adapter_alone() -> None:
    adapted = get_peft_model(factored_model(), LoraConfig(r=2, target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    for name, p in adapted.named_parameters():
        assert ("lora_" in name) == p.requires_grad
        assert ("lora_" in name) or torch.equal(p, before[name])


def test_several_adapters_are_switched_merged_apart_and_unloaded() -> None:
    model = factored_model()
    plain = logits(model)
    adapted = with_lora(model, 2)
    first = logits(adapted)
    adapted.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    adapted.set_adapter("other")
    second = logits(adapted.eval())
    assert apart(second, first) > 0.01
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)
    adapted.merge_adapter(["default"])
    assert apart(logits(adapted), first) < 1e-5
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), first)  # to the bit: the layer of before is put back
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    assert torch.equal(logits(adapted.unload()), plain)


def test_methods_that_need_a_dense_weight_say_so() -> None:
    for given_ in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        with pytest.raises(TwofoldError, match="needs the dense weight"):
            get_peft_model(factored_model(), LoraConfig(r=2, target_modules="all-linear", **given_))


def test_an_untrained_adapter_takes_no_rank() -> None:
    model = factored_model()
    before = logits(model)
    merged = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear")).merge_and_unload()
    assert ranks(merged) == {6}
    assert apart(logits(merged), before) < 1e-6


@settings(max_examples=30, deadline=None)
@given(
    st.integers(3, 14),
    st.integers(3, 14),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(["auto", "plain"]),
    st.booleans(),
)
def test_growing_is_exact(m: int, n: int, r: int, k: int, form: str, bias: bool) -> None:
    r = min(r, m, n)
    generator = torch.Generator().manual_seed(m * 1000 + n * 10 + r)
    left, right, up, down, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((m, r), (r, n), (m, k), (k, n), (5, n))
    )
    layer = FactoredLinear.from_factors(left, right, torch.randn(m, dtype=torch.float64) if bias else None, form=form)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.linalg.multi_dot(layer.factors()), left @ right)
    grown = grow(layer, up, down)
    torch.testing.assert_close(grown(x), layer(x) + x @ (up @ down).T, rtol=1e-8, atol=1e-8)
    if r + k < min(m, n) and isinstance(grown, FactoredLinear):
        assert grown.rank == r + k
    if r + k >= min(m, n):
        assert isinstance(grown, nn.Linear)


def test_growing_keeps_dense_columns_and_refuses_slices() -> None:
    torch.manual_seed(0)
    rest = FactoredLinear.from_factors(torch.randn(10, 2).double(), torch.randn(2, 9).double())
    layer = DenseColumnsLinear.around(rest, torch.randn(10, 3).double(), torch.randperm(12).int())
    up, down, x = torch.randn(10, 2).double(), torch.randn(2, 12).double(), torch.randn(4, 12).double()
    grown = grow(layer, up, down)
    assert isinstance(grown, DenseColumnsLinear) and grown.rank == 4
    torch.testing.assert_close(grown(x), layer(x) + x @ (up @ down).T)
    with pytest.raises(TwofoldError, match="SlicedLinear"):
        grow(SlicedLinear(8, 6, kept=2), torch.randn(6, 1), torch.randn(1, 8))


def test_ranks_by_energy_and_by_budget() -> None:
    values = {"a": torch.tensor([8.0, 1.0, 1.0]), "b": torch.tensor([3.0, 2.0, 0.0]), "c": torch.zeros(2)}
    assert by_energy(values, 0.8) == {"a": 1, "b": 2, "c": 0}
    assert by_energy(values, 1.0) == {"a": 3, "b": 2, "c": 0}
    costs = {"a": 10, "b": 5, "c": 1}
    assert by_budget(values, costs, 20) == {"a": 1, "b": 2, "c": 0}
    assert by_budget(values, costs, 9) == {"a": 0, "b": 1, "c": 0}
    assert by_budget(values, costs, 100) == {"a": 3, "b": 2, "c": 0}


def test_recompressing_keeps_the_size_and_is_the_best_of_its_rank() -> None:
    model = factored_model(rank=8)
    old = {name: m.rank for name, m in model.named_modules() if isinstance(m, FactoredLinear)}
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian"))
    for module in adapted.modules():
        if isinstance(module, CompactLora):
            module.lora_B["default"].weight.data.normal_(std=0.02)
    merged = adapted.merge_and_unload()
    name = "model.layers.0.mlp.up_proj"
    whole = dense_weight(merged.get_submodule(name)).double()
    recompress_to(merged, old, Metrics())
    assert {n: m.rank for n, m in merged.named_modules() if isinstance(m, FactoredLinear)} == old
    tail = torch.linalg.svdvals(whole)[8:].square().sum().sqrt()
    lost = (dense_weight(merged.get_submodule(name)).double() - whole).norm()
    torch.testing.assert_close(lost, tail, rtol=1e-4, atol=1e-6)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_adapter_of_full_energy_is_the_whole_change(tmp_path: Path) -> None:
    base = save(make_model(), tmp_path / "base")
    tuned_model = make_model()
    with torch.no_grad():
        for name in whole_layers(tuned_model):
            weight = tuned_model.get_submodule(name).weight
            weight += 0.05 * weight.norm() / 30 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1]) / 10
    expected = logits(tuned_model)
    tuned = save(tuned_model, tmp_path / "tuned")
    made = extract(str(tuned), str(base), tmp_path / "adapter", energy=1 - 1e-9, quiet=True)
    assert set(made.ranks.values()) == {3}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["peft_type"] == "LORA"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert apart(logits(adapted), expected) < 1e-4
    budget = extract(str(tuned), str(base), tmp_path / "less", rank=1, quiet=True)
    assert budget.numbers <= sum(
        sum(dense_weight(tuned_model.get_submodule(n)).shape) for n in whole_layers(tuned_model)
    )
    assert 0.1 < budget.energy < 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "less")


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    base = save(make_model(), tmp_path / "base")
    other = save(make_model(seed=5), tmp_path / "other")
    shapes = save(make_model("qwen2"), tmp_path / "shapes")
    with pytest.raises(TwofoldError, match=r"is not the base of.*differ by"):
        extract(str(other), str(base), tmp_path / "x", rank=2, quiet=True)
    with pytest.raises(TwofoldError, match=r"is not the base of.*mlp"):
        extract(str(shapes), str(base), tmp_path / "x", rank=2, quiet=True)
    with pytest.raises(TwofoldError, match="nothing to extract"):
        extract(str(base), str(base), tmp_path / "x", rank=2, quiet=True)
    (other / "run.json").write_text(json.dumps({"kind": "tune", "base_sha256": "0" * 64}))
    with pytest.raises(TwofoldError, match="another model"):
        extract(str(other), str(base), tmp_path / "x", rank=2, quiet=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_adapters_are_merged_on_the_command_line(tmp_path: Path) -> None:
    base = save(factored_model(rank=4), tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    change = {n: (0.3 * torch.randn(dense_weight(model.get_submodule(n)).shape[0], 2),
                  0.3 * torch.randn(2, dense_weight(model.get_submodule(n)).shape[1])) for n in whole_layers(model)}  # fmt: skip
    write_adapter(tmp_path / "one", change, str(base))
    write_adapter(tmp_path / "two", {n: (left[:, :1], right[:1]) for n, (left, right) in change.items()}, str(base))
    sums = PeftModel.from_pretrained(model, tmp_path / "one", adapter_name="one")
    sums.load_adapter(str(tmp_path / "two"), adapter_name="two")
    sums.base_model.set_adapter(["one", "two"])
    expected = logits(sums.eval())
    made = merge(str(base), [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "merged")
    assert set(made.ranks.values()) == {4 + 2 + 1}
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5
    small = merge(str(base), [str(tmp_path / "one")], tmp_path / "small-again", recompress=True)
    assert set(small.ranks.values()) == {4} and small.parameters_after == small.parameters_before
    one = merge(str(base), [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "both", adapter_rank=2)
    assert one.energy == pytest.approx(1.0)  # the sum has rank 2
    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "both").eval()
    assert apart(logits(both), expected) < 1e-4
    half = merge(str(base), [str(tmp_path / "one")], tmp_path / "half", weight=[0.0])
    assert set(half.ranks.values()) == {4}  # what counts nothing takes no rank
    with pytest.raises(TwofoldError, match="no adapter in"):
        merge(str(base), [str(base)], tmp_path / "x")
    with pytest.raises(TwofoldError, match="2 values of `weight`"):
        merge(str(base), [str(tmp_path / "one")], tmp_path / "x", weight=[1, 2])
    dense = save(make_model("qwen2"), tmp_path / "dense")
    with pytest.raises(TwofoldError, match="does not fit"):
        merge(str(dense), [str(tmp_path / "one")], tmp_path / "x")
    (tmp_path / "one" / "run.json").write_text(json.dumps({"base_sha256": "1" * 64}))
    with pytest.raises(TwofoldError, match="another model"):
        merge(str(base), [str(tmp_path / "one")], tmp_path / "x")


def test_extracting_does_not_replace_what_it_reads(tmp_path: Path) -> None:
    base, tuned = save(make_model(), tmp_path / "base"), save(make_model(seed=5), tmp_path / "tuned")
    for folder in (base, tuned):
        (folder / "run.json").write_text(json.dumps({"kind": "tune"}))  # ours, so --overwrite may replace it
    for out in (base, tuned, tmp_path / "base" / "inside"):
        with pytest.raises(TwofoldError, match="output folder"):
            extract(str(tuned), str(base), out, rank=2, overwrite=True, quiet=True)
    assert (base / "model.safetensors").is_file() and (tuned / "model.safetensors").is_file()


def test_merging_does_not_write_into_what_it_reads(tmp_path: Path) -> None:
    base, adapter = save(make_model(), tmp_path / "base"), tmp_path / "adapter"
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    (adapter / "run.json").write_text(json.dumps({"kind": "tune"}))
    before = sorted(path.name for path in adapter.iterdir())
    for out in (base / "x", adapter, adapter / "x", adapter / "x" / "y", tmp_path):
        with pytest.raises(TwofoldError, match="output folder"):
            merge(str(base), str(adapter), out, overwrite=True)
    assert sorted(path.name for path in adapter.iterdir()) == before


def test_dora_is_merged_alone_and_one_adapter_is_of_plain_lora(tmp_path: Path) -> None:
    base = str(save(make_model(), tmp_path / "base"))
    kinds: dict[str, Any] = {
        "lora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        "dora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=True),
        "vera": VeraConfig(r=4, target_modules="all-linear"),
        "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"]),
        "biased": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    }
    expected = None
    for name, config in kinds.items():
        adapted = get_peft_model(make_model(), config).eval()
        if name == "dora":
            for part, parameter in adapted.named_parameters():
                if "magnitude" in part:
                    parameter.data *= 1.3
            expected = logits(adapted)
        adapted.save_pretrained(tmp_path / name)
    lora, dora = str(tmp_path / "lora"), str(tmp_path / "dora")
    for adapters, weights in (([dora], [0.5]), ([dora, lora], None), ([lora, dora], [1.0, 1.0])):
        with pytest.raises(TwofoldError, match=r"dora is DoRA.*merge it alone, without `weight`"):
            merge(base, adapters, tmp_path / "x", weight=weights)
    for name in ("dora", "vera", "adalora", "biased"):
        with pytest.raises(TwofoldError, match=f"{name} is no plain LoRA"):
            merge(base, [str(tmp_path / name)], tmp_path / "x", adapter_rank=2)
    assert not (tmp_path / "x").exists()
    merge(base, [dora], tmp_path / "merged")
    assert expected is not None
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5


def test_nothing_is_merged_into_integers() -> None:
    layer = FactoredLinear.from_factors(torch.randn(10, 4), torch.randn(4, 12), form="plain")
    matrices = {"reduce": layer.reduce.weight.detach(), "expand": layer.expand.weight.detach()}
    rounded = {name: round_matrix(matrix, 8, None, IntLinear) for name, matrix in matrices.items()}
    layer.hold_integers(8, None, **rounded)
    with pytest.raises(TwofoldError, match=r"factors that are integers \(`bits`\)"):
        grow(layer, torch.randn(10, 1), torch.randn(1, 12))


def test_recompressing_leaves_a_layer_with_dense_columns_that_became_dense(tmp_path: Path) -> None:
    model = factored_model(rank=4)
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.v_proj"  # (16, 32)
    rest = FactoredLinear.from_factors(torch.randn(16, 12), torch.randn(12, 29))
    replace_module(model, name, DenseColumnsLinear.around(rest, torch.randn(16, 3), torch.randperm(32).int()))
    attach(model)
    base = save(model, tmp_path / "small")
    write_adapter(tmp_path / "one", {name: (torch.randn(16, 6), torch.randn(6, 32))}, str(base))
    made = merge(str(base), [str(tmp_path / "one")], tmp_path / "out", recompress=True)
    assert any(name in note and "dense columns" in note for note in made.notes)
    whole = merge(str(base), [str(tmp_path / "one")], tmp_path / "whole")
    assert name not in whole.ranks  # it became dense
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / one).eval() for one in ("out", "whole"))
    torch.testing.assert_close(first.get_submodule(name).weight, second.get_submodule(name).weight)


def test_a_broken_peft_keeps_no_model_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it raises ImportError
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert register() is False
    with pytest.raises(TwofoldError, match="peft is installed but can't be imported"):
        need_packages("peft")
