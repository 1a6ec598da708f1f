"""Stacks of blocks: told apart wherever weights are shown; each layer counts once, however often it is run."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as hf

import tiny
import twofold
from conftest import make_model
from twofold.calibrate.moments import Moments
from twofold.calibrate.opened import Opened
from twofold.calibrate.request import request_statistics
from twofold.calibrate.sweep import collect_moments
from twofold.model.blocks import plain_chain, watch_chain
from twofold.model.load import load_skeleton
from twofold.model.stacks import lists_of_blocks, stack_labels, stack_words
from twofold.model.streamed import Resident
from twofold.model.weights import find_groups, find_targets
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.report.kinds import by_kind, by_layer, depths
from twofold.run.estimate.fit import fit_of
from twofold.structures.sharing import share_bases
from twofold.task import find_task
from twofold.task.data.examples import Example, Examples
from twofold.task.output.curvature import stream


def swin() -> Any:
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return tiny.made(hf.SwinForImageClassification, config)


@lru_cache
def planned(make: Any) -> Plan:
    return twofold.factorize(make(), objective="svd", keep=0.6, quiet=True, eval_windows=0).twofold_plan


def test_stacks_are_named_by_what_tells_them_apart():
    assert stack_labels(["model.encoder.layers", "model.decoder.layers"]) == {
        "model.encoder.layers": "encoder", "model.decoder.layers": "decoder"
    }  # fmt: skip
    labels = stack_labels(["tower.stages", "tower.stages.0.blocks", "tower.stages.1.blocks", "text.layers"])
    assert list(labels.values()) == ["tower", "tower.0", "tower.1", "text"]
    assert stack_labels(["layers"]) == {"layers": ""}
    assert list(stack_words(["vision.0.blocks", "vision.1.blocks", "text.layers"]).values()) == [
        "vision",
        "vision",
        "text",
    ]


@pytest.mark.parametrize(
    ("make", "lists"),
    [
        (make_model, ["model.layers"]),
        (tiny.bert, ["encoder.layer"]),
        (tiny.bart, ["model.encoder.layers", "model.decoder.layers"]),
        (tiny.llava, ["model.vision_tower.encoder.layers", "model.language_model.layers"]),
        (swin, ["swin.encoder.layers", "swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"]),
    ],
)
def test_lists_of_blocks(make, lists):
    model = make()
    assert lists_of_blocks(model) == lists
    assert find_targets(model).stacks == (tuple(lists) if len(lists) > 1 else ())


def test_what_is_in_a_block_is_no_stack():
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )
    assert lists_of_blocks(t5) == ["encoder.block", "decoder.block"]  # each block lists its attention and MLP
    albert = hf.AlbertModel(hf.AlbertConfig(
        vocab_size=16, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    ))  # fmt: skip
    assert find_targets(albert).stacks == ()


def test_weights_of_several_stacks_are_told_apart():
    plan = planned(tiny.bart)
    assert [group.label for group in by_layer(plan)] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    kinds = {group.label: len(group.entries) for group in by_kind(plan)}
    assert kinds["encoder q_proj"] == kinds["decoder self_attn.q_proj"] == kinds["decoder encoder_attn.q_proj"] == 2
    assert len(kinds) == 6 + 10
    entry = next(e for e in plan.entries if e.name == "model.decoder.layers.1.encoder_attn.k_proj")
    assert (entry.stack, entry.layer, entry.kind) == ("model.decoder.layers", 1, "k_proj")
    assert depths(plan.entries)[entry.name] == 1
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_stages_are_told_apart_by_stage_and_block():
    plan = planned(swin)
    # The reduction behind the first stage stands in no block of it.
    assert [group.label for group in by_layer(plan)] == ["0.0", "0.1", "0", "1.0"]
    assert [group.label for group in by_kind(plan)] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "reduction"
    ]  # fmt: skip


def test_a_model_of_one_stack_says_nothing_of_it():
    plan = planned(make_model)
    assert [group.label for group in by_layer(plan)] == ["0", "1"]
    assert {group.label for group in by_kind(plan)} == {e.kind for e in plan.entries}
    assert "stack" not in plan.model_dump_json()


def test_work_in_parts_covers_all_stacks():
    names = plain_chain(tiny.bart()).blocks
    assert names == tuple(f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1))
    assert plain_chain(swin()).blocks == ("swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1",
                                          "swin.encoder.layers.1.blocks.0")  # fmt: skip
    assert plain_chain(make_model()).blocks == ("model.layers.0", "model.layers.1")


def chain_of(model: Any, batch: Any) -> Any:
    with torch.no_grad(), watch_chain(model) as watch:
        model(**batch)
    return watch.chain()


def test_a_chain_is_of_the_one_stack_that_is_run():
    model = tiny.bart()
    assert chain_of(model, find_task(model).example(model)) is None
    model = tiny.llava()
    ids = torch.arange(8)[None]
    text = ("model.language_model.layers.0", "model.language_model.layers.1")
    assert chain_of(model, {"input_ids": ids}).blocks == text


def test_an_encoder_alone_is_no_chain_of_a_model_with_a_decoder():
    """The larger list of blocks is the encoder's, and follows on from block to block."""
    config = hf.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=16, decoder_start_token_id=2,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config).eval()
    assert chain_of(model, {"input_ids": torch.arange(8)[None], "decoder_input_ids": torch.arange(4)[None]}) is None


def test_a_model_of_two_stacks_that_does_not_fit_is_refused_with_what_it_takes(tmp_path):
    tiny.bart().save_pretrained(tmp_path)
    recipe = make_recipe({"model": str(tmp_path), "keep": 0.6, "memory": "1MB"})
    opened = Opened(load_skeleton(str(tmp_path)))
    with pytest.raises(
        twofold.TwofoldError, match=r"takes about [\d.]+ GB and 0.0 GB may be used, and it can't be worked"
    ):
        fit_of(opened, recipe, 1e6)


def test_bases_are_shared_within_a_stack():
    for make in (tiny.bart, swin):
        structures = share_bases(find_targets(make()), "plain", 2, {})
        assert all(len({(t.stack, t.kind) for t in structure.targets}) == 1 for structure in structures)
        shared = [structure for structure in structures if len(structure.targets) > 1]
        assert all({t.layer for t in structure.targets} == {0, 1} for structure in shared) and shared


CROSS = "model.decoder.layers.0.encoder_attn.k_proj"


def pairs() -> Examples:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(3, 200, (1, count), generator=draw)

    made = [
        Example({"input_ids": ids(source), "decoder_input_ids": ids(target), "labels": ids(target)}, target)
        for source, target in ((5, 3), (7, 4), (6, 9))
    ]
    return Examples(tuple(made), "drawn pairs", "pairs")


def test_what_runs_once_for_a_whole_input_counts_once():
    """Keys and values of a source: C is a mean over its tokens, and G one over the predictions that all of them serve."""
    model, samples = tiny.bart().double(), pairs()
    task, targets = find_task(model), find_targets(model).targets
    groups = find_groups(model, targets, lambda: task.call(model, samples.small))
    request = request_statistics(targets, groups, {"input", "gradient"}, both_sides=True)
    empty = Moments({}, 0, groups, "mark", {})
    moments = collect_moments(Resident(model), targets, request, samples, task, empty=empty, quiet=True, seed=3)
    inputs, gradients, kept = [], [], []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append((args[0].detach(), output))

    with model.get_submodule(CROSS).register_forward_hook(keep):
        for i, batch in enumerate(samples):
            outputs = task.outputs(model, batch)
            outputs.backward(task.output.probe(outputs, task.labels(batch), stream(3, i), "sampled"))
            inputs.append(kept[-1][0].flatten(0, -2))
            gradients.append(kept[-1][1].grad.flatten(0, -2))
    x, g = torch.cat(inputs), torch.cat(gradients)
    assert len(kept) == len(samples) and len(x) == moments.rows(CROSS) == 5 + 7 + 6
    assert moments.predictions == 3 + 4 + 9
    found = moments.layer(CROSS)
    torch.testing.assert_close(found.input, x.T @ x / len(x))
    torch.testing.assert_close(found.gradient, g.T @ g / 16)


def test_keys_and_values_of_all_decoder_blocks_share_the_output_of_the_encoder():
    model = tiny.bart()
    groups = find_groups(model, find_targets(model).targets, lambda: model(**find_task(model).example(model)))
    together = {name for name, leader in groups.items() if leader == CROSS}
    assert together == {f"model.decoder.layers.{i}.encoder_attn.{kind}_proj" for i in (0, 1) for kind in "kv"}


@pytest.mark.parametrize("make", [tiny.bart, tiny.whisper])
def test_a_factored_model_writes_with_a_cache_what_it_writes_without(make):
    model = twofold.factorize(make(), objective="svd", keep=0.6, quiet=True, eval_windows=0)
    example = find_task(model).example(model)
    given = {name: tensor for name, tensor in example.items() if name != "decoder_input_ids"}
    calls = Counter()
    for name in (CROSS, CROSS.replace("encoder_attn", "self_attn")):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.update([name]))
    how = {"do_sample": False, "num_beams": 1, "min_new_tokens": 5, "max_new_tokens": 5}
    cached = model.generate(**given, **how)
    assert calls[CROSS] == 1 and calls[CROSS.replace("encoder_attn", "self_attn")] >= 5
    assert torch.equal(cached, model.generate(**given, **how, use_cache=False))


def test_inspect_tells_stacks_apart(tmp_path):
    tiny.bart().save_pretrained(tmp_path)
    inspection = twofold.inspect(str(tmp_path))
    kinds = {weight.kind for weight in inspection.weights}
    assert {"encoder fc1", "decoder fc1", "decoder q_proj", "decoder encoder_attn_layer_norm", "shared"} <= kinds
    assert sorted(map(sorted, (words.split(", ") for words in inspection.shared))) == [
        ["decoder k_proj", "decoder q_proj", "decoder v_proj"],
        ["decoder k_proj", "decoder v_proj"],
        ["encoder k_proj", "encoder q_proj", "encoder v_proj"],
    ]
