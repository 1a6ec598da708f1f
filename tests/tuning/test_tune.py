"""Fine-tuning end to end on a tiny model: every method, kills, faults; and the bound on the factors' steps."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import twofold.cli
from conftest import TEXT, make_model, make_tokenizer
from factored import factored_model, with_lora
from runs import Program
from twofold.errors import TwofoldError
from twofold.host.folders import check_output
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.quantized import QuantizedLinear
from twofold.nn.layers.tied import TiedLinear
from twofold.run.factorize import factorize
from twofold.scratch.bound import BoundedUpdate, product_norm, spectral_norm
from twofold.settings.sizes import parse_bytes
from twofold.tuning.directions import split_directions
from twofold.tuning.estimate import choose, estimate
from twofold.tuning.fused import fuse_lora
from twofold.tuning.head import row_head
from twofold.tuning.prepare import prepare
from twofold.tuning.record import TuneRun
from twofold.tuning.rows import read_rows
from twofold.tuning.run import tune
from twofold.tuning.settings import make_settings
from twofold.tuning.tokens import Example, encode_rows
from twofold.tuning.trainer import RowTrainer, as_dataset, disk_errors, last_whole, packed

ROWS = [{"prompt": f"Say {i}: ", "completion": f"it is {3 * i}."} for i in range(24)]
QUICK: dict[str, object] = {"steps": 6, "batch": 4, "rank": 4, "length": 128, "learning_rate": 1e-2, "held_out": 4,
    "evaluate_every": 3, "save_every": 3}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Leave the file of the curve empty, but in the tests marked ``whole``."""
    if "whole" not in request.keywords:
        monkeypatch.setattr("twofold.tuning.run.draw_curve", lambda _, path: path.touch())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a factored one, and rows."""
    folder = tmp_path_factory.mktemp("tune")
    for name, model in (("dense", make_model()), ("factored", factored_model(rank=8))):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def run(place: Path, out: Path, model: str = "dense", **given: object) -> TuneRun:
    settings = {"model": str(place / model), "data": [str(place / "rows.jsonl")], **QUICK, **given}
    return tune(make_settings(settings), out, quiet=True)


def load(place: Path, out: Path, model: str) -> Any:
    if (out / "adapter_config.json").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / model), out).eval()
    return AutoModelForCausalLM.from_pretrained(out).eval()


@torch.no_grad()
def held_out_loss(model: Any, place: Path) -> float:
    """By the logits, with none of the code that the training uses."""
    rows = encode_rows(read_rows([str(place / "rows.jsonl")]).rows, make_tokenizer(), length=128, held_out=4)
    total = count = 0.0
    for one in rows.held_out:
        logits = model(input_ids=torch.tensor([one.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(one.labels[1:])
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


METHODS = [
    *(("dense", m) for m in ("lora", "rslora", "dora", "pissa", "olora", "corda", "eva", "vera", "adalora", "full")),
    *(("factored", m) for m in ("lora", "eva", "factors", "factors-top", "factors-tail", "full")),
]


@pytest.mark.long
@pytest.mark.parametrize(("model", "method"), METHODS)
def test_what_is_written_is_what_was_trained(model: str, method: str, place: Path, tmp_path: Path) -> None:
    kept = {"save_every": None} if method == "adalora" else {}
    record = run(place, tmp_path / "out", model, method=method, **kept)
    assert record.held_out_before == pytest.approx(held_out_loss(load(place, place / model, model), place), abs=1e-5)
    tuned = load(place, tmp_path / "out", model)
    assert record.held_out_after == pytest.approx(held_out_loss(tuned, place), abs=1e-5)
    assert record.held_out_after is not None and record.held_out_before is not None
    assert record.held_out_after < record.held_out_before - 1e-3
    assert [point.step for point in record.curve] == [1, 2, 3, 4, 5, 6]
    assert record.held_out_curve[0].step == 0 and record.held_out_curve[-1].step == 6
    assert {m.rank for m in tuned.modules() if isinstance(m, FactoredLinear)} == ({8} if model == "factored" else set())
    if method == "factors":  # and nothing else
        before = dict(load(place, place / model, model).named_parameters())
        changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
        assert changed and all(".reduce." in n or ".expand." in n for n in changed)
        assert record.trainable < record.parameters
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"run.json", "loss.svg", "README.md", "tokenizer.json"} <= files
    assert not (tmp_path / "out.partial").exists()
    assert TuneRun.model_validate_json((tmp_path / "out" / "run.json").read_text()) == record
    check_output(tmp_path / "out", overwrite=True)  # ours, so it may be replaced


@pytest.mark.long
@pytest.mark.parametrize("packing", [False, True])
def test_the_configuration_of_the_base_is_kept(packing: bool, tmp_path: Path) -> None:
    """The tokenizer ends, begins and pads otherwise; what the rows are padded with is no matter of the model."""
    model, tokenizer = make_model(), make_tokenizer()
    model.config.pad_token_id, model.generation_config.pad_token_id = None, 7
    tokenizer.bos_token = tokenizer.pad_token = "!"
    tokenizer.eos_token = "?"
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(tmp_path, tmp_path / "out", method="full", steps=1, save_every=1, evaluate_every=1, packing=packing)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "out"))
    assert {**after, "use_cache": before["use_cache"]} == before
    before, after = ((tmp_path / name / "generation_config.json").read_bytes() for name in ("dense", "out"))
    assert after == before


@pytest.mark.long
def test_packed_rows_do_not_see_each_other(place: Path, tmp_path: Path) -> None:
    examples = [Example([5, 6, 7, 8], [5, 6, 7, 8]), Example([9, 10, 11], [-100, 10, 11]), Example([1, 2], [1, 2])]
    windows = packed(examples, 7)
    assert sorted(len(ids) for ids in windows["input_ids"]) == [2, 7]
    # One step of all rows, packed and not, has one loss and one gradient: so one step gives the same weights.
    given = {"steps": 1, "batch": 20, "method": "full", "warmup": 0.0}
    apart = run(place, tmp_path / "apart", **given)
    together = run(place, tmp_path / "together", **{**given, "packing": True, "batch": 4, "micro_batch": 2})
    assert together.windows < apart.windows
    small = prepare(
        make_settings({"model": str(place / "dense"), "data": [str(place / "rows.jsonl")], **QUICK, "packing": True})
    )
    assert len(small.windows) == together.windows <= 4  # so the one step sees all rows
    assert together.curve[0].loss == pytest.approx(apart.curve[0].loss, rel=1e-5)
    first, second = (load(place, tmp_path / name, "dense") for name in ("apart", "together"))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        # AdamW's first step is the rate times a sign: where a gradient is nearly zero it may differ
        assert ((one - other).abs() > 1e-4).float().mean() < 0.01


COMMAND = ["--steps", "9", "--batch", "4", "--micro-batch", "2", "--rank", "4", "--length", "128", "--learning-rate", "0.01",
           "--save-every", "2", "--dropout", "0.1", "--held-out", "4", "--quiet"]  # fmt: skip


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_weights(place: Path, tmp_path: Path) -> None:
    command = ["tune", place / "dense", "--data", place / "rows.jsonl", *COMMAND, "--out", tmp_path / "out"]
    program = Program(command, tmp_path / "cache")
    seen = tmp_path / "out.partial" / "tune" / "checkpoint-4"  # killed while it is written, or just after
    while not seen.exists() and program.process.is_alive():
        time.sleep(0.001)
    program.send(signal.SIGKILL)
    killed = program.wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {path.parent.name for path in (tmp_path / "out.partial" / "tune").glob("*/whole.json")}
    assert not (tmp_path / "out").exists() and "checkpoint-2" in kept
    resumed, whole = (
        tune(
            make_settings(
                {"model": str(place / "dense"), "data": [str(place / "rows.jsonl")], "steps": 9, "batch": 4, "micro_batch": 2,
                 "rank": 4, "length": 128, "learning_rate": 0.01, "save_every": 2, "dropout": 0.1, "held_out": 4.0}
            ),
            tmp_path / name,
            quiet=True,
        )
        for name in ("out", "uninterrupted")
    )  # fmt: skip
    assert resumed.resumed in (2, 4) and whole.resumed == 0
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "uninterrupted"))
    assert one == other
    assert resumed.curve == whole.curve and resumed.held_out_curve == whole.held_out_curve


@pytest.mark.long
def test_a_run_with_other_settings_does_not_go_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twofold.tuning import run as module

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_curve", stop)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / "out")
    with pytest.raises(TwofoldError, match="unfinished run with another"):
        run(place, tmp_path / "out", seed=3)
    assert run(place, tmp_path / "out").resumed == 6


@pytest.mark.long
def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_state(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twofold.tuning.trainer import RowTrainer

    compute = RowTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(RowTrainer, "compute_loss", broken)
    with pytest.raises(
        TwofoldError, match=r"loss is not a finite number at step 4.*state of step 3 is kept in .*`learning_rate`"
    ):
        run(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    good = tmp_path / "out.partial" / "tune" / "last-good"
    kept = load(place, good, "dense")
    assert all(bool(torch.isfinite(p).all()) for p in kept.parameters())
    monkeypatch.undo()
    expected = run(place, tmp_path / "three", steps=6)
    at_three = next(point.loss for point in expected.held_out_curve if point.step == 3)
    assert held_out_loss(kept, place) == pytest.approx(at_three, abs=1e-5)


@pytest.mark.long
def test_a_gradient_that_is_infinite_stops_before_the_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twofold.tuning.trainer import RowTrainer

    step = RowTrainer.training_step

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(RowTrainer, "training_step", broken)
    with pytest.raises(TwofoldError, match="a gradient is not finite at step 2"):
        run(place, tmp_path / "out")


@pytest.mark.slow
def test_no_space_for_a_checkpoint(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import torch.serialization

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(TwofoldError, match="no space for"):
            run(place, tmp_path / "out", save_every=1)
    write = torch.save
    full = OSError(28, "No space left on device")

    def fill(obj: object, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-3" in str(path):
            raise full
        write(obj, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(TwofoldError, match=r"no space for a checkpoint in .*checkpoint-2 is kept: free some space"):
            run(place, tmp_path / "out", save_every=1)
    assert run(place, tmp_path / "out", save_every=1).resumed == 2
    with pytest.raises(ValueError, match="other"), disk_errors(tmp_path):
        raise ValueError("other")


def test_half_written_checkpoints_are_not_taken(tmp_path: Path) -> None:
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "whole.json").write_text("{}")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_whole(tmp_path / "none") is None


@pytest.mark.long
@pytest.mark.whole
def test_it_stops_early_and_keeps_the_best(place: Path, tmp_path: Path) -> None:
    record = run(
        place, tmp_path / "out", steps=40, patience=2, evaluate_every=2, save_every=2, learning_rate=0.3, method="full"
    )
    assert record.steps < 40 == record.steps_planned
    assert "held-out rows" in (tmp_path / "out" / "loss.svg").read_text() and record.samples[0].factored
    assert record.held_out_after == pytest.approx(min(p.loss for p in record.held_out_curve[1:]), abs=1e-5)
    with pytest.raises(TwofoldError, match="`patience` needs held-out rows"):
        run(place, tmp_path / "x", patience=1, held_out=0)


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("dense", {"method": "factors"}, "factorize it first"),
        ("factored", {"method": "dora"}, "needs the dense weight"),
        ("dense", {"include": ["nothing*"]}, "matches no linear layer"),
        ("dense", {"exclude": ["*"]}, "no layer is left to train"),
        ("dense", {"memory": "10MB"}, "are too little: the smallest way takes"),
        ("dense", {"memory": "90M"}, "`memory` must be a size in bytes"),
        ("dense", {"data": ["missing.jsonl"]}, "there is no file"),
        ("dense", {"length": 12}, "tokens, more than the 12"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: str, given: dict[str, object], said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(TwofoldError, match=said):
        run(place, tmp_path / "out", model, **given)
    assert not list(tmp_path.iterdir())


def test_the_estimate_counts_what_is_kept(place: Path) -> None:
    settings = make_settings({"model": str(place / "dense"), "data": ["x"], "method": "full", "batch": 4})
    one = estimate(settings, longest=64, mean=32, steps=10, speed=1e9)
    assert one.weights == one.gradients == one.optimizer // 2 == 4 * one.parameters
    model = make_model().train()
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(1, 64, dtype=torch.int64), use_cache=False)
    assert one.activations == pytest.approx(
        sum(kept.values()), rel=0.2
    )  # without numbers the attention keeps its mask, too
    lora = estimate(settings.model_copy(update={"method": "lora"}), longest=64, mean=32, steps=10, speed=1e9)
    assert lora.gradients + lora.optimizer < one.gradients + one.optimizer
    assert lora.trainable == sum(p.numel() for n, p in with_lora(make_model(), 16).named_parameters() if "lora_" in n)
    again = estimate(
        settings.model_copy(update={"gradient_checkpointing": True}), longest=64, mean=32, steps=10, speed=1e9
    )
    assert again.activations < one.activations and again.step_seconds > one.step_seconds
    enough, found = choose(settings, one.memory + 2**26, longest=64, mean=32, steps=10)
    assert enough.method == "full" and found.memory <= one.memory + 2**26
    assert parse_bytes("4GB", "memory") == 4e9


def test_splitting_directions_changes_nothing_at_the_start() -> None:
    ids = torch.arange(20)[None]
    for leading in (True, False):
        model = factored_model(rank=6)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            name = "model.layers.1.mlp.gate_proj"
            values = torch.linalg.svdvals(model.get_submodule(name).to_dense(torch.float64))[:6]
            adapted = split_directions(model, [name], 2, leading=leading)
            torch.testing.assert_close(adapted(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
            layer = model.get_submodule(name)
            moved = torch.linalg.svdvals((layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double())[:2]
        torch.testing.assert_close(moved, values[:2] if leading else values[-2:], rtol=1e-4, atol=1e-5)
        assert layer.base_layer.rank == 4


@pytest.mark.parametrize("form", ["plain", "rows", "columns"])
def test_a_step_changes_the_product_by_no_more_than_the_bound(form: Any) -> None:
    torch.manual_seed(0)
    for rate, bound in ((1e-1, 0.01), (1e-6, 0.01)):
        layer = FactoredLinear.from_factors(torch.randn(20, 4).double(), torch.randn(4, 30).double(), form=form)
        before = layer.to_dense().clone()
        exact = torch.linalg.matrix_norm(before, 2)
        assert product_norm(layer) == pytest.approx(float(exact), rel=0.1)
        assert spectral_norm(layer.reduce.weight) == pytest.approx(
            float(torch.linalg.matrix_norm(layer.reduce.weight, 2)), rel=0.1
        )
        hook = BoundedUpdate({"layer": layer}, bound)
        optimizer = torch.optim.AdamW([layer.reduce.weight, layer.expand.weight], lr=rate, weight_decay=0.0)
        hook.attach(optimizer)
        for _ in range(3):
            layer(torch.randn(8, 30).double()).square().sum().backward()
            old = layer.to_dense().clone()
            optimizer.step()
            optimizer.zero_grad()
            change = torch.linalg.matrix_norm(layer.to_dense() - old, 2)
            assert change <= 1.15 * bound * torch.linalg.matrix_norm(
                old, 2
            )  # norms by iteration are right to some percent
        assert hook.shortened == (3 if rate == 1e-1 else 0)
        assert not torch.equal(layer.to_dense(), before)


def test_rows_as_a_data_set() -> None:
    assert as_dataset([Example([1, 2], [-100, 2])]).to_list() == [{"input_ids": [1, 2], "labels": [-100, 2]}]


@pytest.mark.long
def test_the_command_says_what_it_would_take_and_what_is_wrong(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*given: object) -> tuple[int, str, str]:
        rows = place / "rows.jsonl" if "--data" not in given else None
        data = ["--data", str(rows)] if rows is not None else []
        command = ["twofold", "tune", str(place / "dense"), *data, *map(str, given), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        try:
            twofold.cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, _ = command("--dry-run", "--json")
    assert code == 0 and json.loads(out)["memory"] > 1e8 and not list(tmp_path.iterdir())
    code, out, _ = command("--dry-run")
    assert code == 0 and "in all" in out and "Method lora" in out
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    code, _, said = command("--data", tmp_path / "bad.jsonl")
    assert code == 2 and len(said.strip().splitlines()) == 1 and 'line 1: there is no "completion"' in said
    code, out, said = command("--steps", 2, "--batch", 2, "--held-out", 2)
    assert code == 0 and "held-out loss after" in out and "22 rows to train on, 2 held out" in said
    monkeypatch.delattr(twofold, "tune")  # as in a process that has not asked for it yet
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, said = command("--steps", 2)
    assert code == 2 and "pip install 'twofold[tune]'" in said


@pytest.mark.parametrize("pattern", ["rows.jsonl", "*.jsonl", "~/ours/rows.jsonl", "~/ours/*.jsonl"])
def test_the_rows_are_not_replaced_by_the_output(
    pattern: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "run.json").write_text(json.dumps({"kind": "tune"}))
    (ours / "rows.jsonl").write_text((place / "rows.jsonl").read_text())
    source = pattern if pattern.startswith("~") else str(ours / pattern)
    settings = make_settings({"model": str(place / "dense"), "data": [source], **QUICK})
    with pytest.raises(TwofoldError, match="which this run reads"):
        tune(settings, ours, overwrite=True, quiet=True)
    assert (ours / "rows.jsonl").is_file()


@pytest.mark.long
def test_a_run_that_fails_early_leaves_nothing_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(TwofoldError, match="no space for"):
            run(place, tmp_path / "out")
    with pytest.raises(TwofoldError, match="`save_every` that is a multiple"):  # steps are known from the rows alone
        run(place, tmp_path / "out", steps=None, epochs=10, patience=1, evaluate_every=None)
    with monkeypatch.context() as patch:
        patch.setattr("twofold.tuning.trainer.RowTrainer.held_out_loss", lambda self: float("nan"))
        with pytest.raises(TwofoldError, match="is not finite"):
            run(place, tmp_path / "out")

    def fail(*args: object, **kwargs: object) -> None:
        raise TwofoldError("in the first step")

    with monkeypatch.context() as patch:
        patch.setattr("twofold.tuning.trainer.RowTrainer.training_step", fail)
        with pytest.raises(TwofoldError, match="in the first step"):
            run(place, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert run(place, tmp_path / "out", steps=1, save_every=1, evaluate_every=1).steps == 1  # other settings


@pytest.mark.long
@pytest.mark.parametrize(("model", "method"), [("factored", "factors-tail"), ("dense", "pissa")])
def test_the_last_good_state_is_as_the_finished_one(
    model: str, method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twofold.tuning.trainer import RowTrainer

    compute = RowTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    with monkeypatch.context() as patch:
        patch.setattr(RowTrainer, "compute_loss", broken)
        with pytest.raises(TwofoldError, match="state of step 3 is kept in"):
            run(place, tmp_path / "out", model, method=method)
    kept = load(place, tmp_path / "out.partial" / "tune" / "last-good", model)
    expected = run(place, tmp_path / "three", model, method=method)
    at_three = next(point.loss for point in expected.held_out_curve if point.step == 3)
    assert held_out_loss(kept, place) == pytest.approx(at_three, abs=1e-5)


@pytest.mark.long
def test_patience_goes_on_where_it_was(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {"steps": 40, "patience": 2, "evaluate_every": 2, "save_every": 2, "learning_rate": 0.3}
    whole = run(place, tmp_path / "whole", method="full", **given)
    assert whole.steps < 40
    stop = whole.steps  # one look without a better loss is counted before it
    write = torch.save

    def fill(obj: object, path: Any, *args: Any, **kwargs: Any) -> None:
        if f"checkpoint-{stop}" in str(path):
            raise OSError(28, "No space left on device")
        write(obj, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(TwofoldError, match="no space for a checkpoint"):
            run(place, tmp_path / "out", method="full", **given)
    resumed = run(place, tmp_path / "out", method="full", **given)
    assert 0 < resumed.resumed < stop and resumed.steps == whole.steps
    assert resumed.held_out_after == whole.held_out_after


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Factorized models whose factors, embeddings and output layers are integers; Mistral's output layer is its own."""
    folders = {}
    for name in ("llama", "mistral"):
        folder = tmp_path_factory.mktemp(name)
        given: dict[str, Any] = {"keep": 0.6, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True}
        factorize(make_model(name), make_tokenizer(), bits=4, dense_bits=8, **given).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "method", "head"),
    [
        ("llama", "lora", TiedLinear),
        ("llama", "rslora", TiedLinear),
        ("llama", "eva", TiedLinear),
        ("mistral", "lora", QuantizedLinear),
    ],
)
def test_an_adapter_is_trained_beside_integers(
    model: str, method: str, head: type, rounded: dict[str, str], place: Path, tmp_path: Path
) -> None:
    folder = rounded[model]
    record = run(place, tmp_path / "out", folder, method=method)
    before = load(place, Path(folder), folder)
    assert isinstance(before.get_output_embeddings(), head)  # TRL multiplies by the weight of this layer itself
    assert record.held_out_before == pytest.approx(held_out_loss(before, place), abs=1e-5)
    tuned = load(place, tmp_path / "out", folder)
    assert record.held_out_after == pytest.approx(held_out_loss(tuned, place), abs=1e-5)
    assert record.held_out_after is not None and record.held_out_after < record.held_out_before - 1e-3
    assert record.trainable == sum(p.numel() for n, p in tuned.named_parameters() if "lora" in n)
    codes = [n for n, _ in before.named_buffers() if n.endswith("codes")]
    assert codes and all(
        torch.equal(before.get_buffer(n), tuned.get_base_model().get_buffer(_inside(tuned, n))) for n in codes
    )


def _inside(tuned: Any, name: str) -> str:
    """A buffer of the model of before in the model with an adapter."""
    (found,) = (n for n, _ in tuned.get_base_model().named_buffers() if n.replace(".base_layer", "") == name)
    return str(found)


@pytest.mark.parametrize("method", ["factors", "factors-top", "full"])
def test_integers_are_not_trained(method: str, rounded: dict[str, str], place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TwofoldError, match=r"is kept in integers \(`bits`\), and `method=.*` can't train these; take lora"
    ):
        run(place, tmp_path / "out", rounded["llama"], method=method)


def test_integers_are_unpacked_again_in_the_backward_pass() -> None:
    torch.manual_seed(0)
    layer = IntLinear.of(torch.randint(-7, 8, (96, 64)), torch.rand(96, 1) + 0.5, 4, None)
    x = torch.randn(3, 5, 64, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x)
    assert not kept  # neither the weight, nor the inputs
    gradient = torch.randn_like(y)
    y.backward(gradient)
    dense = x.detach().clone().requires_grad_(True)
    F.linear(dense, layer.weight).backward(gradient)
    assert torch.equal(y, F.linear(x, layer.weight)) and torch.allclose(x.grad, dense.grad)  # type: ignore[arg-type]


OPTIMIZERS = [("dense", "full", "adafactor"), ("factored", "factors-top", "adafactor"), ("dense", "lora", "adafactor")]
OPTIMIZERS += [("dense", "full", "galore"), ("dense", "full", "apollo"), ("factored", "full", "galore")]


@pytest.mark.long
@pytest.mark.parametrize(("model", "method", "optimizer"), OPTIMIZERS)
def test_an_optimizer_with_a_small_state(
    model: str, method: str, optimizer: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[Any, dict[str, Any]]] = []
    write = RowTrainer.train

    def train(self: RowTrainer, *args: Any, **kwargs: Any) -> Any:
        result = write(self, *args, **kwargs)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        states.append({tuple(p.shape): state for p, state in inner.state.items()})
        return result

    monkeypatch.setattr(RowTrainer, "train", train)
    projected: dict[str, Any] = {} if optimizer == "adafactor" else {"optimizer_rank": 4, "save_every": None}
    record = run(place, tmp_path / "out", model, method=method, optimizer=optimizer, learning_rate=3e-3, **projected)
    tuned = load(place, tmp_path / "out", model)
    assert record.held_out_after == pytest.approx(held_out_loss(tuned, place), abs=1e-5)
    assert record.held_out_after is not None and record.held_out_before is not None
    assert record.held_out_after < record.held_out_before - 1e-3
    if optimizer == "adafactor":
        assert all("exp_avg" not in state for state in states[0].values())
        return
    shape = (80, 32) if model == "dense" else (8, 32)  # a weight of the MLP, or its right factor
    kept = [state["exp_avg"].shape for size, state in states[0].items() if sorted(size) == sorted(shape)]
    assert kept and all(4 in size for size in kept)  # and not the shape of the weight


def test_the_state_of_an_optimizer_is_estimated(place: Path) -> None:
    def memory(**given: object) -> int:
        settings = make_settings({"model": str(place / "dense"), "data": ["x"], "method": "full", **given})
        return estimate(settings, longest=16, mean=16.0, steps=1, speed=1e9).optimizer

    model = make_model()
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    rest = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in layers)
    assert memory() == 8 * (rest + sum(w.numel() for w in layers))
    assert memory(optimizer="apollo", optimizer_rank=4) == memory(optimizer="galore", optimizer_rank=4)
    assert memory(optimizer="galore", optimizer_rank=4) == 4 * (
        2 * rest + sum(4 * (2 * max(w.shape) + min(w.shape)) for w in layers)
    )
    assert memory(optimizer="adafactor") == 4 * sum(
        sum(p.shape) if p.dim() > 1 else p.numel() for p in model.parameters()
    )


def test_an_optimizer_that_does_not_fit_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, words in (
        ({"optimizer": "galore", "method": "lora"}, "goes with `method=full` alone"),
        ({"optimizer": "adafactor", "method": "factors"}, "bounds the steps of AdamW"),
        ({"optimizer": "apollo", "method": "full", "patience": 2}, "`optimizer=apollo` keeps none"),
        ({"optimizer": "galore", "method": "full", "save_every": 2}, "`optimizer=galore` keeps no checkpoints"),
        ({"optimizer_rank": 8}, "`optimizer_rank` is for galore and apollo"),
        ({"optimizer": "apollo", "method": "full", "optimizer_rank": 500}, "no layer is larger than the rank 500"),
    ):
        with pytest.raises(TwofoldError, match=words):
            run(place, tmp_path / "out", **{"save_every": None, **given})
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TwofoldError, match="GPT-2's Conv1D; take adamw or adafactor"):
        run(
            place,
            tmp_path / "out",
            str(tmp_path / "gpt2"),
            method="full",
            optimizer="galore",
            optimizer_rank=4,
            save_every=None,
        )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "galore_torch" else find(name, *rest)
    )
    with pytest.raises(TwofoldError, match=r"needs the package galore-torch.*twofold\[low-rank-optimizers\]"):
        run(place, tmp_path / "out", method="full", optimizer="galore", save_every=None)


def test_what_fits_in_little_memory_is_trained_by_adamw(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.tuning.estimate.peak_memory", lambda: 0)  # it grows while the tests run
    given = {
        "model": str(place / "dense"),
        "data": ["x"],
        "method": "full",
        "optimizer": "galore",
        "optimizer_rank": 30,
        "rank": 1,
    }
    settings, shape = make_settings(given), {"longest": 16, "mean": 16.0, "steps": 1}
    whole = estimate(settings.model_copy(update={"gradient_checkpointing": True}), **shape, speed=1e9)
    adapter = make_settings({**given, "method": "lora", "optimizer": "adamw", "optimizer_rank": None})
    small = estimate(adapter.model_copy(update={"gradient_checkpointing": True}), **shape, speed=1e9)
    assert small.memory < whole.memory
    chosen, found = choose(settings, (small.memory + whole.memory) // 2, **shape)
    assert (chosen.method, chosen.optimizer) == ("lora", "adamw") and found.optimizer > 0


@pytest.mark.long
@pytest.mark.parametrize(("model", "method"), [("dense", "lora"), ("dense", "full"), ("factored", "factors")])
def test_the_loss_over_the_learnt_positions_is_that_of_all_logits(
    model: str, method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own loss, and with it the training, is the same: the output layer is only run on fewer positions, in parts."""
    seen: list[bool] = []
    own = RowTrainer.compute_loss

    def both(self: RowTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        assert self.head is not None
        found = own(self, model, inputs, *args, **kwargs)
        gradients = torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        head, self.head = self.head, None
        expected = own(self, model, inputs, *args, **kwargs)
        self.head = head
        wanted = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-6)
        seen.append(True)
        return found

    monkeypatch.setattr(RowTrainer, "compute_loss", both)
    monkeypatch.setattr("twofold.tuning.head.POSITIONS", 3)
    run(place, tmp_path / "out", model, method=method, batch=4, micro_batch=2, steps=2)
    assert len(seen) == 4


@pytest.mark.parametrize("model", ["dense", "factored"])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_with_fewer_passes_gives_what_peft_gives(model: str, bias: bool, place: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / model)
    if bias:
        for module in base.modules():
            if type(module) is torch.nn.Linear and module is not base.lm_head:
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
    adapted = with_lora(base, rank=3)
    ids = torch.arange(24).view(2, 12)

    def run_once() -> list[torch.Tensor]:
        adapted.zero_grad()
        logits = adapted(input_ids=ids).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in adapted.parameters() if p.grad is not None)]

    adapted.train()
    expected = run_once()
    assert fuse_lora(adapted) == 14
    found = run_once()
    assert len(found) > 14
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with adapted.disable_adapter(), torch.no_grad():  # what is not the plain case goes PEFT's own way
        plain = adapted(input_ids=ids).logits
    fresh = AutoModelForCausalLM.from_pretrained(place / model)
    if not bias:
        torch.testing.assert_close(plain, fresh(input_ids=ids).logits)
    assert not torch.allclose(plain, expected[0], atol=1e-4)


def test_a_fused_layer_may_be_worked_on_in_place_and_takes_no_rows() -> None:
    """OLMo clamps its queries in place; an expert may get no token."""
    from transformers import OlmoConfig, OlmoForCausalLM

    small = OlmoConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, clip_qkv=0.05
    )  # fmt: skip
    adapted = with_lora(OlmoForCausalLM(small))
    assert fuse_lora(adapted) == 14
    adapted(input_ids=torch.arange(8)[None]).logits.sum().backward()
    grown = with_lora(factored_model(rank=4))
    fuse_lora(grown)
    for model in (adapted, grown):
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        width = layer.in_features
        result = layer(torch.zeros(2, 3, width, requires_grad=True))
        result.clamp_(-1, 1).sum().backward()
        assert layer(torch.zeros(0, width)).shape == (0, layer.out_features)


def test_weights_of_other_classes_go_through_their_own_layer() -> None:
    """torchao's weights look like floating point, and can't be multiplied the other way round."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is an extra")
    model = make_model()
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    adapted = with_lora(model, rank=2)
    ids = torch.arange(8)[None]
    expected = adapted(input_ids=ids).logits
    assert fuse_lora(adapted) == 14
    found = adapted(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()


def test_logits_that_are_scaled_or_bounded_keep_their_loss() -> None:
    """A small cap is not seen in small logits, so it is asked for by name."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    small = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8,
    )  # fmt: skip
    ids = torch.arange(8)[None]
    assert row_head(Gemma2ForCausalLM(small), ids) is None
    small.final_logit_softcapping = None
    model = Gemma2ForCausalLM(small)
    assert row_head(model, ids) is model.lm_head
    assert row_head(model.bfloat16(), ids) is None  # trained in a narrow dtype
    assert row_head(model.requires_grad_(False), ids) is model.lm_head


def test_one_file_of_rows_is_a_list_of_one() -> None:
    assert make_settings({"model": "m", "data": "rows.jsonl"}).data == ["rows.jsonl"]
