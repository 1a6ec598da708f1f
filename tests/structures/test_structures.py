"""Weights that are cut together: the closed forms against direct solutions, and the models that they make."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, PhiConfig, Qwen3Config

import twofold
from conftest import CONFIGS, TEXT, VOCABULARY, make_model, make_tokenizer
from twofold.calibrate.moments import Moments
from twofold.model.structure import Member, Structure
from twofold.model.weights import find_targets
from twofold.nn.layers.sliced import SlicedLinear
from twofold.recipe import make_recipe
from twofold.run.plan import plan as plan_of
from twofold.structures.find import find_structures
from twofold.structures.mlp import CutMLP
from twofold.structures.query_key import CutQueries
from twofold.structures.units import unit_rows
from twofold.structures.value_output import CutValues
from twofold.task import TASKS
from twofold.task.text.texts import TokenWindows

IDS = torch.arange(20)[None]
KINDS = ("mlp", "value-output", "query-key")
DAMPING = 1e-2
TASK = TASKS.get("causal-lm")
SETTINGS = make_recipe({"model": "m", "keep": 0.6})


def moments_of(**inputs):
    """The moments of the layers whose inputs (T, n) are given."""
    sums = {}
    for name, x in inputs.items():
        sums |= {f"input/{name}": x.T @ x, f"input_mean/{name}": x.sum(0), f"rows/{name}": torch.tensor(float(len(x)))}
    return Moments(sums, len(x), {}, "")


def layer(m, n, bias=False):
    return nn.Linear(n, m, bias=bias, dtype=torch.float64)


def test_fewer_hidden_units_are_the_least_squares_solution():
    torch.manual_seed(0)
    block = nn.ModuleDict({"gate": layer(12, 5), "up": layer(12, 5), "down": layer(7, 12)})
    h = torch.randn(40, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    structure = Structure(
        "mlp", (Member("gate", "kept-rows", 1), Member("up", "kept-rows", 1), Member("down", "kept-columns", 1)), 12
    )
    cut = CutMLP(structure, block, moments_of(down=h), DAMPING)
    c = h.T @ h / 40
    ridge = DAMPING * c.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    scores = (c @ torch.linalg.inv(c + ridge)).diagonal()
    # Rows of the damping beside the samples: ordinary least squares then has the damped moment.
    samples = torch.cat([h / 40**0.5, ridge.sqrt()])
    down = block["down"].weight.detach()
    for units in (1, 5, 12):
        kept = scores.topk(units).indices.sort().values
        solution = torch.linalg.lstsq(samples[:, kept], samples @ down.T).solution.T
        loss = float((samples @ down.T - samples[:, kept] @ solution.T).square().sum())
        made, measured = cut.layers(units, torch.float64)
        assert made["up"].index.tolist() == made["down"].index.tolist() == kept.tolist()
        assert torch.equal(made["gate"].inner.weight, block["gate"].weight[kept])
        torch.testing.assert_close(made["down"].inner.weight.detach(), solution)
        assert float(cut.losses[units]) == pytest.approx(loss, abs=1e-9) == pytest.approx(measured, abs=1e-9)
    assert float(cut.losses[0]) == pytest.approx(float((samples @ down.T).square().sum()))


@pytest.mark.parametrize("bias", [False, True])
def test_fewer_value_dimensions_are_the_truncated_svd_of_the_product(bias):
    torch.manual_seed(0)
    heads, shared, dim, n, m = 2, 3, 4, 9, 10
    block = nn.ModuleDict({"v": layer(heads * dim, n, bias), "o": layer(m, heads * shared * dim, bias)})
    x = torch.randn(50, n, dtype=torch.float64) + 0.5
    structure = Structure("value-output", (Member("v", "kept-rows", 2), Member("o", "kept-columns", 6)), dim, 6, 2)
    cut = CutValues(structure, block, moments_of(v=x), 1e-9)
    z = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1) / 50**0.5
    v, o = block["v"], block["o"]
    columns = v.bias.detach() if bias else torch.zeros(heads * dim, dtype=torch.float64)
    values = (torch.cat([v.weight.detach(), columns[:, None]], 1) @ z.T).unflatten(0, (heads, dim))
    outputs = o.weight.detach().unflatten(1, (heads, shared, dim))
    for units in (1, 3, 4):
        made, measured = cut.layers(units, torch.float64)
        after = made["v"].to_dense() @ x.T / 50**0.5
        after = after + (made["v"].bias.detach()[:, None] / 50**0.5 if bias else 0)
        after, seen = after.unflatten(0, (heads, dim)), made["o"].to_dense().unflatten(1, (heads, shared, dim))
        loss = 0.0
        for head in range(heads):
            stack = torch.cat([outputs[:, head, q] @ values[head] for q in range(shared)])  # (shared · m, T)
            u, s, vh = torch.linalg.svd(stack, full_matrices=False)
            best = (u[:, :units] * s[:units]) @ vh[:units]
            got = torch.cat([seen[:, head, q] @ after[head] for q in range(shared)])
            torch.testing.assert_close(got.detach(), best, atol=1e-6, rtol=1e-6)
            loss += float(s[units:].square().sum())
        assert float(cut.losses[units]) == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert measured == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert made["v"].kept == 2 * units and made["o"].kept == 6 * units


@pytest.mark.parametrize("pairing", ["single", "halves", "neighbours"])
def test_fewer_query_dimensions_lose_what_the_scores_lose(pairing):
    torch.manual_seed(0)
    heads, shared, dim, n = 2, 2, 4, 6
    block = nn.ModuleDict({"k": layer(heads * dim, n, True), "q": layer(heads * shared * dim, n, True)})
    x = torch.randn(30, n, dtype=torch.float64) + 0.3
    pair = 1 if pairing == "single" else 2
    structure = Structure(
        "query-key", (Member("k", "kept-rows", 2 * pair), Member("q", "kept-rows", 4 * pair)), dim // pair, 4, 2,
        pairing=pairing,
    )  # fmt: skip
    cut = CutQueries(structure, block, moments_of(k=x, q=x), 0.0)
    first = [(0, 2), (1, 3)] if pairing == "halves" else [(0, 1), (2, 3)]
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)

    def turned(keys, turns):  # every pair of each head by its own angle; four angles give the mean of squares
        if pairing == "single":
            return keys
        keys = keys.clone()
        for dims, turn in zip(first, turns, strict=True):
            keys[..., list(dims)] = keys[..., list(dims)] @ torch.linalg.matrix_power(quarter, turn)
        return keys

    for units in range(1, dim // pair + 1):
        made, measured = cut.layers(units, torch.float64)
        q, k = block["q"](x), block["k"](x)
        q_less, k_less = made["q"](x), made["k"](x)
        assert made["k"].kept == 2 * pair * units and made["q"].kept == 4 * pair * units
        total, angles = 0.0, list(itertools.product(range(4), repeat=2)) if pair == 2 else [(0, 0)]
        for turns in angles:
            for head in range(heads * shared):
                rows, keys = (
                    slice(head * dim, head * dim + dim),
                    slice(head // shared * dim, head // shared * dim + dim),
                )
                score = q[:, rows] @ turned(k[:, keys], turns).T
                less = q_less[:, rows] @ turned(k_less[:, keys], turns).T
                total += float((score - less).detach().square().mean()) / len(angles)
        assert float(cut.losses[units]) == pytest.approx(total, rel=1e-8, abs=1e-10) == measured


def model_of(architecture):
    """A tiny model whose biases matter too."""
    model = make_model(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def structures_of(model, kinds=KINDS):
    return find_structures(model, find_targets(model), kinds, lambda: TASK.call(model, TASK.example(model)), SETTINGS)


def sizes(found):
    return sorted({(s.kind, s.units, s.pairing) for s in found.structures})


def test_structures_are_found_and_the_weights_keep_their_bits():
    for architecture, pairing in (("llama", "halves"), ("mistral", "halves"), ("qwen2", "halves"), ("opt", "single")):
        model = model_of(architecture)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = structures_of(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        hidden = {"llama": 80, "mistral": 48, "qwen2": 64, "opt": 64}[architecture]
        pairs = 4 if pairing == "halves" else 8
        assert sizes(found) == [("mlp", hidden, "single"), ("query-key", pairs, pairing), ("value-output", 8, "single")]
        assert len(found.structures) == 6 and len(found.targets) == (12 if architecture == "opt" else 14)


def reason_of(found, end):
    return next(entry.reason for entry in found.dense if entry.name.endswith(end))


def test_rotations_of_other_kinds():
    shape = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    neighbours = GPTJConfig(**shape, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4)
    partial = PhiConfig(
        **shape, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, partial_rotary_factor=0.5,
        max_position_embeddings=64,
    )  # fmt: skip
    found = []
    for config in (neighbours, partial):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        found.append(structures_of(model))
    # Pairs next to one another, of which half are not turned at all, can be cut.
    assert sizes(found[0]) == [("mlp", 128, "single"), ("query-key", 4, "neighbours"), ("value-output", 8, "single")]
    # Halves of a part of the head are no pairs (i, i + d/2).
    assert sizes(found[1]) == [("mlp", 96, "single"), ("value-output", 16, "single")]
    assert "partial rotation" in reason_of(found[1], "q_proj.weight")


def test_what_does_not_fit_stays_dense_with_the_reason():
    for architecture, reader in (("gpt2", "mlp.c_proj.weight"), ("gpt_neox", "mlp.dense_4h_to_h.weight")):
        found = structures_of(model_of(architecture))
        assert {s.kind for s in found.structures} == {"mlp"} and f"h.0.{reader}" not in {d.name for d in found.dense}
        fused = {"gpt2": "attn.c_attn.weight", "gpt_neox": "attention.query_key_value.weight"}[architecture]
        assert reason_of(found, fused) == "no partner that it could be cut together with is factorized"
    CONFIGS["qwen3"] = lambda: Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    try:
        found = structures_of(make_model("qwen3"))
    finally:
        del CONFIGS["qwen3"]
    assert {s.kind for s in found.structures} == {"mlp", "value-output"}
    assert "not joined by their dot products alone" in reason_of(found, "0.self_attn.q_proj.weight")


def test_a_norm_between_is_noticed():
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    norm = nn.LayerNorm(80)
    mlp.down_proj.register_forward_pre_hook(lambda module, args: (norm(args[0]),))
    attention = model.model.layers[1].self_attn
    other = nn.LayerNorm(16)
    attention.v_proj.register_forward_hook(lambda module, args, output: other(output))
    found = structures_of(model)
    assert sorted((s.kind, s.name.split(".")[2]) for s in found.structures) == [
        ("mlp", "1"), ("query-key", "0"), ("query-key", "1"), ("value-output", "0"),
    ]  # fmt: skip
    assert "one by one" in reason_of(found, "layers.0.mlp.up_proj.weight")
    assert "without a norm between" in reason_of(found, "layers.1.self_attn.o_proj.weight")


def test_what_is_excluded_takes_its_partners_along():
    model = make_model("llama")
    found = find_structures(
        model, find_targets(model, exclude=["*.0.mlp.up_proj", "*.1.self_attn.v_proj"]), KINDS, None, SETTINGS
    )
    assert ("mlp", "0") not in {(s.kind, s.name.split(".")[2]) for s in found.structures}
    left = found.without({"model.layers.0.self_attn.q_proj": "not called"})
    assert reason_of(left, "0.self_attn.k_proj.weight") == (
        "cut together with model.layers.0.self_attn.q_proj, which stays dense"
    )
    assert not {s.name for s in left.structures} & {d.name.removesuffix(".weight") for d in left.dense}
    with pytest.raises(twofold.TwofoldError, match="no weights of LlamaForCausalLM can be cut together"):
        find_structures(model, find_targets(model, include=["*.v_proj"]), KINDS, None, SETTINGS)


def cut(architecture="llama", keep=0.6, **settings):
    settings = {"texts": [TEXT], "tokens": 256, "window": 32, "quiet": True, "objective": "modegpt"} | settings
    if not settings.keys() & {"budget", "kl_at_most", "perplexity_at_most"}:
        settings["keep"] = keep
    return twofold.factorize(model_of(architecture), make_tokenizer(), **settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("allocate", ["global", "uniform"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_round_trip_of_every_architecture(architecture, allocate, tmp_path):
    model = cut(architecture, allocate=allocate)
    plan, layers = model.twofold_plan, {n: m for n, m in model.named_modules() if isinstance(m, SlicedLinear)}
    cut_entries = [e for e in plan.entries if e.rank is not None]
    assert {e.name for e in cut_entries} == set(layers) and len(layers) >= 2
    assert all(layers[e.name].numbers == e.numbers_after and layers[e.name].kept == e.rank for e in cut_entries)
    assert plan.keep <= 0.6 and plan.keep > 0.4
    for entry in cut_entries:
        if entry.predicted_loss:
            assert entry.measured_loss == pytest.approx(entry.predicted_loss, rel=1e-3)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    stored = {}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    floats = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert floats == plan.model_after + len(layers)
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in stored.values())
    before = logits(loaded)
    torch.testing.assert_close(logits(loaded.dequantize()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "opt"])
def test_all_units_are_the_original(architecture):
    model = model_of(architecture)
    original = logits(model)
    kept = cut(architecture, keep=1.0)
    assert all(entry.rank is None for entry in kept.twofold_plan.entries)
    assert torch.equal(logits(kept), original)
    # And so is the closed form itself, with all units in it.
    from twofold.calibrate.request import request_statistics
    from twofold.calibrate.sweep import collect_moments
    from twofold.model.streamed import Resident
    from twofold.model.weights import find_groups
    from twofold.nn.places import replace_module
    from twofold.structures.cut import prepare_cut

    found = structures_of(model)
    groups = find_groups(model, found.targets, lambda: model(input_ids=IDS))
    request = request_statistics(found.targets, groups, {"whole_input", "input_mean"})
    moments = collect_moments(
        Resident(model),
        found.targets,
        request,
        TokenWindows(IDS, "text"),
        TASK,
        empty=Moments({}, 0, groups, ""),
        quiet=True,
    )
    made = {}
    for structure in found.structures:
        made |= prepare_cut(structure, model, moments, DAMPING).layers(structure.units, torch.float32)[0]
    for name, module in made.items():
        replace_module(model, name, module)
    error = (logits(model) - original).norm() / original.norm()
    assert len(made) == len(found.targets) and error < 1e-4


def test_queries_without_a_unit_are_those_with_zeros():
    model = cut(keep=0.8, include=["*.q_proj", "*.k_proj"])
    dense = make_model()
    with torch.no_grad():
        for layer, other in zip(model.model.layers, dense.model.layers, strict=True):
            for name in ("q_proj", "k_proj"):
                part, whole = getattr(layer.self_attn, name), getattr(other.self_attn, name)
                if isinstance(part, SlicedLinear):
                    gone = sorted(set(range(len(whole.weight))) - set(part.index.tolist()))
                    assert torch.equal(part.to_dense()[part.index.long()], whole.weight[part.index.long()])
                    whole.weight[gone] = 0
    assert any(isinstance(m, SlicedLinear) for m in model.modules())
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_units_of_query_heads_follow_their_key_head():
    structure = Structure("query-key", (), 4, 4, 2, pairing="halves")
    units = torch.tensor([[0], [3]])
    assert unit_rows(structure, units, 2).tolist() == [0, 4, 11, 15]
    assert unit_rows(structure, units, 4).tolist() == [0, 4, 8, 12, 19, 23, 27, 31]


def test_budgets_overrides_and_multiples():
    model = cut(budget="90%", overrides={"*.0.mlp.up_proj": {"dense": True}, "*.1.mlp.down_proj": {"keep": 0.5}})
    plan = model.twofold_plan
    by_name = {entry.name: entry for entry in plan.entries}
    assert by_name["model.layers.0.mlp.down_proj"].rank is None and plan.keep_model <= 0.9
    assert {by_name[f"model.layers.1.mlp.{n}_proj"].rank for n in ("gate", "up", "down")} == {40}
    small = cut(budget="60KB", rank_multiple=8).twofold_plan
    assert small.bytes_after <= 60_000 and all(e.rank % 8 == 0 for e in small.entries if e.rank and "mlp" in e.name)
    with pytest.raises(twofold.TwofoldError, match=r"asks for a rank, and .*down_proj is cut together with others"):
        cut(overrides={"*.mlp.up_proj": {"rank": 3}})


def test_what_does_not_go_together_is_refused(checkpoint, text_file):
    with pytest.raises(twofold.TwofoldError, match="`allocate=energy` looks at the spectrum of each weight alone"):
        cut(allocate="energy")
    with pytest.raises(twofold.TwofoldError, match="`refine=blockwise` works on weights that are products of two"):
        cut(refine=["blockwise"])
    settings = {"keep": 0.6, "objective": "modegpt", "calibration": [str(text_file)], "stream": "always"}
    with pytest.raises(twofold.TwofoldError, match="`objective=modegpt` works on a model that is whole in memory"):
        twofold.compress(twofold.Recipe(model=str(checkpoint), **settings), checkpoint.parent / "out", quiet=True)


def test_distilled(tmp_path):
    model = cut(refine=["distill"], refine_steps=4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    plain = cut()
    first = next(n for n, m in plain.named_modules() if isinstance(m, SlicedLinear))
    notes = " ".join(model.twofold_plan.notes)
    assert "taken back" in notes or not torch.equal(
        model.get_submodule(first).inner.weight, plain.get_submodule(first).inner.weight
    )


@pytest.mark.long
def test_compress_writes_what_it_says(checkpoint, text_file, tmp_path):
    recipe = twofold.Recipe(
        model=str(checkpoint), keep=0.7, objective="modegpt", calibration=[str(text_file)], tokens=256, window=32,
        eval_windows=1,
    )  # fmt: skip
    run = twofold.compress(recipe, tmp_path / "out", quiet=True)
    assert run.keep <= 0.7 and run.quality is not None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert {settings["form"] for settings in modules.values()} == {"kept-rows", "kept-columns"}
    again = twofold.Plan.load(tmp_path / "out" / "plan.json")
    assert {e.name for e in again.entries if e.rank} == set(modules)


def test_a_wrong_size_in_a_checkpoint_is_refused(tmp_path):
    cut().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(n for n, s in modules.items() if s["form"] == "kept-rows")

    def load(settings):
        config["quantization_config"]["modules"] = {**modules, name: settings}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(twofold.TwofoldError, match="does not fit: a sliced layer"):
        load({"kept": 999, "form": "kept-rows"})
    with pytest.raises(twofold.TwofoldError, match="a whole number as how much it keeps"):
        load({"rank": 3, "form": "kept-rows"})
    with pytest.raises((RuntimeError, twofold.TwofoldError), match="mismatch"):
        load({"kept": modules[name]["kept"] - 1, "form": "kept-rows"})


def test_a_plan_without_calibration(checkpoint):
    plan = plan_of(twofold.Recipe(model=str(checkpoint), keep=0.5, objective="modegpt"), estimate=False)
    assert plan.keep <= 0.5 and {e.form for e in plan.entries} == {"kept-rows", "kept-columns"}


def test_a_part_that_is_missing_or_an_index_that_is_wrong(tmp_path):
    cut().save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    part, index = (next(name for name in good if name.endswith(end)) for end in (".inner.weight", ".index"))

    def load(tensors):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(twofold.TwofoldError, match=f"lacks 1 factors, first {part}"):
        load({name: tensor for name, tensor in good.items() if name != part})
    with pytest.raises(twofold.TwofoldError, match=f"{index} in the checkpoint does not name"):
        load({**good, index: good[index] + 100})


@pytest.mark.long
def test_compared_with_others_on_one_calibration(checkpoint, text_file, tmp_path):
    table = twofold.compare(
        {
            "model": str(checkpoint), "keep": [0.7], "objectives": ["modegpt", "dense-columns", "svd-llm"],
            "allocate": ["energy", "uniform", "global"], "calibration": [str(text_file)], "tokens": 128, "window": 32,
            "eval_windows": 1, "baselines": [],
        },
        tmp_path / "arena", quiet=True,
    )  # fmt: skip
    rows = [row for row in table.rows if row.kind == "factored"]
    skipped = [row for row in rows if row.skipped]
    assert len(rows) == 9 and {(row.objective, row.allocate) for row in skipped} == {
        ("modegpt", "energy"), ("dense-columns", "energy"),
    }  # fmt: skip
    assert all("has none" in row.skipped for row in skipped)
    assert all(row.keep <= 0.7 for row in rows if not row.skipped)


def test_a_quality_in_the_place_of_a_size():
    model = cut(perplexity_at_most="1.2x", eval_windows=1, tokens=128)
    assert model.twofold_plan.keep <= 1 and any("searched for" in note for note in model.twofold_plan.notes)
