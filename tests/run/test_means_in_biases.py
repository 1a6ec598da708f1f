"""Means in the biases of whole models: what is collected, what both ways write, what refinements and evidence make of it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import WhisperConfig, WhisperForCausalLM

from conftest import make_model, make_tokenizer
from runs import as_one, tensors
from twofold.allocate.sensitivity import GRID
from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.host.clock import Stopwatch
from twofold.linalg.gauge import gauge_rank
from twofold.linalg.spectrum import truncate
from twofold.model.kinds import dense_weight
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.refine.steps.series import refine
from twofold.run.check import check_methods
from twofold.run.compress import compress
from twofold.run.factorize import factorize
from twofold.run.open import open_for
from twofold.run.plan import plan as plan_of
from twofold.run.prepare import prepare
from twofold.task import TASKS
from twofold.task.output.curvature import loss_gradient


def save(folder, dtype=torch.float32):
    """A tiny GPT-2 whose biases are not zero."""
    model = make_model("gpt2", dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    model.save_pretrained(folder, max_shard_size="30KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(folder, text, **more):
    settings = {"model": str(folder), "calibration": [str(text)], "keep": 0.6, "tokens": 128, "window": 32, **more}
    return make_recipe({"centre": "always", "eval_windows": 1, **settings})


def prepared_of(folder, text, **more):
    recipe = recipe_of(folder, text, dtype="float64", **more)
    return prepare(recipe, open_for(recipe, quiet=True), Stopwatch(), quiet=True)


def means(model, names, windows):
    """The mean input and output (without its bias) of some layers."""
    sums = {}

    def keeping(name):
        def hook(module, args, output):
            y = output if module.bias is None else output - module.bias
            rows = [args[0].detach().flatten(0, -2), y.detach().flatten(0, -2), output.detach().flatten(0, -2)]
            sums.setdefault(name, []).append([part.mean(0) for part in rows])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keeping(name)) for name in names]
    for ids in windows:
        model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return {name: [torch.stack(part).mean(0) for part in zip(*calls, strict=True)] for name, calls in sums.items()}


def test_full_rank_gives_the_outputs_back_and_every_mean_is_kept(tmp_path, text_file):
    prepared = prepared_of(save(tmp_path / "model", torch.float64), text_file)
    model, windows = prepared.loaded.model, prepared.data.samples.ids
    names = [target.name for target in prepared.targets.targets]
    assert all(target.centred for target in prepared.targets.targets)
    before = means(model, names, windows)
    for name in names:
        mean, output, _ = before[name]
        problem = prepared.decomposition.problem(model, prepared.targets.targets[names.index(name)])
        torch.testing.assert_close(problem.mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dense_weight(model.get_submodule(name)) @ mean, output, rtol=1e-6, atol=1e-8)
    logits = model(input_ids=windows[:1]).logits
    full = [
        entry.model_copy(update={"rank": min(entry.out_features, entry.in_features), "form": "plain"})
        for entry in prepared.plan.entries
    ]
    _, replaced = prepared.apply(prepared.plan.model_copy(update={"entries": full}), quiet=True)
    torch.testing.assert_close(model(input_ids=windows[:1]).logits, logits, rtol=1e-5, atol=1e-6)
    for name, module in replaced.items():
        torch.testing.assert_close(model.get_submodule(name).bias, module.bias, rtol=1e-4, atol=1e-5)
    assert len(replaced) == len(names)


@pytest.mark.long
def test_block_by_block_writes_what_is_written_in_memory(tmp_path, text_file, monkeypatch):
    source, runs = save(tmp_path / "model", torch.bfloat16), {}
    for stream in ("never", "always"):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / f"cache-{stream}"))
        runs[stream] = compress(recipe_of(source, text_file, stream=stream), tmp_path / stream, quiet=True)
    as_one(tmp_path / "never", tmp_path / "always")
    assert runs["never"].fingerprint == runs["always"].fingerprint
    plan, dense, small = Plan.load(tmp_path / "always" / "plan.json"), tensors(source), tensors(tmp_path / "always")
    assert all(entry.centred for entry in plan.entries)
    for entry in plan.entries:
        old, new = dense[f"{entry.name}.bias"], small[f"{entry.name}.bias"]
        assert old.dtype == new.dtype == torch.bfloat16
        assert torch.equal(old, new) == (entry.rank is None)
    assert "take" in (note := next(note for note in plan.notes if "bias" in note)) and "mean of the inputs" in note
    assert note.split(" stand")[0] in (tmp_path / "always" / "report.html").read_text(encoding="utf-8")


def test_decoders_are_left_as_they_are_and_other_tasks_are_not(tmp_path, text_file, monkeypatch):
    """What is collected is one thing, and whether it is centred another: what auto has collected, never uses again."""
    source = save(tmp_path / "model")
    folders = cache_folder() / "moments"

    def plan(**settings):
        settings = {"objective": "svd-llm", "centre": "auto", **settings}
        planned = plan_of(recipe_of(source, text_file, **settings), quiet=True)
        return planned, len(list(folders.glob("*/moments.json")))

    plain, count = plan()
    assert count == 1 and not any(entry.centred for entry in plain.entries) and not plain.notes[1:]
    never, count = plan(centre="never")
    assert count == 1 and never == plain
    always, count = plan(centre="always")
    assert count == 2 and all(entry.centred for entry in always.entries)
    assert all(a.total_loss < b.total_loss for a, b in zip(always.entries, plain.entries, strict=True))
    monkeypatch.setattr(type(TASKS.get("causal-lm")), "centred", True)
    auto, count = plan()
    assert count == 2 and auto == always
    never, count = plan(centre="never")
    assert count == 2 and never.entries == plain.entries


def test_what_does_not_centre_says_so(checkpoint, tmp_path, text_file):
    source = save(tmp_path / "model")
    for settings, words in (
        ({"objective": "svd"}, "`objective=svd` has no second moments of the inputs as its metric"),
        ({"bits": "8"}, "the losses of integers are those of inputs as they are"),
        ({"model": str(checkpoint)}, "no weight that is factorized has a bias"),
    ):
        planned = plan_of(
            recipe_of(**{"folder": source, "text": text_file, "objective": "svd-llm", **settings}), quiet=True
        )
        assert f"`centre=always` changes nothing: {words}" in planned.notes
        assert not any(entry.centred for entry in planned.entries)
    with pytest.raises(
        TwofoldError, match=r"`objective=lite-asr` puts the means .* `centre=never` does not; leave `centre` out"
    ):
        check_methods(recipe_of(source, text_file, objective="lite-asr", centre="never"))
    with pytest.raises(TwofoldError, match=r"`bits=8` does not; leave `bits` out"):
        check_methods(recipe_of(source, text_file, objective="lite-asr", bits="8"))
    with pytest.raises(TwofoldError, match=r"`centre`: input should be 'auto', 'always' or 'never', got 'sometimes'"):
        recipe_of(source, text_file, centre="sometimes")


def test_layers_without_a_bias_are_not_centred_beside_those_that_have_one(text_file):
    """Whisper's decoder: queries, keys and values share an input, and the keys have no bias."""
    config = WhisperConfig(
        vocab_size=264, d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=4, encoder_attention_heads=4,
        decoder_ffn_dim=48, encoder_ffn_dim=48, max_target_positions=64, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        decoder_start_token_id=256, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForCausalLM(config).eval()
    texts = [text_file.read_text(encoding="utf-8")]
    small = factorize(
        model,
        make_tokenizer(),
        texts=texts,
        keep=0.6,
        tokens=128,
        window=32,
        centre="always",
        objective="svd-llm",
        quiet=True,
    )
    entries = {entry.name.rpartition("layers.0.")[2]: entry for entry in small.twofold_plan.entries}
    keys = {name for name, entry in entries.items() if not entry.bias}
    assert keys == {"self_attn.k_proj"}
    assert {entries[f"self_attn.{x}_proj"].group for x in "qkv"} == {entries["self_attn.q_proj"].group}
    assert all(entry.centred == entry.bias for entry in entries.values())


@pytest.mark.long
def test_refinements_go_on_with_the_means_in_the_biases(tmp_path, text_file):
    source = save(tmp_path / "model", torch.float64)
    prepared = prepared_of(source, text_file, refine=["anchored"], eval_windows=0, eval_text=str(text_file))
    model, windows = prepared.loaded.model, prepared.data.samples.ids
    names = [target.name for target in prepared.targets.targets]
    wanted = means(model, names, windows)
    replaced = prepared.factorize(quiet=True)
    recipe = recipe_of(source, text_file, dtype="float64", refine=["anchored"], eval_text=str(text_file))
    refined = refine(prepared, replaced, recipe, quiet=True)
    assert "taken back" not in refined[0].ended
    # In the factored model each layer gives, of its own inputs, the mean output of the dense one.
    got = means(model, list(replaced), windows)
    for name in replaced:
        torch.testing.assert_close(got[name][2], wanted[name][2], rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(got[name][0], wanted[name][0], rtol=1e-2) for name in replaced)  # of other inputs
    before = {name: model.get_submodule(name).bias.detach().clone() for name in replaced}
    recipe = recipe_of(source, text_file, dtype="float64", refine=["natural-gradient"], eval_text=str(text_file))
    refined = refine(prepared, replaced, recipe, quiet=True)
    assert refined[0].loss_after < refined[0].loss_before and "taken back" not in refined[0].ended
    assert all(torch.equal(model.get_submodule(name).bias, bias) for name, bias in before.items())


@pytest.mark.long
def test_the_moments_of_the_factored_model_are_centred_too(tmp_path, text_file):
    prepared = prepared_of(save(tmp_path / "model", torch.float64), text_file, allocate="global-iterated")
    target = prepared.targets.targets[-1]
    mean = means(prepared.loaded.model, [target.name], prepared.data.samples.ids)[target.name][0]
    mixed = prepared.decomposition.mean(target)  # of both models' inputs
    torch.testing.assert_close(mixed, mean, rtol=0.2, atol=0.1)
    assert not torch.allclose(mixed, mean, rtol=1e-4)


@pytest.mark.parametrize("allocate", ["measured", "zero-sum", "sensitivity"])
def test_what_is_measured_of_a_weight_is_of_centred_inputs(allocate, tmp_path, text_file):
    """Leaving components out changes the outputs by ΔW (x − μ)."""
    sides = {"include": ["h.1.attn.c_attn", "h.1.mlp.c_proj"], "allocate": allocate}
    prepared = prepared_of(save(tmp_path / "model", torch.float64), text_file, **sides)
    model, windows = prepared.loaded.model, prepared.data.samples.ids
    for target in prepared.targets.targets:
        module, measured = model.get_submodule(target.name), prepared.evidence.measured[target.name]
        problem = prepared.decomposition.problem(model, target)
        spectrum = prepared.decomposition.spectrum(target, problem)
        weight = dense_weight(module).detach()
        rank = spectrum.numerical_rank // 2
        left, right = truncate(weight, spectrum, problem.metric, rank)
        rest = weight - left @ right
        x, g = passed(model, module, windows, sampled=allocate == "measured")
        change = (x - problem.mean) @ rest.T
        if allocate == "measured":
            expected = float((g * change).sum(1).square().sum() / (2 * len(x)))
            assert measured[rank] == pytest.approx(expected, rel=2e-5)
        elif allocate == "zero-sum":
            assert measured[rank:].sum() == pytest.approx(-float((g * change).sum()), rel=1e-3, abs=1e-6)
        else:
            m, n = target.out_features, target.in_features
            rank = max(gauge_rank(m, n, GRID[4] * m * n), 1)
            left, right = truncate(weight, spectrum, problem.metric, rank)
            own, bias = module.weight.data, module.bias.data
            module.weight.data = (left @ right).T.contiguous()
            module.bias.data = bias + (weight - left @ right) @ problem.mean
            expected = math.exp(text_loss(model, windows[:1]))
            module.weight.data, module.bias.data = own, bias
            assert measured[4] == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def text_loss(model, windows):
    losses = [torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:]) for ids in windows]
    return float(sum(losses) / len(losses))


def passed(model, module, windows, *, sampled):
    """The inputs of a layer and the gradients at its outputs: of sampled labels by token, or of the mean loss of the text."""
    calls = []

    def keep(module, args, output):
        output.retain_grad()
        calls.append((args[0].detach().flatten(0, -2), output))

    handle = module.register_forward_hook(keep)
    labelled = sum(len(ids) - 1 for ids in windows)
    for i, ids in enumerate(windows):
        logits = model(input_ids=ids[None]).logits[0]
        if sampled:
            logits.backward(loss_gradient(logits, None, torch.Generator().manual_seed(i)))
        else:
            (torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum") / labelled).backward()
    handle.remove()
    return torch.cat([x for x, _ in calls]), torch.cat([y.grad.flatten(0, -2) for _, y in calls])
