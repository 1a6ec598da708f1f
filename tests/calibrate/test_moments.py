"""Moments equal those computed by autograd in float64; they are kept, resumed and refused as they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM
from transformers.pytorch_utils import Conv1D

import twofold
from conftest import TEXT, make_model, make_tokenizer
from twofold.calibrate.moments import Moments
from twofold.calibrate.request import request_statistics
from twofold.calibrate.sweep import collect_moments
from twofold.errors import TwofoldError
from twofold.host.parts import write_part
from twofold.model.kinds import dense_weight
from twofold.model.load import LoadedModel
from twofold.model.streamed import Resident
from twofold.model.weights import find_groups, find_targets
from twofold.recipe import Recipe
from twofold.task import TASKS
from twofold.task.output.curvature import draw, loss_gradient
from twofold.task.text.sampled import beginnings, sample_texts, user_turn_prefix
from twofold.task.text.sources import wikitext_rows
from twofold.task.text.texts import spread, token_windows
from twofold.task.text.windows import calibration_windows

NEEDS = {"input", "gradient", "input_abs", "input_square", "gradient_square", "fisher_rows"}


def windows(count=3, width=24):
    return token_windows([TEXT], make_tokenizer(), tokens=count * width, window=width).samples


def collect(model, samples, needs=NEEDS, both_sides=False, **settings):
    targets = find_targets(model).targets
    groups = find_groups(model, targets, lambda: model(**samples.batch(0, 1)))
    request = request_statistics(targets, groups, needs, both_sides=both_sides)
    empty = Moments({}, 0, groups, "mark", {})
    task = TASKS.get("causal-lm")
    return targets, collect_moments(
        Resident(model), targets, request, samples, task, empty=empty, quiet=True, **settings
    )


def by_autograd(model, ids, seed, draws=1):
    """Return C and G of every target, straight from their definition: retained activations and their gradients."""
    calls_of: dict[str, list] = {}
    targets = find_targets(model).targets
    handles = []
    for target in targets:

        def keep(module, args, output, name=target.name):
            output.retain_grad()
            calls_of.setdefault(name, []).append((args[0], output))

        handles.append(model.get_submodule(target.name).register_forward_hook(keep))
    for i, window in enumerate(ids):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        for _ in range(draws):
            logits = model(input_ids=window[None]).logits
            labels = draw(torch.softmax(logits.detach(), -1)[0], generator)
            torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    tokens = ids.numel() * draws
    moments = {}
    for name, calls in calls_of.items():
        x = torch.cat([a.detach().flatten(0, -2) for a, _ in calls])
        g = torch.cat([o.grad.flatten(0, -2) for _, o in calls])
        moments[name] = (x, g, x.T @ x / tokens, g.T @ g / tokens)
    return moments


@pytest.mark.parametrize(
    ("architecture", "draws"), [("llama", 1), ("llama", 4), ("gpt2", 1), ("opt", 1), ("gpt_neox", 1)]
)
def test_moments_are_those_of_autograd(architecture, draws):
    model = make_model(architecture, dtype=torch.float64)
    samples = windows()
    ids = samples.ids
    truth = by_autograd(make_model(architecture, dtype=torch.float64), ids, seed=5, draws=draws)
    for both in (False, True):
        targets, moments = collect(model, samples, both_sides=both, seed=5, draws=draws)
        for target in targets:
            x, g, c, gg = truth[target.name]
            w = dense_weight(model.get_submodule(target.name)).detach()
            layer = moments.layer(target.name)
            close = {"rtol": 1e-6, "atol": 1e-9}
            if layer.input is not None:
                torch.testing.assert_close(layer.input, c, **close)
            if layer.output is not None:
                torch.testing.assert_close(layer.output, w @ c @ w.T, rtol=1e-6, atol=1e-7)
            if layer.gradient is not None:
                torch.testing.assert_close(layer.gradient, gg, **close)
            if layer.input_gradient is not None:
                torch.testing.assert_close(layer.input_gradient, w.T @ gg @ w, rtol=1e-6, atol=1e-8)
            assert (layer.input is not None) or (layer.output is not None)
            assert (layer.gradient is not None) or (layer.input_gradient is not None)
            assert layer.input_trace == pytest.approx(float(c.trace()), rel=1e-9)
            assert layer.gradient_trace == pytest.approx(float(gg.trace()), rel=1e-6)
            torch.testing.assert_close(layer.input_abs, x.abs().mean(0), **close)
            torch.testing.assert_close(layer.input_square, x.square().mean(0), **close)
            torch.testing.assert_close(
                layer.gradient_square, g.square().mean(0) * len(g) / (ids.numel() * draws), **close
            )
            rows = (g.square() * x.square().sum(1, keepdim=True)).mean(0)
            torch.testing.assert_close(layer.fisher_rows, rows, **close)


def test_the_smaller_side_is_collected():
    model = make_model()
    targets = find_targets(model).targets
    groups = find_groups(model, targets, lambda: model(input_ids=torch.arange(8)[None]))
    request = request_statistics(targets, groups, {"input", "gradient"})
    assert max(request.sizes["input"].values()) == 32  # never the 80-wide input of down_proj
    assert set(request.sizes["output"].values()) == {32}  # down_proj (32, 80)
    assert {n.rpartition(".")[2] for n in request.sizes["input_gradient"]} == {"gate_proj", "up_proj"}
    assert request.backward
    assert not request_statistics(targets, groups, {"input"}).backward


def test_sampled_labels_give_the_gradient_of_the_cross_entropy():
    logits = torch.randn(6, 11, requires_grad=True)
    gradient = loss_gradient(logits, None, torch.Generator().manual_seed(3))
    labels = draw(torch.softmax(logits.detach(), -1), torch.Generator().manual_seed(3))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(gradient, logits.grad)


def test_probes_have_the_covariance_of_the_gauss_newton_matrix():
    logits = torch.randn(1, 7).expand(40000, 7)
    p = torch.softmax(logits[0].double(), -1)
    v = loss_gradient(logits, None, torch.Generator().manual_seed(0), "gauss-newton").double()
    torch.testing.assert_close(v.T @ v / len(v), torch.diag(p) - torch.outer(p, p), atol=5e-3, rtol=0)


def test_probes_of_a_wide_vocabulary_look_at_the_likely_tokens_alone():
    logits = torch.randn(3, 600) * 4
    v = loss_gradient(logits, None, torch.Generator().manual_seed(0), "gauss-newton")
    likely = torch.zeros(3, 600, dtype=torch.bool).scatter_(1, logits.topk(256, -1).indices, True)
    assert (v[~likely] == 0).all() and (v[likely] != 0).all()
    torch.testing.assert_close(v.sum(-1), torch.zeros(3), atol=1e-5, rtol=0)  # a constant on all logits changes nothing


def test_empirical_gradients_are_those_of_the_text():
    logits, ids = torch.randn(2, 6, 11, requires_grad=True), torch.randint(11, (2, 6))
    labels = TASKS.get("causal-lm").labels({"input_ids": ids})
    gradient = loss_gradient(logits.flatten(0, 1), labels, torch.Generator(), "empirical")
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(gradient, logits.grad.flatten(0, 1))


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([[0.5, 0.3, 0.0, 0.2]]).expand(20000, -1)
    counts = torch.bincount(draw(probabilities, torch.Generator().manual_seed(0)), minlength=4) / 20000
    torch.testing.assert_close(counts, probabilities[0], atol=0.02, rtol=0)
    assert counts[2] == 0


def test_no_weight_gets_a_gradient_and_nothing_is_left_behind():
    model = make_model()
    collect(model, windows())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_repeats_to_the_bit_and_depends_on_the_seed():
    samples = windows()
    _, first = collect(make_model(), samples, seed=1)
    _, again = collect(make_model(), samples, seed=1)
    _, other = collect(make_model(), samples, seed=2)
    assert all(torch.equal(first.sums[k], again.sums[k]) for k in first.sums)
    assert any(not torch.equal(first.sums[k], other.sums[k]) for k in first.sums if k.startswith("gradient/"))
    assert all(torch.equal(first.sums[k], other.sums[k]) for k in first.sums if k.startswith("input/"))


def test_an_interrupted_pass_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    samples = windows(6)
    _, whole = collect(make_model(), samples)
    folder = tmp_path / "moments"
    monkeypatch.setattr("twofold.calibrate.sweep.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("twofold.task.output.categorical.loss_gradient", _fail_after(4))
    with pytest.raises(RuntimeError, match="killed"):
        collect(make_model(), samples, folder=folder)
    with safe_open(folder / ".progress.0.safetensors", "pt") as file:
        assert file.metadata()["windows"] == "4"
    with pytest.raises(TwofoldError, match="can't be read"):
        Moments.load(folder)
    calls = []
    monkeypatch.setattr(
        "twofold.task.output.categorical.loss_gradient", lambda *a: calls.append(1) or loss_gradient(*a)
    )
    _, resumed = collect(make_model(), samples, folder=folder)
    assert len(calls) == 2
    assert set(resumed.sums) == set(whole.sums)
    assert all(torch.equal(whole.sums[k], resumed.sums[k]) for k in whole.sums)
    assert sorted(p.name for p in folder.iterdir()) == ["both-0000-0001.safetensors", "moments.json"]


def _fail_after(count):
    left = [count]

    def fail(*given):
        if left[0] == 0:
            raise RuntimeError("killed")
        left[0] -= 1
        return loss_gradient(*given)

    return fail


def test_kept_and_loaded_only_where_they_belong(tmp_path):
    _, moments = collect(make_model(), windows())
    folder = tmp_path / "deep" / "moments"
    write_part(folder / "sums.safetensors", dict(moments.sums), moments.fingerprint)
    moments.finish(folder, ["sums.safetensors"])
    loaded = Moments.load(folder, "mark")
    assert loaded.predictions == moments.predictions and loaded.groups == moments.groups
    assert set(loaded.sums) == set(moments.sums)
    assert all(torch.equal(loaded.sums[k], moments.sums[k]) for k in moments.sums)
    with pytest.raises(TwofoldError, match="belong to another model"):
        Moments.load(folder, "another mark")
    part = folder / "sums.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(TwofoldError, match="can't be read"):
        Moments.load(folder, "mark")
    assert sorted(p.name for p in folder.iterdir()) == ["moments.json", "sums.safetensors"]


def test_the_layer_that_breaks_is_named():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(TwofoldError, match=r"NaN or infinity, first in model\.layers\.1\.mlp\.up_proj"):
        collect(model, windows())


def test_windows():
    tokenizer = make_tokenizer()
    data = token_windows([TEXT], tokenizer, tokens=200, window=50, held_out=2)
    assert data.samples.ids.shape == (4, 50) and data.held_out.ids.shape == (2, 50)
    assert tokenizer.decode(data.samples.ids.flatten()) == TEXT.encode()[:200].decode()
    again = token_windows([TEXT], tokenizer, tokens=200, window=50)
    fewer = token_windows([TEXT], tokenizer, tokens=150, window=50)
    assert again.samples.sha256 == data.samples.sha256 != fewer.samples.sha256
    with pytest.raises(TwofoldError, match="is empty"):
        token_windows(["", " \n"], tokenizer, tokens=200, window=50)
    with pytest.raises(TwofoldError, match="has 5 tokens, fewer than one window of 50"):
        token_windows(["short"], tokenizer, tokens=200, window=50)
    # Set aside from as much text again as is calibrated on, not from what comes right after.
    text = "".join(chr(97 + i // 26 % 26) + chr(97 + i % 26) for i in range(1000))
    apart = token_windows([text], tokenizer, tokens=400, window=50, held_out=2)
    assert apart.samples.ids.shape == (8, 50)
    assert [tokenizer.decode(ids) for ids in apart.held_out.ids] == [
        text[600:650],
        text[500:550],
    ]  # of eight places, the middle and the quarter
    for count in (1, 2, 3, 7, 8, 100):
        assert sorted(spread(count)) == list(range(count))
    assert spread(8) == [4, 2, 6, 1, 5, 3, 7, 0] and spread(0) == []
    short = token_windows(["x" * 120], tokenizer, tokens=10_000, window=50, held_out=8)
    assert short.samples.ids.shape == (1, 50) and short.held_out.ids.shape == (1, 50)


def test_wikitext_rows_are_joined_as_published_tables_do():
    assert wikitext_rows(" \n = Title = \n \n Text .\n") == "\n\n = Title = \n\n\n\n\n Text .\n"


def test_texts_sampled_from_the_model_repeat():
    model, tokenizer = make_model(), make_tokenizer()
    first = sample_texts(model, beginnings(tokenizer), sequences=3, length=20, seed=1, quiet=True)
    assert first.shape == (3, 20) and torch.equal(
        first, sample_texts(model, beginnings(tokenizer), sequences=3, length=20, seed=1, quiet=True)
    )
    assert not torch.equal(
        first, sample_texts(model, beginnings(tokenizer), sequences=3, length=20, seed=2, quiet=True)
    )
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    tokenizer.chat_template = "{% for m in messages %}<eos>{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    assert user_turn_prefix(tokenizer) == "<eos>user:"
    chat = sample_texts(model, beginnings(tokenizer), sequences=4, length=20, seed=1, quiet=True)
    assert [tokenizer.decode(row[:6]) for row in chat[1::2]] == ["<eos>user:"] * 2
    assert (chat[::2, 0] == tokenizer.bos_token_id).all()


def test_sampled_texts_of_one_kind():
    tokenizer = make_tokenizer()
    with pytest.raises(TwofoldError, match="no chat template"):
        beginnings(tokenizer, "chat")
    assert beginnings(tokenizer, "both") == beginnings(tokenizer, "plain") == [[tokenizer.bos_token_id]]
    tokenizer.chat_template = "{% for m in messages %}<eos>{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    assert [tokenizer.decode(ids) for ids in beginnings(tokenizer, "chat")] == ["<eos>user:"]
    assert beginnings(tokenizer, "plain") == [[tokenizer.bos_token_id]]
    assert beginnings(tokenizer, "both") == [*beginnings(tokenizer, "plain"), *beginnings(tokenizer, "chat")]


def test_a_recipe_says_of_which_kind(text_file):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<eos>{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    loaded = LoadedModel(make_model(), tokenizer, "tiny", None, torch.float32)

    def begin(**settings: Any) -> set[str]:
        recipe = Recipe(model="tiny", keep=0.6, tokens=160, window=20, **settings)
        data = calibration_windows(loaded, recipe, "mark", held_out=recipe.held_out_windows, quiet=True)
        assert data.samples.ids.shape == (8, 20)
        ids = (data.samples + data.held_out).ids
        return {"chat" if tokenizer.decode(row[:6]) == "<eos>user:" else "plain" for row in ids}

    assert begin() == {"plain", "chat"}
    assert begin(self_texts="plain") == {"plain"}
    assert begin(self_texts="chat") == {"chat"}
    with pytest.raises(TwofoldError, match="there are calibration texts"):
        begin(self_texts="plain", calibration=[str(text_file)])


def test_conv1d_is_seen_in_the_right_layout():
    model = make_model("gpt2")
    target = next(t for t in find_targets(model).targets if t.kind == "c_fc")
    module = model.get_submodule(target.name)
    assert isinstance(module, Conv1D)
    x = torch.randn(4, target.in_features)
    torch.testing.assert_close(module(x), x @ dense_weight(module).T + module.bias)


def test_shared_layers_count_every_call_once():
    """Sum tr(G_c ΔW C_c ΔWᵀ) over the calls of ALBERT, which calls one set of layers many times."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=264, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = AlbertForMaskedLM(config).double().eval()
    samples = windows()
    targets, moments = collect(model, samples)
    shared = next(t for t in targets if t.name.endswith("attention.query"))
    once = next(t for t in targets if t.name.endswith("embedding_hidden_mapping_in"))
    assert moments.rows(shared.name) == 4 * samples.predictions and moments.rows(once.name) == samples.predictions
    x = moments.sums[f"input/{moments.groups[shared.name]}"]
    torch.testing.assert_close(moments.layer(shared.name).input, x / (4 * samples.predictions))
    g = moments.sums[f"gradient/{shared.name}"]
    torch.testing.assert_close(moments.layer(shared.name).gradient, g / samples.predictions)


def test_layers_that_take_no_part_are_left_dense():
    model = make_model()
    model.model.layers[0].unused = torch.nn.Linear(64, 64)
    head = torch.nn.Linear(32, 32)
    model.model.layers[0].ignored = head
    whole = model.model.layers[0].forward

    def with_an_aside(*args, **kwargs):
        output = whole(*args, **kwargs)
        head(output[0] if isinstance(output, tuple) else output)
        return output

    model.model.layers[0].forward = with_an_aside
    result = twofold.factorize(model, make_tokenizer(), keep=0.7, texts=[TEXT], tokens=64, window=32, quiet=True)
    reasons = {d.name: d.reason for d in result.twofold_plan.dense}
    assert "not called" in reasons["model.layers.0.unused.weight"]
    assert "no gradient reaches it" in reasons["model.layers.0.ignored.weight"]
    assert len(result.twofold_plan.entries) == 14


def test_a_head_gets_its_inputs_without_gradients_too():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    targets, moments = collect(BertForMaskedLM(config).eval(), windows(), needs={"input"})
    assert all(moments.rows(t.name) == 72 for t in targets)
