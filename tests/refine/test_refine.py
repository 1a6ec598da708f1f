"""Refinement: training lowers the divergence, stops when it must, and goes on after a kill with the same bits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from conftest import TEXT, make_model
from runs import command, kill_program, recipe_of, run_program, same
from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.linalg.spectrum import spectrum_of, truncate, weighted_low_rank
from twofold.model.blocks import input_before
from twofold.model.head import find_head
from twofold.model.load import LoadedModel
from twofold.nn.places import dense_again
from twofold.objectives import OBJECTIVES, LayerMoments
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.refine import REFINEMENTS, Refined
from twofold.refine.steps.anchored import anchored_problem
from twofold.refine.steps.distill import distill
from twofold.refine.steps.job import Job
from twofold.refine.steps.streams import Streams
from twofold.refine.steps.teacher import Teacher
from twofold.refine.steps.training import train, trainable, training
from twofold.run.compress import compress
from twofold.run.factorize import factorize
from twofold.task import TASKS
from twofold.task.output.categorical import Categorical
from twofold.task.output.distillation import divergence
from twofold.task.text.settings import HELD_OUT
from twofold.task.text.texts import TokenWindows

CAUSAL = TASKS.get("causal-lm")


def windows_of(ids):
    return TokenWindows(ids, "random tokens")


def drawn_windows(count, length):
    return windows_of(torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0)))


def test_divergence_of_all_tokens_is_the_divergence():
    torch.manual_seed(0)
    first, second = torch.randn(5, 40), torch.randn(5, 40)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    direct = (p.exp() * (p - q)).sum(-1).mean()
    teacher = Teacher(None, "x", Categorical(40))
    teacher.ask(lambda batch: first, windows_of(torch.zeros(1, 5, dtype=torch.long)), quiet=True)
    assert divergence(second, **teacher.answer(0)) == pytest.approx(float(direct), rel=1e-5)
    few = Teacher(None, "x", Categorical(10))
    few.ask(lambda batch: first, windows_of(torch.zeros(1, 5, dtype=torch.long)), quiet=True)
    # The others as one token, by hand.
    values, tokens = p.topk(10, -1)
    own = q.gather(-1, tokens)
    rest, own_rest = 1 - values.exp().sum(-1), 1 - own.exp().sum(-1)
    by_hand = ((values.exp() * (values - own)).sum(-1) + rest * (rest / own_rest).log()).mean()
    loss = divergence(second, **few.answer(0))
    assert loss == pytest.approx(float(by_hand), rel=1e-5)
    assert 0 < loss < direct
    assert divergence(first, **few.answer(0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("top", [10, 40])
def test_loss_and_gradient_are_those_of_the_formula(share, with_head, top, monkeypatch):
    monkeypatch.setattr("twofold.task.output.distillation.ROWS", 3)  # several pieces, the last one short
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 40, bias=True).double().requires_grad_(False)
    values, tokens = torch.randn(8, 40).double().log_softmax(-1).topk(top, -1)
    labels = torch.randint(0, 40, (8,))
    labels[3] = labels[7] = -1
    states = torch.randn(8, 6 if with_head else 40).double().requires_grad_(True)
    log = (head(states) if with_head else states).log_softmax(-1)
    own = log.gather(-1, tokens)
    direct = (values.exp() * (values - own)).sum(-1)
    if top < 40:
        rest, own_rest = 1 - values.exp().sum(-1), 1 - own.exp().sum(-1)
        direct = direct + rest * (rest / own_rest).log()
    known = labels >= 0
    hard = -log[known].gather(-1, labels[known, None]).mean()
    (expected,) = torch.autograd.grad((1 - share) * direct.mean() + share * hard, states)
    loss = divergence(states, values, tokens, labels=labels, share=share, head=head if with_head else None)
    assert loss.item() == pytest.approx(float((1 - share) * direct.mean() + share * hard), rel=1e-9)
    (gradient,) = torch.autograd.grad(2 * loss, states)
    torch.testing.assert_close(gradient, 2 * expected, rtol=1e-7, atol=1e-10)


def test_head_is_found_where_its_outputs_are_the_logits():
    ids = torch.randint(0, 250, (2, 9))
    model = make_model().requires_grad_(False)

    def head_of(factor=1):
        return find_head(model, lambda: model(input_ids=ids[:1]), factor * model(input_ids=ids[:1]).logits)

    head = head_of()
    assert head is model.lm_head
    torch.testing.assert_close(head(input_before(head, lambda: model(input_ids=ids))), model(input_ids=ids).logits)
    assert head_of(3) is None  # something comes after it
    model.lm_head.requires_grad_(True)
    assert head_of() is None
    model.requires_grad_(False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert head_of() is None


@pytest.mark.long
def test_labels_teach_the_text(checkpoint):
    windows = drawn_windows(6, 24)
    losses, refined = {}, {}
    for share in (0.0, 0.9):
        dense = make_model()
        small = factorize(
            make_model(), tokenizer=tokenizer_of(checkpoint), texts=[TEXT], keep=0.5, tokens=320, window=32, quiet=True
        )
        replaced = {e.name: dense.get_submodule(e.name) for e in small.twofold_plan.entries if e.rank is not None}
        recipe = make_recipe(
            {"model": "x", "keep": 0.5, "refine_rate": 1e-2, "refine_passes": 10, "refine_labels": share}
        )
        loaded = LoadedModel(small, None, "x", None, torch.float32)
        objective = OBJECTIVES.get("two-sided")
        job = Job(
            loaded, replaced, small.twofold_plan, None, objective, windows, windows[:2], CAUSAL, recipe, quiet=True
        )
        refined[share] = distill(job)
        with torch.no_grad():
            losses[share] = float(small(input_ids=windows.ids, labels=windows.ids).loss)
    assert losses[0.9] < losses[0.0] - 0.1
    assert refined[0.9].loss_after < refined[0.9].loss_before  # of both together, as it is trained on


def test_teacher_on_disk_is_taken_up_again(tmp_path):
    torch.manual_seed(0)
    windows, table = windows_of(torch.randint(0, 30, (20, 6))), torch.randn(30, 30)
    calls = []

    def logits(batch):
        ids = batch["input_ids"]
        calls.append(ids)
        return table[ids].flatten(0, 1)

    output = Categorical(8)
    memory, disk = Teacher(None, "m", output), Teacher(tmp_path, "m", output)
    memory.ask(logits, windows, quiet=True)
    disk.ask(logits, windows, quiet=True)
    for i in (0, 15, 16, 19):
        kept = disk.answer(i)
        assert sorted(kept) == ["classes", "values"]
        assert all(torch.equal(tensor, kept[key]) for key, tensor in memory.answer(i).items())
    calls.clear()
    (tmp_path / "samples-000016.safetensors").write_bytes(b"cut short")
    Teacher(tmp_path, "m", output).ask(logits, windows, quiet=True)
    assert sum(map(len, calls)) == 4  # the second file alone
    calls.clear()
    Teacher(tmp_path, "another", output).ask(logits, windows, quiet=True)
    assert sum(map(len, calls)) == 20


@pytest.mark.long
@pytest.mark.parametrize("form", ["gauge", "plain"])
def test_distilling_lowers_the_divergence(checkpoint, text_file, tmp_path, form):
    plain = compress(recipe_of(checkpoint, text_file, refine=[], form=form), tmp_path / "closed", quiet=True)
    recipe = recipe_of(checkpoint, text_file, form=form, refine_rate=1e-2, refine_passes=6)
    run = compress(recipe, tmp_path / "out", quiet=True)
    (refined,) = run.refinement
    assert refined.loss_after < 0.8 * refined.loss_before
    assert run.quality.factored["divergence"] < 0.97 * plain.quality.factored["divergence"]
    assert run.quality.original == plain.quality.original  # the dense model is what it was
    assert (run.target_after, run.parameters_after) == (plain.target_after, plain.parameters_after)
    assert "refined by distill" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert any("refined by distill" in note for note in run.notes)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["refinement"][0]["steps"] == refined.steps
    assert not (tmp_path / "out.partial").exists()


def test_only_factors_learn(checkpoint):
    dense = make_model()
    before = {name: p.clone() for name, p in dense.named_parameters()}
    small = factorize(
        dense, tokenizer=tokenizer_of(checkpoint), texts=[TEXT], keep=0.5, tokens=320, window=32,
        refine="distill", refine_passes=1, quiet=True,
    )  # fmt: skip
    learned = trainable(small)
    changed = {name for name, p in small.named_parameters() if name not in before or not torch.equal(p, before[name])}
    assert changed == set(learned)
    assert changed and all(".reduce." in name or ".expand." in name for name in changed)
    assert all(p.requires_grad for p in small.parameters())
    assert all(p.grad is None for p in small.parameters())


def tokenizer_of(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.mark.long
def test_the_planned_steps_repeat_a_run_to_the_bit(checkpoint, text_file, tmp_path):
    first = compress(recipe_of(checkpoint, text_file, minutes=0.1, refine_passes=5), tmp_path / "a", quiet=True)
    planned = first.refinement[0].planned
    assert 1 <= planned <= 50
    second = compress(recipe_of(checkpoint, text_file, refine_steps=planned), tmp_path / "b", quiet=True)
    same(tmp_path / "a", tmp_path / "b")
    assert second.refinement[0].planned == planned
    assert second.refinement[0].steps == first.refinement[0].steps


@pytest.mark.long
def test_minutes_are_kept(checkpoint, text_file, tmp_path):
    recipe = recipe_of(checkpoint, text_file, refine_passes=100_000, minutes=0.05)
    run = compress(recipe, tmp_path / "a", quiet=True)
    assert run.refinement[0].seconds < 6
    assert run.refinement[0].steps > 1


@pytest.mark.slow
def test_killed_refinement_goes_on_with_the_same_bits(checkpoint, text_file, tmp_path, monkeypatch):
    rest = [*command(checkpoint, text_file, tmp_path / "out"), "--refine", "distill", "--refine-passes", "3"]
    whole = [*command(checkpoint, text_file, tmp_path / "whole"), "--refine", "distill", "--refine-passes", "3"]
    for point in ("*/0-distill/samples-*", "*/0-distill/distill.safetensors", "*/0-distill/distill.safetensors"):
        kill_program(rest, tmp_path / "cache", point)
        assert list((tmp_path / "out.partial").glob("refine/0-distill/samples-*"))
    for arguments in (rest, whole):
        run_program(arguments, tmp_path / "cache")
    same(tmp_path / "out", tmp_path / "whole")


def parameters():
    torch.manual_seed(1)
    return {"a": torch.nn.Parameter(torch.randn(6)), "b": torch.nn.Parameter(10 * torch.randn(3, 2))}


def training_recipe(**settings):
    return make_recipe({"model": "x", "keep": 0.5, **{f"refine_{name}": value for name, value in settings.items()}})


def test_a_training_that_diverges_gives_back_the_best(capsys):
    given = parameters()
    before = {name: p.detach().clone() for name, p in given.items()}
    losses, recipe = iter([1.0, *[5.0] * 50]), training_recipe(batch=2, passes=20, rate=0.1)

    def loss_of(windows):
        return given["a"].square().sum() + given["b"].sum()

    trained = train(given, loss_of, lambda: next(losses), recipe, windows=4, quiet=True)
    assert "diverged at step 5 of 40" in trained.ended and trained.after == 1.0
    assert all(torch.equal(p, before[name]) for name, p in given.items())
    assert "the best state was restored" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_ends_it():
    given = parameters()
    before = {name: p.detach().clone() for name, p in given.items()}
    recipe = training_recipe(batch=1, passes=2, rate=0.1)
    trained = train(given, lambda i: given["a"].sum() * float("nan"), lambda: 1.0, recipe, windows=4, quiet=True)
    assert "diverged at step 1 " in trained.ended
    assert all(torch.equal(p, before[name]) for name, p in given.items())


def test_it_stops_when_held_out_text_gains_no_more():
    given = parameters()
    losses, recipe = iter([1.0, 0.9, *[0.95] * 50]), training_recipe(batch=1, passes=20, rate=0.01)

    def loss_of(windows):
        return given["a"].square().sum() + given["b"].square().sum()

    trained = train(given, loss_of, lambda: next(losses), recipe, windows=4, quiet=True)
    assert trained.ended.startswith("no gain on held-out text since step 10 of 80") and trained.after == 0.9
    assert trained.steps == 40


@pytest.mark.long
def test_narrow_models_are_trained_in_float32(checkpoint):
    model = make_model(dtype=torch.bfloat16)
    dense = make_model(dtype=torch.bfloat16)
    small = factorize(
        model, tokenizer=tokenizer_of(checkpoint), texts=[TEXT], keep=0.5, tokens=320, window=32, quiet=True
    )
    replaced = {e.name: dense.get_submodule(e.name) for e in small.twofold_plan.entries if e.rank is not None}
    recipe = make_recipe({"model": "x", "keep": 0.5, "refine_rate": 1e-2, "refine_passes": 8})
    windows = drawn_windows(6, 24)
    loaded = LoadedModel(small, None, "x", None, torch.bfloat16)
    objective = OBJECTIVES.get("two-sided")
    job = Job(loaded, replaced, small.twofold_plan, None, objective, windows, windows[:2], CAUSAL, recipe, quiet=True)
    refined = distill(job)
    assert refined.loss_after < 0.9 * refined.loss_before
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_dense_again_is_what_the_teacher_sees(checkpoint):
    """Put the dense layers back while the teacher is asked."""
    original = make_model()
    ids = torch.arange(20)[None]
    expected = original(input_ids=ids).logits
    small = make_model()
    factorize(small, tokenizer=tokenizer_of(checkpoint), texts=[TEXT], keep=0.4, tokens=320, window=32, quiet=True)
    replaced = {e.name: original.get_submodule(e.name) for e in small.twofold_plan.entries if e.rank is not None}
    with dense_again(small, replaced):
        assert torch.allclose(small(input_ids=ids).logits, expected, atol=1e-5)
    with training(small, trainable(small)):
        before = small(input_ids=ids).logits
        with torch.no_grad():
            next(iter(trainable(small).values())).mul_(2)
        assert not torch.equal(small(input_ids=ids).logits, before)
        assert not torch.allclose(small(input_ids=ids).logits, expected, atol=1e-2)


def test_what_cannot_be_refined_is_refused(checkpoint, text_file, tmp_path):
    with pytest.raises(TwofoldError, match=r"no refinement 'magic'; choose one of anchored, blockwise, distill"):
        compress(recipe_of(checkpoint, text_file, refine="magic"), tmp_path / "o", quiet=True)
    with pytest.raises(
        TwofoldError,
        match=r"`refine=distill` works on a model that is whole in mem.*leave `refine` out, or leave `stream`",
    ):
        compress(recipe_of(checkpoint, text_file, stream="always"), tmp_path / "o", quiet=True)
    with pytest.raises(TwofoldError, match="`minutes`: input should be greater than 0"):
        recipe_of(checkpoint, text_file, minutes=-1)
    assert recipe_of(checkpoint, text_file, refine="distill,distill").refine == ["distill", "distill"]
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


@pytest.mark.long
def test_weights_alone_can_be_refined_too(checkpoint, text_file, tmp_path):
    """Refine what the svd objective, which needs no calibration, has made."""
    run = compress(
        recipe_of(checkpoint, text_file, objective="svd", refine_rate=1e-2, refine_passes=4), tmp_path / "o", quiet=True
    )
    assert run.refinement[0].loss_after < run.refinement[0].loss_before


def test_anchored_solves_the_published_problem():
    """Compare the closed form of min ‖W X − W′ X̂‖ over W′ of a rank with a direct one in float64."""
    torch.manual_seed(0)
    x = torch.randn(9, 200, dtype=torch.float64)
    own = x + 0.3 * torch.randn(9, 9, dtype=torch.float64) @ x + 0.1 * torch.randn(9, 200, dtype=torch.float64)
    inputs, cross = own @ own.T / 200, x @ own.T / 200
    for m in (6, 14):
        weight = torch.randn(m, 9, dtype=torch.float64)
        layer = LayerMoments(input=x @ x.T / 200)
        aim, problem = anchored_problem(weight, layer, inputs, cross, OBJECTIVES.get("svd-llm"), 0.0, 1.0)
        left, right = truncate(aim, spectrum_of(problem.metric, problem.gram, problem.side), problem.metric, 4)
        # Directly: least squares, then the best rank-4 approximation of the outputs that it gives.
        best = torch.linalg.lstsq(own.T, (weight @ x).T).solution.T
        u, s, v = torch.linalg.svd(best @ own, full_matrices=False)
        expected = torch.linalg.lstsq(own.T, ((u[:, :4] * s[:4]) @ v[:4]).T).solution.T
        assert torch.allclose(left @ right, expected, atol=1e-8)
        same_inputs, _ = anchored_problem(weight, layer, inputs, inputs, OBJECTIVES.get("svd-llm"), 0.01, 1.0)
        assert torch.allclose(same_inputs, weight)


def test_anchored_in_the_metric_of_the_gradients():
    """Compare both sides of a two-sided problem, from the moments of the smaller side alone, with full matrices."""
    torch.manual_seed(0)
    for m, n in ((5, 8), (8, 5)):
        weight = torch.randn(m, n, dtype=torch.float64)
        gradients = gram_of(m)
        inputs, cross = gram_of(n), gram_of(n) + 0.1 * torch.randn(n, n, dtype=torch.float64)
        trace = float(gradients.trace())
        if m <= n:
            layer = LayerMoments(input=gram_of(n), gradient=gradients, gradient_trace=trace)
        else:
            layer = LayerMoments(input_gradient=weight.T @ gradients @ weight, gradient_trace=trace)
        aim, problem = anchored_problem(weight, layer, inputs, cross, OBJECTIVES.get("two-sided"), 0.0, 0.7)
        expected = weight @ (0.7 * cross @ torch.linalg.inv(inputs) + 0.3 * torch.eye(n, dtype=torch.float64))
        assert torch.allclose(aim, expected)
        factors = truncate(aim, spectrum_of(problem.metric, problem.gram, problem.side), problem.metric, 3)
        direct = weighted_low_rank(expected, 3, gradients, inputs)
        assert torch.allclose(factors[0] @ factors[1], direct[0] @ direct[1], atol=1e-8)


def gram_of(k):
    x = torch.randn(k, 3 * k, dtype=torch.float64)
    return x @ x.T / k


@pytest.mark.long
@pytest.mark.parametrize("objective", ["two-sided", "svd-llm"])
def test_anchoring_lowers_the_divergence(checkpoint, text_file, tmp_path, objective):
    settings = {"objective": objective, "tokens": 1600, "keep": 0.3}
    plain = compress(recipe_of(checkpoint, text_file, refine=[], **settings), tmp_path / "closed", quiet=True)
    run = compress(recipe_of(checkpoint, text_file, refine="anchored", **settings), tmp_path / "o", quiet=True)
    (refined,) = run.refinement
    assert refined.method == "anchored" and refined.loss_after < refined.loss_before
    assert run.parameters_after == plain.parameters_after
    assert run.quality.factored["divergence"] < plain.quality.factored["divergence"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("refine", "points", "not_again"),
    [
        ("anchored,distill", ["*/0-anchored/block-0000*"], None),
        ("blockwise", ["*/0-blockwise/block-0000*"], None),
        ("natural-gradient", ["*/gradient-0-0*", "*/refine/0-*/round-0*", "*/gradient-1-1*"], "Gradient, half 1 of 2"),
    ],
)
def test_killed_in_its_middle_it_goes_on_with_the_same_bits(checkpoint, text_file, tmp_path, refine, points, not_again):
    flags = ["--refine", refine, "--refine-passes", "1", "--refine-rounds", "2"]
    rest = [*command(checkpoint, text_file, tmp_path / "out"), *flags]
    for point in points:
        kill_program(rest, tmp_path / "cache", point)
    for arguments in (rest, [*command(checkpoint, text_file, tmp_path / "whole"), *flags]):
        run = run_program(arguments, tmp_path / "cache")
        assert not_again is None or (not_again in run.stderr) == (arguments is not rest)
    same(tmp_path / "out", tmp_path / "whole")


def test_weights_alone_cannot_be_anchored(checkpoint, text_file, tmp_path):
    with pytest.raises(
        TwofoldError, match="`refine=anchored` looks at whole inputs, and `objective=svd` does not; use"
    ):
        compress(recipe_of(checkpoint, text_file, objective="svd", refine="anchored"), tmp_path / "o", quiet=True)
    assert not (tmp_path / "o.partial").exists()


@pytest.mark.long
@pytest.mark.parametrize("objective", ["two-sided", "svd-llm"])
def test_blockwise_lowers_the_divergence(checkpoint, text_file, tmp_path, objective):
    recipe = recipe_of(
        checkpoint, text_file, objective=objective, refine="blockwise", refine_rate=1e-2, refine_passes=4, keep=0.3
    )
    run = compress(recipe, tmp_path / "o", quiet=True)
    (refined,) = run.refinement
    assert refined.loss_after < 0.9 * refined.loss_before and refined.steps > 10
    assert not list(tmp_path.rglob("*.state"))


def spoil(job):
    """Do harm as a refinement: double every factor."""
    before = job.divergence()
    with torch.no_grad():
        for parameter in trainable(job.model).values():
            parameter.mul_(2)
    for entry in job.plan.entries:
        job.plan.entries[job.plan.entries.index(entry)] = entry.model_copy(update={"reason": "spoiled"})
    return Refined(
        method="spoil", steps=1, planned=1, tokens=1, parameters=1, seconds=0.0, unit="nats", loss_before=before,
        loss_after=job.divergence(), ended="all steps were done",
    )  # fmt: skip


@pytest.mark.long
def test_what_does_harm_is_taken_back(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(REFINEMENTS._methods, "spoil", replace(REFINEMENTS.get("distill"), name="spoil", run=spoil))
    plain = compress(recipe_of(checkpoint, text_file, refine=[]), tmp_path / "plain", quiet=True)
    run = compress(recipe_of(checkpoint, text_file, refine="spoil"), tmp_path / "o")
    (refined,) = run.refinement
    assert refined.loss_after > refined.loss_before and "taken back, since it did harm" in refined.ended
    assert "taken back" in capsys.readouterr().err
    assert run.quality.factored == plain.quality.factored
    assert "spoiled" not in (tmp_path / "o" / "plan.json").read_text(encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.long
def test_refinement_stops_on_other_windows_than_are_measured(checkpoint, text_file, tmp_path):
    for settings, count in (
        ({"refine": [], "eval_windows": 9}, HELD_OUT),
        ({"refine": "distill", "eval_windows": 9}, HELD_OUT + 9),
        ({"refine": "distill", "eval_windows": 9, "eval_text": str(text_file)}, HELD_OUT),
    ):
        assert recipe_of(checkpoint, text_file, **settings).held_out_windows == count
    # More windows to measure on than used to be set aside: some are left to stop on all the same.
    run = compress(recipe_of(checkpoint, text_file, eval_windows=9, tokens=320), tmp_path / "o", quiet=True)
    assert run.quality.windows == 9 and not any("nothing to stop" in note for note in run.notes)


@pytest.mark.long
def test_too_few_tokens_for_so_many_numbers_are_warned_of(checkpoint, text_file, tmp_path, monkeypatch):
    run = compress(recipe_of(checkpoint, text_file, refine_passes=0.1), tmp_path / "a", quiet=True)
    assert not any("by heart" in note for note in run.notes)
    monkeypatch.setattr("twofold.refine.steps.series.MANY", 1)
    few = recipe_of(checkpoint, text_file, refine_passes=0.1)
    numbers = sum(e.numbers_after for e in Plan.load(tmp_path / "a" / "plan.json").entries if e.rank is not None)
    (note,) = [n for n in compress(few, tmp_path / "b", quiet=True).notes if "by heart" in n]
    assert f"{numbers:,} numbers are trained on 640 calibration tokens, {numbers / 640:,.0f} each" in note


def test_a_model_that_gives_no_logits_is_refused_before_any_work(tmp_path, tokenizer, text_file):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(
        TwofoldError, match=r"`refine=distill` .* and BertModel gives no token logits; leave `refine` out"
    ):
        compress(recipe_of(tmp_path / "bert", text_file, task="causal-lm"), tmp_path / "o", quiet=True)
    assert not (cache_folder() / "moments").exists() and not (tmp_path / "o").exists()


def test_blocks_that_cross_one_another_are_refused_before_any_work(checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.model.blocks.ChainWatch.chain", lambda watch: None)
    for name in ("anchored", "blockwise"):
        with pytest.raises(TwofoldError, match=f"`refine={name}` .* not one block after another; use `refine=distill`"):
            compress(recipe_of(checkpoint, text_file, refine=f"distill,{name}"), tmp_path / "o", quiet=True)
    assert not (cache_folder() / "moments").exists() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_the_metric_of_a_block_is_that_of_what_it_adds(architecture):
    """Find that these blocks add their last layer's output to what comes out, and no other's of the same width."""
    model = make_model(architecture)
    streams = Streams(LoadedModel(model, None, "x", None, torch.float32), {}, drawn_windows(2, 12), CAUSAL, None)
    block = streams.chain.blocks[0]
    last = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}[architecture]
    other = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "opt": "self_attn.out_proj"}[architecture]
    assert streams.adds(f"{block}.{last}")
    assert not streams.adds(f"{block}.{other}")


def test_a_norm_after_the_layer_gives_no_metric():
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=264, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    streams = Streams(LoadedModel(model, None, "x", None, torch.float32), {}, drawn_windows(2, 12), CAUSAL, None)
    assert not streams.adds(f"{streams.chain.blocks[0]}.fc2")


@pytest.mark.long
def test_blockwise_keeps_the_minutes(checkpoint, text_file, tmp_path):
    recipe = recipe_of(checkpoint, text_file, refine="blockwise", refine_passes=100_000, minutes=0.1)
    (refined,) = compress(recipe, tmp_path / "o", quiet=True).refinement
    assert 3 < refined.seconds < 8
