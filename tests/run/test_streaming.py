"""Block by block from the disk: the same bits as in memory, on every architecture, after a kill, and by many processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, ModernBertConfig, ModernBertForMaskedLM

from conftest import ARCHITECTURES, CONFIGS, make_model, make_tokenizer
from runs import Program, as_one, command, environment, kill_program, run_program, same, tensors
from twofold.calibrate import sweep
from twofold.calibrate.activations import Activations
from twofold.calibrate.moments import Moments
from twofold.calibrate.opened import Opened
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError
from twofold.model.blocks import Chain, Stretch, run_stretch, stretches, watch_chain
from twofold.model.kinds import dense_weight
from twofold.model.load import LoadedModel, load_model, load_skeleton, load_streamed
from twofold.model.settings import Loading
from twofold.model.streamed import EMBEDDING, HEAD, Streamed
from twofold.model.survey import Survey, survey
from twofold.model.target import Target
from twofold.model.weights import find_targets
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.run.check import check_streamed
from twofold.run.compress import compress
from twofold.run.estimate.estimate import estimate_run
from twofold.run.estimate.fit import choose_fit, memory_limit
from twofold.run.plan import plan as plan_of
from twofold.run.status import status
from twofold.task import TASKS


def save(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny checkpoint of several shards."""
    make_model(architecture, dtype=dtype).save_pretrained(folder, max_shard_size="30KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def surveyed(loaded: LoadedModel, targets: list[Target] | None = None) -> Survey:
    """Survey a language model."""
    return survey(loaded, targets or [], TASKS.get("causal-lm").example(loaded.model))


def small(folder: Path, text: Path, **settings):
    return make_recipe({
        "model": str(folder), "keep": 0.6, "calibration": [str(text)], "tokens": 160, "window": 32, **settings,
    })  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_bits_as_in_memory(architecture, text_file, tmp_path, monkeypatch):
    source = save(tmp_path / "model", architecture)
    runs = {}
    for stream in ("never", "always"):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / f"cache-{stream}"))
        runs[stream] = compress(small(source, text_file, stream=stream), tmp_path / stream, quiet=True)
    as_one(tmp_path / "never", tmp_path / "always")
    assert runs["never"].fingerprint == runs["always"].fingerprint
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "always")
    assert torch.isfinite(loaded(input_ids=torch.arange(20)[None]).logits).all()
    assert len(list((tmp_path / "always").glob("model-*.safetensors"))) == 1 + CONFIGS[architecture]().num_hidden_layers
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


@pytest.mark.long
@pytest.mark.parametrize("settings", [
    {"objective": "svd-llm"}, {"objective": "fwsvd"}, {"objective": "asvd"}, {"objective": "svd", "allocate": "uniform"},
    {"batch_size": 2}, {"activations": "memory"}, {"form": "plain"},
    {"exclude": ["down_proj"], "overrides": {"q_proj": {"rank": 4}}},
])  # fmt: skip
def test_the_same_bits_with_every_setting(settings, text_file, tmp_path, monkeypatch):
    source = save(tmp_path / "model")
    for stream in ("never", "always"):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / f"cache-{stream}"))
        compress(small(source, text_file, stream=stream, **settings), tmp_path / stream, quiet=True)
    same(tmp_path / "never", tmp_path / "always")


@pytest.mark.long
def test_half_precision_and_large_tables(text_file, tmp_path, monkeypatch):
    """The head is multiplied in parts from its stored dtype, which may round otherwise."""
    source = save(tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.setattr("twofold.model.streamed.LARGE", 1000)
    monkeypatch.setattr("twofold.model.streamed.PART", 100)
    for stream in ("never", "always"):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / f"cache-{stream}"))
        compress(small(source, text_file, stream=stream), tmp_path / stream, quiet=True)
    one, other = tensors(tmp_path / "never"), tensors(tmp_path / "always")
    assert set(one) == set(other)
    assert all(t.dtype in (torch.bfloat16, torch.int32) for t in other.values())
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=2e-2, atol=2e-2)


@pytest.mark.long
def test_experts_are_converted_block_by_block(text_file, tmp_path, monkeypatch):
    """A checkpoint that stores its experts one by one, as hubs do, is read as transformers reads it."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    source = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    assert any(".experts.0." in name for name in tensors(source))
    for stream in ("never", "always"):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / f"cache-{stream}"))
        compress(small(source, text_file, stream=stream), tmp_path / stream, quiet=True)
    same(tmp_path / "never", tmp_path / "always")


def test_a_chain_is_run_in_stretches():
    model = make_model("mistral")
    ids = torch.arange(12)[None]
    with watch_chain(model) as watch:
        expected = model(input_ids=ids).logits
    chain = watch.chain()
    assert chain == Chain(("model.layers.0", "model.layers.1"), False)
    assert "model.embed_tokens" in watch.before() and "lm_head" not in watch.before()
    hidden = None
    for part in stretches(chain, 1):
        hidden = run_stretch(lambda: model(input_ids=ids, use_cache=False), model, part, hidden)
    assert torch.equal(hidden.logits, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())
    first, last = stretches(chain, 1)
    before = watch.before()
    assert first.holds("model.embed_tokens", before) and not first.holds("lm_head", before)
    assert last.holds("lm_head", before) and last.holds("model.layers.1.mlp.up_proj", before)
    assert Stretch().holds("anything", before)


def test_blocks_that_do_not_follow_one_another_are_no_chain():
    class Crossed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x):
            first = self.layers[0](x)
            return self.layers[2](self.layers[1](first) + first)

    model = Crossed()
    with watch_chain(model) as watch:
        model(torch.randn(2, 4))
    assert watch.chain() is None


def test_a_model_that_looks_at_its_numbers_is_told_so(tmp_path):
    config = ModernBertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=258,
        bos_token_id=256, eos_token_id=257, cls_token_id=256, sep_token_id=257,
    )  # fmt: skip
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    skeleton = load_skeleton(str(tmp_path / "model"))
    with pytest.raises(TwofoldError, match=r"^what ModernBertForMaskedLM computes depends on numbers"):
        survey(skeleton, [], TASKS.get("causal-lm").example(skeleton.model))


def test_only_what_is_held_is_in_memory(tmp_path):
    source = save(tmp_path / "model")
    chain = surveyed(load_skeleton(str(source))).chain
    loaded = load_streamed(Loading(model=str(source)), chain)
    residence = loaded.residence
    assert isinstance(residence, Streamed)
    weight = "model.layers.1.mlp.up_proj.weight"
    model = loaded.model
    assert model.get_parameter(weight).is_meta and not model.get_parameter("model.norm.weight").is_meta
    dense = make_model()
    with residence.hold(["model.layers.1", EMBEDDING]):
        assert torch.equal(model.get_parameter(weight), dense.get_parameter(weight))
        assert not model.model.embed_tokens.weight.is_meta
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").is_meta and model.lm_head.weight.is_meta
    assert all(p.is_meta for n, p in model.named_parameters() if n != "model.norm.weight")
    with pytest.raises(RuntimeError, match="ours"), residence.hold([HEAD]):
        raise RuntimeError("ours")
    assert model.lm_head.weight.is_meta


def test_a_broken_checkpoint_is_refused(tmp_path, text_file):
    source = save(tmp_path / "model")
    chain = surveyed(load_skeleton(str(source))).chain
    path = source / Shards.open(source).headers["model.layers.1.mlp.up_proj.weight"].file
    good = path.read_bytes()
    stored = load_file(path)
    stored["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(TwofoldError, match=r"model.layers.1.mlp.up_proj.weight of .* holds NaN"):
        compress(small(source, text_file, stream="always"), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    save_file(stored | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(TwofoldError, match=r"size mismatch|shape"):
        load_streamed(Loading(model=str(source)), chain)
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(TwofoldError, match=r"not whole|lacks|disagree|index"):
        load_streamed(Loading(model=str(source)), chain)
    path.write_bytes(good[:-10])
    with pytest.raises(TwofoldError, match=re.escape(path.name)):
        load_streamed(Loading(model=str(source)), chain)


def test_the_memory_decides(tmp_path, text_file):
    source = save(tmp_path / "model")
    assert choose_fit(small(source, text_file)).blocks is None
    with pytest.raises(TwofoldError, match=r"one block at a time takes about .* GB .*give it more with `memory`"):
        choose_fit(small(source, text_file, memory="1MB"))
    with pytest.raises(TwofoldError, match="must be a size in bytes"):
        choose_fit(small(source, text_file, memory="50%"))
    assert choose_fit(small(source, text_file, stream="always")).blocks == 1
    assert choose_fit(small(source, text_file, stream="always", memory="4GB")).blocks == 2


def test_the_limits_of_the_process_count(tmp_path, text_file, monkeypatch):
    """ulimit -v: what can't fit is refused before any work, and not left to fail in the middle."""
    import resource

    source = save(tmp_path / "model")
    used = psutil.Process().memory_info()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    soft = used.vms - used.rss + 100_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft) if kind == resource.RLIMIT_AS else unlimited)
    assert memory_limit(small(source, text_file)) < 110_000_000
    with pytest.raises(TwofoldError, match=r"can't be worked on with 0\.1 GB"):
        compress(small(source, text_file), tmp_path / "out", quiet=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_limit(small(source, text_file)) < 30_000_000


@pytest.mark.slow
def test_a_large_model_is_planned_from_its_configuration(tmp_path):
    """70 billion parameters: told within seconds how it would be worked on here, and what that takes."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, dtype=torch.bfloat16, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    recipe = make_recipe({"model": str(tmp_path), "keep": 0.6, "memory": "64GB"})
    found = estimate_run(Opened(load_skeleton(str(tmp_path))), recipe, 10**11)
    assert 1 <= found.blocks_at_once < 16 and found.peak_memory < 64e9
    assert found.total_seconds > 3600 and found.moments_bytes > 10**11
    with pytest.raises(TwofoldError, match="one block at a time"):
        plan_of(recipe.model_copy(update={"memory": "4GB"}), quiet=True)


def test_hidden_states_in_memory_and_on_disk(tmp_path):
    states = torch.randn(5, 3, 4)
    for path in (None, tmp_path / "s.state"):
        kept = Activations(5, path)
        kept.write(0, states[:2])
        kept.write(2, states[2:])
        assert torch.equal(kept.read(1, 4), states[1:4])
    assert kept.whole(5) and not kept.whole(6)
    kept.remove()
    assert not (tmp_path / "s.state").exists()


@pytest.mark.long
def test_killed_while_it_works_and_gone_on(text_file, tmp_path, monkeypatch):
    """Killed in each stage, whenever its state has grown, it ends with the same bits."""
    source = save(tmp_path / "model")
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "whole"))
    compress(small(source, text_file, tokens=320, stream="always", eval_windows=1), tmp_path / "fresh", quiet=True)
    cache, out = tmp_path / "cache", tmp_path / "small"
    points = ["*/moments/*/forward-*", "*/moments/*/both-*", "*.partial/spectra/spectra-*", "*.partial/spectra/spectra-*",
              "*.partial/checkpoint/model-00001*.json", "*.partial/checkpoint/model-00002*.json"]  # fmt: skip
    for point in points:
        kill_program(command(source, text_file, out, "--stream", "always"), cache, point)
        assert not out.exists()
        found = status(out)
        assert found.state == "stopped" and found.model == str(source)
    assert status(out).moments_done and status(out).decomposed > 0 and status(out).parts > 0
    done = run_program(command(source, text_file, out, "--stream", "always", "--json"), cache)
    assert json.loads(done.stdout)["moments_reused"]
    same(tmp_path / "fresh", out)
    assert status(out).state == "finished"
    assert not (tmp_path / "small.partial").exists()
    assert not list(cache.rglob("*.state"))


@pytest.mark.long
def test_an_unfinished_run_of_another_kind_is_not_touched(checkpoint, text_file, tmp_path, monkeypatch):
    out = tmp_path / "small"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("twofold.run.compress._measure", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(small(checkpoint, text_file), out, quiet=True)
    assert status(out).state == "stopped" and status(out).decomposed == 14
    with pytest.raises(TwofoldError, match=r"unfinished run with another model.*twofold status .*small --remove"):
        compress(small(checkpoint, text_file, seed=3), out, quiet=True)
    kept = [p.stat().st_mtime_ns for p in sorted((tmp_path / "small.partial").rglob("*.safetensors"))]
    assert compress(
        small(checkpoint, text_file, keep=0.7), out, quiet=True
    ).moments_reused  # spectra serve every budget
    assert kept and not (tmp_path / "small.partial").exists()
    with pytest.raises(TwofoldError, match="no unfinished run"):
        status(out, remove=True)


def test_state_can_be_removed(checkpoint, text_file, tmp_path, monkeypatch):
    out = tmp_path / "small"
    monkeypatch.setattr("twofold.run.compress._measure", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(small(checkpoint, text_file), out, quiet=True)
    status(out, remove=True)
    assert not (tmp_path / "small.partial").exists()
    with pytest.raises(TwofoldError, match="neither a finished nor an unfinished run"):
        status(out)


@pytest.mark.long
@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_stopped_in_every_sweep_and_gone_on(activations, text_file, tmp_path, monkeypatch):
    """Stopped after each batch of each sweep in turn, with what was saved then: the same moments."""
    monkeypatch.setattr("twofold.calibrate.sweep.SAVE_SECONDS", -1.0)
    source = save(tmp_path / "model")
    plan = {}
    for name, most in (("whole", 10**6), ("stopped", 7)):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / name))
        recipe = small(source, text_file, stream="always", activations=activations, eval_windows=0)
        left = [most]
        batch = sweep._Sweep._batch

        def stopping(self, *args, left=left, batch=batch):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return batch(self, *args)

        for _ in range(20):
            left[0] = most
            with monkeypatch.context() as patch:
                patch.setattr(sweep._Sweep, "_batch", stopping)
                try:
                    compress(recipe, tmp_path / f"{name}-out", quiet=True)
                    break
                except KeyboardInterrupt:
                    most += activations == "memory"  # it begins again each time
        plan[name] = tmp_path / f"{name}-out"
    same(plan["whole"], plan["stopped"])


@pytest.mark.long
def test_missing_hidden_states_are_made_again(text_file, tmp_path, monkeypatch):
    source = save(tmp_path / "model")
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "whole"))
    recipe = small(source, text_file, stream="always", eval_windows=0)
    compress(recipe, tmp_path / "fresh", quiet=True)
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr("twofold.task.output.categorical.loss_gradient", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(recipe, tmp_path / "small", quiet=True)
    (state,) = (tmp_path / "cache").rglob("*.state")
    state.write_bytes(state.read_bytes()[:100])
    compress(recipe, tmp_path / "small", quiet=True)
    same(tmp_path / "fresh", tmp_path / "small")


@pytest.mark.long
def test_two_runs_that_need_the_same_moments(text_file, tmp_path):
    """Two budgets begun together: one collects the moments, the other waits for them."""
    source = save(tmp_path / "model")
    runs = [
        Program(
            command(source, text_file, tmp_path / keep, "--stream", "always", "--json", "--keep", keep),
            tmp_path / "cache",
        )
        for keep in ("0.5", "0.6")
    ]
    ended = [run.wait() for run in runs]
    assert [run.returncode for run in ended] == [0, 0], ended
    assert sorted(json.loads(run.stdout)["moments_reused"] for run in ended) == [False, True]


def test_self_sampling_needs_the_whole_model(tmp_path):
    source = save(tmp_path / "model")
    recipe = make_recipe({"model": str(source), "keep": 0.6, "stream": "always"})
    with pytest.raises(
        TwofoldError, match=r"sampling texts .* whole in memory.*block by block; name some with `calibration="
    ):
        compress(recipe, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(("stream", "limit", "remedy"), [
    ("auto", 1e9, "give it 2.0 GB with `memory`"), ("always", 1e9, "leave `stream` out and give it 2.0 GB with `memory`"),
    ("always", 3e9, "leave `stream` out"),
])  # fmt: skip
def test_what_needs_the_whole_model_names_a_remedy_that_helps(stream, limit, remedy):
    recipe = make_recipe({"model": "m", "keep": 0.6, "stream": stream})
    with pytest.raises(TwofoldError, match=f"block by block; name some with `calibration=FILE`, or {remedy}$"):
        check_streamed(recipe, 2e9, limit)


def test_what_can_not_be_streamed_is_refused(tmp_path, monkeypatch):
    """A model that fits in memory needs no more of it, but another setting."""
    source = save(tmp_path / "model")
    monkeypatch.setattr("twofold.run.estimate.fit.survey", lambda *a: Survey(None, frozenset(), {}))
    with pytest.raises(TwofoldError, match=r"do not simply follow one another; leave `stream` out$"):
        choose_fit(make_recipe({"model": str(source), "keep": 0.6, "stream": "always"}))
    with pytest.raises(TwofoldError, match=r"0\.0 GB may be used, and .* another; give it more memory with `memory`$"):
        choose_fit(make_recipe({"model": str(source), "keep": 0.6, "memory": "1MB"}))


def test_blocks_that_get_the_embeddings_too_are_no_chain():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.layers = torch.nn.ModuleList([torch.nn.Bilinear(4, 4, 4) for _ in range(3)])

        def forward(self, ids):
            first = hidden = self.embed(ids).requires_grad_(True)
            for layer in self.layers:
                hidden = layer(hidden, first)
            return hidden

    model = Model().requires_grad_(False)
    with watch_chain(model) as watch:
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert watch.crossed and watch.chain() is None


@pytest.mark.slow
def test_two_processes_give_what_one_gives(text_file, tmp_path):
    """Under torchrun: the same plan, moments within 1e-6, the same weights within rounding."""
    source = save(tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", str(29500 + os.getpid() % 1000), "-m", "twofold"]  # fmt: skip
    for stream in ("never", "always"):
        for count in (1, 2):
            folders = [f"--moments={tmp_path / f'm-{stream}-{count}'}", f"--stream={stream}"]
            rest = command(source, text_file, tmp_path / f"{stream}-{count}", *folders)
            if count == 1:
                done = run_program(rest, tmp_path / "cache")
            else:
                done = subprocess.run(
                    [*launcher, *rest], env=environment(tmp_path / "cache"), capture_output=True, text=True
                )
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Checkpoint:") == 1
        one, two = (Moments.load(tmp_path / f"m-{stream}-{count}") for count in (1, 2))
        assert one.fingerprint == two.fingerprint and set(one.sums) == set(two.sums)
        for name in one.sums:
            scale = one.sums[name].abs().max()
            assert float((one.sums[name] - two.sums[name]).abs().max()) <= 1e-6 * float(scale), name
        first, second = (Plan.load(tmp_path / f"{stream}-{count}" / "plan.json") for count in (1, 2))
        assert [e.rank for e in first.entries] == [e.rank for e in second.entries]
        products = []
        for count in (1, 2):
            model = load_model(str(tmp_path / f"{stream}-{count}")).model
            products.append({e.name: dense_weight(model.get_submodule(e.name)) for e in first.entries})
        for name, product in products[0].items():
            torch.testing.assert_close(product, products[1][name], rtol=0, atol=1e-4)


def test_targets_of_a_streamed_model(tmp_path):
    source = save(tmp_path / "model", "gpt2")
    skeleton = load_skeleton(str(source))
    found = surveyed(skeleton, find_targets(skeleton.model).targets)
    assert found.chain is not None and len(found.chain) == 2
    loaded = load_streamed(Loading(model=str(source)), found.chain)
    assert [t.name for t in find_targets(loaded.model).targets] == [
        t.name for t in find_targets(skeleton.model).targets
    ]
