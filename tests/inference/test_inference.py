"""The inference form says what the model said, uses fewer products, and is never stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
import twofold
from conftest import make_model
from factored import in_form, model_of_form
from twofold import TwofoldError
from twofold.inference.draft import Draft
from twofold.inference.latency import Latencies, Table, Times
from twofold.nn.grouped_linear import ColumnsLinear, GroupedLinear, InputGroup, Part, laid_out
from twofold.nn.layers.factored import FactoredLinear

IDS = torch.arange(24).reshape(2, 12)


def table_of(ratio: float, by_columns: bool = False) -> Latencies:
    """Times in which every factored layer takes ``ratio`` of the dense one's."""
    about = {"machine": "none", "threads": "1", "dtype": "float32", "torch": "none"}
    return Latencies(
        Table(about=about, by_columns=by_columns), torch.float32, torch.device("cpu"), quiet=True,
        take=lambda m, n, form, tokens: Times(dense=10.0, ranks=[1, min(m, n)], factored=[10 * ratio, 10 * ratio]),
    )  # fmt: skip


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("form", ["rows", "columns", "plain", "mixed"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "opt", "gpt_neox"])
def test_logits_change_by_rounding_alone(architecture: str, form: str, by_columns: bool) -> None:
    many = torch.arange(96).reshape(2, 48)  # above FEW, so that products write into one buffer
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        model = model_of_form(architecture, form, dtype=dtype)
        before, long = logits(model), logits(model, many)
        twofold.optimize(model, latencies=table_of(0.5, by_columns), quiet=True)
        assert apart(logits(model), before) < most
        assert apart(logits(model, many), long) < most
        with torch.inference_mode():
            assert apart(model(input_ids=IDS).logits, before) < most
        assert not any(isinstance(module, FactoredLinear) for module in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_it_is_as_accurate_as_the_stored_form(architecture: str) -> None:
    stored = model_of_form(architecture, "mixed")
    exact = logits(copy.deepcopy(stored).double(), torch.arange(96).reshape(2, 48))
    before = logits(stored, torch.arange(96).reshape(2, 48))
    twofold.optimize(stored, latencies=table_of(0.5, True), quiet=True)
    assert apart(logits(stored, torch.arange(96).reshape(2, 48)), exact) < 3 * apart(before, exact)


def test_a_mistake_of_ours_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_form("llama")
    before = logits(model)
    monkeypatch.setattr(
        Draft, "in_rising_order", lambda draft: draft.with_outputs(torch.arange(draft.out_features).flip(0))
    )
    with pytest.raises(RuntimeError, match="please report this"):
        twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    assert torch.equal(logits(model), before) and not hasattr(model, "twofold_inference")


def test_layers_that_share_an_input_share_a_product_and_one_order_of_hidden_units_is_gone() -> None:
    model = model_of_form("llama", "mixed")
    twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    done = model.twofold_inference
    kinds = [[name.rpartition(".")[2] for name in group] for group in done.groups]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    assert len(done.folded) == 2 and done.folded[0].endswith(("gate_proj", "up_proj"))
    assert done.words.startswith("inference form: 10 layers in 4 groups that read one input, 4 alone")


def test_fewer_products_and_one_reordering_for_each_group() -> None:
    many = torch.arange(96).reshape(2, 48)

    def counted(model: Any) -> dict[str, int]:
        with torch.profiler.profile() as profile, torch.no_grad():
            model(input_ids=many)
        return {event.key: event.count for event in profile.key_averages()}

    model = model_of_form("llama", "rows")
    before = counted(model)
    twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    after = counted(model)
    products = [sum(one.get(key, 0) for key in ("aten::mm", "aten::addmm")) for one in (before, after)]
    assert products[0] - products[1] == 2 * (2 + 1)  # of q, k, v and of gate, up, in two blocks
    # q k v together, o, up (gate comes in order), down
    assert after["aten::index_select"] == before["aten::index_select"] - 2 * (2 + 1)
    joined = before["aten::cat"] - after["aten::cat"]
    assert joined == 2 * 7


def test_generation_is_the_same() -> None:
    model = model_of_form("llama")
    settings = {"max_new_tokens": 12, "do_sample": False}
    before = model.generate(IDS, **settings)
    twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    assert torch.equal(model.generate(IDS, **settings), before)


@pytest.mark.long
def test_compiled() -> None:
    model = model_of_form("llama")
    before = logits(model)
    twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert apart(compiled(input_ids=IDS).logits, before) < 2e-5
        other = IDS.flip(0)
        assert apart(compiled(input_ids=other).logits, before.flip(0)) < 2e-5


def test_slower_layers_become_dense_and_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of_form("llama")
    before = logits(model)
    twofold.optimize(model, latencies=table_of(1.5))
    assert len(model.twofold_inference.merged) == 14
    assert not any(isinstance(m, GroupedLinear | ColumnsLinear | FactoredLinear) for m in model.modules())
    assert apart(logits(model), before) < 2e-5
    assert "14 dense in memory" in capsys.readouterr().err
    assert "µs" in next(iter(model.twofold_inference.merged.values()))
    kept = twofold.optimize(model_of_form("llama"), merge="never", latencies=table_of(1.5), quiet=True)
    assert not kept.twofold_inference.merged


def test_what_is_read_at_once_is_judged_by_many_tokens_and_hidden_units_without_their_order() -> None:
    ratios = {1: 3.0, 512: 0.5}  # a decoder's layers are slower for one token

    def take(m: int, n: int, form: str, tokens: int) -> Times:
        # Where there are many outputs, putting them in order takes long.
        ratio = 2.0 if form == "gauge" and m > n else ratios[tokens]
        return Times(dense=10.0, ranks=[1, min(m, n)], factored=[10 * ratio, 10 * ratio])

    table = Latencies(Table(about={}, by_columns=False), torch.float32, torch.device("cpu"), quiet=True, take=take)
    model = in_form(tiny.whisper().double())
    sound = {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": torch.arange(6)[None]}
    with torch.no_grad():
        before = model(**sound).logits
    twofold.optimize(model, latencies=table, quiet=True)
    done = model.twofold_inference
    assert all(".decoder." in name for name in done.merged) and len(done.merged) == 2 * 10
    assert {name for name in done.folded if name.endswith("fc1")} == {f"model.encoder.layers.{i}.fc1" for i in (0, 1)}
    with torch.no_grad():
        assert apart(model(**sound).logits, before) < 2e-5

    encoder = in_form(tiny.bert().double())  # its MLP has other names, so the order of its hidden units is kept
    twofold.optimize(encoder, latencies=table, quiet=True)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in encoder.twofold_inference.merged} == {"intermediate"}


def test_gpt2_merges_to_its_own_kind_of_layer() -> None:
    model = model_of_form("gpt2")
    before = logits(model)
    twofold.optimize(model, latencies=table_of(1.5), quiet=True)
    assert apart(logits(model), before) < 2e-5


def test_it_is_not_saved_and_not_made_dense(tmp_path: Path) -> None:
    model = model_of_form("llama")
    model.save_pretrained(tmp_path / "factored")
    twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    with pytest.raises(TwofoldError, match=r"save it before twofold\.optimize"):
        model.save_pretrained(tmp_path / "optimized")
    assert not list((tmp_path / "optimized").glob("*.safetensors"))
    with pytest.raises(TwofoldError, match="no way back"):
        model.dequantize()
    with pytest.raises(TwofoldError, match="already"):
        twofold.optimize(model, quiet=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "factored")
    assert apart(logits(again), logits(model)) < 2e-5


def test_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_form("llama")
    model.save_pretrained(tmp_path / "factored")
    monkeypatch.setattr(Latencies, "of_this_machine", lambda *_, **__: table_of(0.5))
    loaded = twofold.load_model(str(tmp_path / "factored")).model
    twofold.optimize(loaded, quiet=True)
    assert len(loaded.twofold_inference.groups) == 4
    assert apart(logits(loaded), logits(model)) < 2e-5


def test_a_dense_model_is_given_back_and_one_without_weights_refused() -> None:
    model = make_model()
    before = logits(model)
    assert twofold.optimize(model, quiet=True) is model
    assert torch.equal(logits(model), before)
    with torch.device("meta"):
        empty = factored_model_on_meta()
    with pytest.raises(TwofoldError, match="no weights"):
        twofold.optimize(empty, quiet=True)


def factored_model_on_meta() -> nn.Module:
    return nn.ModuleDict({"layer": FactoredLinear(16, 16, 4)})


def test_layers_that_other_code_changed_are_kept() -> None:
    model = model_of_form("llama")
    before = logits(model)
    layer = model.model.layers[0].self_attn.q_proj
    layer.reduce = nn.Sequential(layer.reduce)
    hooked = model.model.layers[1].mlp.up_proj
    hooked.register_forward_hook(lambda module, args, output: output)
    twofold.optimize(model, latencies=table_of(0.5), quiet=True)
    assert set(model.twofold_inference.kept) == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip
    assert apart(logits(model), before) < 2e-5


def test_units_behind_a_norm_are_not_put_in_another_order() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
            self.embedding = nn.Embedding(64, 16)
            nn.init.normal_(self.norm.weight)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            return (self.fc2(self.norm(self.fc1(self.embedding(input_ids)))),)

    torch.manual_seed(0)
    model = Between().double()
    for name in ("fc1", "fc2"):
        dense = getattr(model, name)
        u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
        setattr(model, name, FactoredLinear.from_factors(u[:, :6] * s[:6], v[:6], dense.bias.detach(), "rows"))
    with torch.no_grad():
        before = model(IDS)[0]
        twofold.optimize(model, latencies=table_of(0.5), quiet=True)
        assert model.twofold_inference.folded == []  # type: ignore[union-attr]
        assert apart(model(IDS)[0], before) < 1e-12


def test_what_is_kept_for_the_others_belongs_to_one_input() -> None:
    torch.manual_seed(0)
    parts = [Part(torch.randn(3, 8), torch.randn(5, 3), True, torch.randperm(8)) for _ in range(2)]
    group = InputGroup(parts)
    first, second = (GroupedLinear(group, i, 8, holds=i == 0) for i in range(2))
    one, other = torch.randn(4, 8), torch.randn(4, 8)
    with torch.no_grad():
        alone = [y.clone() for y in group(other)]
        first(one)
        assert torch.equal(second(other), alone[1])  # another tensor: computed anew
        first(one)
        one.copy_(other)
        assert torch.equal(second(one), alone[1])  # the same tensor with other numbers
        assert group._outputs is None
    assert torch.equal(copy.deepcopy(nn.ModuleList([first, second]))[1](other), alone[1])


def test_gradients_reach_the_input() -> None:
    torch.manual_seed(0)
    group = InputGroup([Part(torch.randn(3, 8), torch.randn(5, 3), True, torch.randperm(8))]).double()
    for tokens in (2, 40):
        x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: group(x)[0], (x,))


@pytest.mark.parametrize("form", ["rows", "columns", "plain"])
def test_orders_of_outputs_and_inputs(form: str) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(12, 4, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    layer = FactoredLinear.from_factors(left, right, torch.randn(12, dtype=torch.float64), form)  # type: ignore[arg-type]
    outputs, inputs = torch.randperm(12), torch.randperm(10)
    x = torch.randn(3, 10, dtype=torch.float64)
    draft = Draft.of(layer).with_outputs(outputs).with_inputs(inputs)
    assert torch.allclose(_run(draft, x[:, inputs]), layer(x)[:, outputs])
    rising = Draft.of(layer).in_rising_order()
    assert torch.allclose(_run(rising, x), layer(x))
    if rising.order is not None:
        order = rising.order.argsort() if form == "rows" else rising.order
        assert torch.equal(order[:4], order[:4].sort().values) and torch.equal(order[4:], order[4:].sort().values)
    on_rows = Draft.of(layer).on_rows()
    assert on_rows is not None and on_rows.form in ("rows", "plain")
    assert torch.allclose(_run(on_rows, x), layer(x))


def _run(draft: Draft, x: Tensor) -> Tensor:
    if draft.form == "columns":
        y: Tensor = ColumnsLinear(draft.reduce, draft.expand, draft.order, draft.bias)(x)
        return y
    group = InputGroup([Part(draft.reduce, draft.expand, draft.form == "rows", draft.order, draft.bias)])
    return group(x)[0]  # type: ignore[no-any-return]


def test_layouts_hold_the_same_numbers() -> None:
    weight = torch.randn(6, 3)
    assert torch.equal(laid_out(weight, True), weight) and laid_out(weight, True).stride() == (1, 6)
    assert laid_out(weight.T, True).stride() == (6, 1)
