"""twofold bench: what is timed, against what ideal, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import twofold
from conftest import TEXT, make_model, make_tokenizer
from factored import model_of_form
from timed import QUIET, SHORT
from timed import models as models  # the fixture
from twofold import TwofoldError
from twofold.cli import app
from twofold.model.work import work_of
from twofold.speed import rounds
from twofold.speed.bench import bench
from twofold.speed.figure import points
from twofold.speed.memory import peak_of
from twofold.speed.record import Bench
from twofold.speed.runtimes import RUNTIMES, Runtime, Settings, get_runtime
from twofold.speed.runtimes.compile import Compile


@pytest.mark.long
def test_models_in_turn_with_ideal_beside_measured(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = models
    order: list[str] = []
    round_of = rounds._round

    def watched(session: Any, lengths: rounds.Lengths, device: torch.device) -> dict[str, float]:
        order.append(session.name)
        return round_of(session, lengths, device)

    monkeypatch.setattr(rounds, "_round", watched)
    result = bench([small], against=dense, **SHORT, memory=False)
    assert order == [dense, small] * 3  # one round to warm up
    one, other = result.rows
    assert (one.original, other.original, one.dtype) == (True, False, "float32")
    assert [len(one.timing(what).seconds) for what in ("decode 1", "decode 2", "prefill", "first token", "load")] == [
        2
    ] * 5
    assert one.decode[2].tokens == 6 and one.prefill.rate == 40 / one.prefill.median
    assert one.disk is not None and other.disk is not None and other.disk < one.disk
    assert any("inference form" in note for note in result.notes)
    ratios = {ratio.what: ratio for ratio in result.ratios}
    pairs = zip(one.prefill.seconds, other.prefill.seconds, strict=True)
    assert ratios["prefill"].measured == pytest.approx(sum(a / b for a, b in pairs) / 2)
    assert ratios["load"].ideal == one.disk / other.disk
    assert one.work is not None and other.work is not None
    ideal = one.work.decode_bytes(1, 5.5) / other.work.decode_bytes(1, 5.5)
    assert ratios["decode 1"].ideal == ideal and ratios["decode 1"].share == ratios["decode 1"].measured / ideal
    shapes = {(layer.out_features, layer.in_features): layer for layer in result.layers if layer.tokens == 1}
    assert set(shapes) == {(32, 32), (16, 32), (80, 32), (32, 80)} and all(
        layer.model == small for layer in result.layers
    )
    assert shapes[32, 32].layers == 4 and shapes[32, 32].ideal == 32 * 32 / (12 * 52)
    assert Bench.model_validate_json(result.model_dump_json()) == result
    assert points(result, one)["decode 1"][0] == pytest.approx(
        2 * one.work.decode_multiplications(1, 5.5) / one.work.decode_bytes(1, 5.5)
    )


def test_the_work_of_a_model_by_hand() -> None:
    work = work_of(make_model())
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 80)
    assert work.multiplications == layers and work.head == 264 * 32
    assert work.weight_bytes == 4 * (layers + 264 * 32 + 5 * 32)  # the tied embedding is read by the output layer
    assert work.cache_bytes == 4 * 2 * 2 * 16 and work.attended == 2 * 2 * 32
    factored = work_of(model_of_form("llama", "rows"))
    assert factored.multiplications == 2 * (2 * 12 * 52 + 2 * 6 * 42 + 3 * 12 * 100)
    untied = work_of(make_model("gpt_neox"))
    assert untied.weight_bytes == sum(
        p.numel() * 4 for name, p in make_model("gpt_neox").named_parameters() if "embed_in" not in name
    )


@pytest.mark.long
def test_both_runtimes_write_the_same_tokens(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **settings: plain(model, backend="aot_eager", **settings))
    monkeypatch.setattr("twofold.speed.runtimes.compile.LONG", 16)
    ids = torch.arange(40).reshape(2, 20)
    written = []
    for runtime in ("eager", "compile"):
        found = get_runtime(runtime)
        session = found.session(found.load(models[1], QUIET), QUIET)
        for _ in range(2):  # the second time from an emptied cache
            state = session.begin(ids, 5)
            tokens = [state.token.clone()]
            for _ in range(5):
                session.step(state)
                tokens.append(state.token.clone())
            written.append(torch.cat(tokens, 1))
    assert all(torch.equal(written[0], other) for other in written[1:])


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = models
    peak = peak_of(dense, "eager", QUIET, 4, 2, 8)
    assert 50e6 < peak < 4e9
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(TwofoldError, match="in eager can't be measured: it was killed"):
        peak_of(dense, "eager", QUIET, 4, 2, 8)


@pytest.mark.slow
def test_on_the_command_line(models: tuple[str, str], tmp_path: Path) -> None:
    dense, small = models
    flags = [
        "--against",
        dense,
        "--prompt",
        "4",
        "--new",
        "2",
        "--prefill",
        "8",
        "--batch",
        "1",
        "--repeats",
        "1",
        "-q",
    ]
    out = tmp_path / "timed"
    done = CliRunner().invoke(app, ["bench", small, *flags, "--no-memory", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "bench.json").read_text())
    assert printed["rows"][0]["peak_memory"] is None and printed["batches"] == [1]
    assert (out / "roofline.png").stat().st_size > 5000 and "<svg" in (out / "roofline.svg").read_text()
    table = CliRunner().invoke(app, ["bench", small, *flags, "--no-memory"]).stdout
    assert "share of" in table and "Layers, dense against factored" in table
    alone = CliRunner().invoke(app, ["bench", dense, *flags[2:], "--no-memory", "--no-optimize"])
    assert alone.exit_code == 0 and "as the original" not in alone.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runtime", "fast"], "there is no runtime 'fast'; choose one of compile, eager, onnx, openvino"),
        (["--runtime", ","], "`runtime` names none"),
        (["--batch", "1,none"], "`batch` must be whole numbers above 0 with commas between, as 1,8, got '1,none'"),
        (["--batch", "0"], "`batch` must be whole numbers above 0"),
        (["--prompt", "100", "--new", "64"], "`prompt=100` and `new=64` are longer than the context"),
        (["--prefill", "128"], "use `prefill=127`"),
        (["--dtype", "float3"], "can't be loaded|dtype"),
    ],
)
def test_bad_input_is_one_sentence(models: tuple[str, str], flags: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", models[0], "--repeats", "1", "--no-memory", "-q", *flags])
    assert isinstance(done.exception, TwofoldError)
    assert pytest.raises(TwofoldError, match=words).matches(done.exception)


def test_a_folder_that_exists_is_not_replaced(models: tuple[str, str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", models[0], "--out", str(tmp_path)])
    assert isinstance(done.exception, TwofoldError) and "exists" in str(done.exception)


def test_a_runtime_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Compile):
        name = "missing"
        packages = ("no_such_package_at_all",)
        extra = "export"

    monkeypatch.setitem(RUNTIMES._methods, "missing", Missing())
    with pytest.raises(
        TwofoldError, match=r"needs no_such_package_at_all, not installed: pip install 'twofold\[export\]'"
    ):
        bench(["anything"], runtime=["missing"])


@pytest.mark.slow
def test_folders_of_other_runtimes(models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one runtime can't run is left to another, with a note, or else refused."""
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.onnx").write_bytes(b"")
    with pytest.raises(TwofoldError, match=r"run by none of the runtimes that are named .eager: an exported folder"):
        bench([str(exported)], **SHORT)

    class Other(Runtime):
        name = "other"

        def why_not(self, model: str, settings: Settings) -> str | None:
            return None if model == str(exported) else "no exported folder"

        def load(self, model: str, settings: Settings) -> Any:
            return RUNTIMES.get("eager").load(models[0], settings)

        def session(self, loaded: Any, settings: Settings) -> Any:
            return RUNTIMES.get("eager").session(loaded, settings)

        def disk_bytes(self, loaded: Any) -> int | None:
            return None

    monkeypatch.setitem(RUNTIMES._methods, "other", Other())
    result = bench([models[0], str(exported)], runtime=["eager", "other"], **SHORT, memory=False)
    assert [(row.model, row.runtime) for row in result.rows] == [(models[0], "eager"), (str(exported), "other")]
    assert result.rows[1].disk is None and len(result.notes) == 2


@pytest.mark.long
def test_a_model_that_writes_no_text(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(TwofoldError, match="does not write text token by token"):
        bench([str(tmp_path / "bert")], **SHORT)


@pytest.mark.long
def test_a_compiler_that_fails_is_one_sentence(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, **settings: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no g++ here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(TwofoldError, match=r"torch.compile can't run .* here \(no g\+\+ here\).*leave compile out"):
        bench([models[0]], runtime=["compile"], **SHORT, memory=False)


def test_a_model_of_integers_has_no_ideal():
    model = twofold.factorize(
        make_model(), make_tokenizer(), keep=0.7, bits=8, texts=[TEXT], tokens=64, window=32, quiet=True
    )
    assert work_of(model) is None and work_of(make_model()) is not None
