"""twofold bench in ONNX Runtime and OpenVINO: exports that are there, and exports that are made for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import twofold.cli
from conftest import CONFIGS, TEXT, make_model, make_tokenizer
from timed import QUIET, SHORT
from timed import models as models  # the fixture
from twofold import TwofoldError
from twofold.exports.export import Exported, export
from twofold.model.load import load_model
from twofold.model.work import work_of
from twofold.speed import bench as bench_module
from twofold.speed import exports
from twofold.speed.bench import bench
from twofold.speed.record import Roofs
from twofold.speed.runtimes import Settings, get_runtime

FAST: dict[str, Any] = {"prompt": 4, "new": 3, "prefill": 12, "batch": (1, 3), "repeats": 1, "quiet": True}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dense and a factored Llama of one layer, for a layer takes seconds to trace, and one export for each runtime."""
    place = tmp_path_factory.mktemp("models")
    config = CONFIGS["llama"]()
    config = type(config)(**config.to_dict() | {"num_hidden_layers": 1, "layer_types": None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(place / "dense")
    twofold.factorize(
        model, make_tokenizer(), keep=0.6, texts=[TEXT], tokens=64, window=32, quiet=True
    ).save_pretrained(place / "small")
    for name in ("dense", "small"):
        make_tokenizer().save_pretrained(place / name)
    found = {name: str(place / name) for name in ("dense", "small")}
    for kind, model_name in (("onnx", "small"), ("openvino", "dense")):
        export(found[model_name], kind, place / kind, check_tokens=0, quiet=True)
        found[kind] = str(place / kind)
    return found


@pytest.fixture(autouse=True)
def no_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "measure_roofs", lambda *_: Roofs(bytes_per_second=1e10, flops=1e11))
    monkeypatch.setattr(bench_module, "layer_table", lambda *_: [])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        code = 0
        try:
            twofold.cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def written(runtime: str, model: str, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens of a session, from its second start."""
    found = get_runtime(runtime)
    session = found.session(found.load(model, QUIET), QUIET)
    session.step(session.begin(ids[:1, :3], 1))
    state = session.begin(ids, count)
    tokens = [state.token.clone()]
    for _ in range(count):
        session.step(state)
        tokens.append(state.token.clone())
    return torch.cat(tokens, 1)


@pytest.mark.parametrize(("runtime", "model"), [("onnx", "small"), ("openvino", "dense")])
def test_a_graph_writes_the_tokens_of_its_model(runtime: str, model: str, exported: dict[str, str]) -> None:
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = get_runtime("eager")
    session = expected.session(expected.load(exported[model], QUIET), Settings(quiet=True, optimize=False))
    state = session.begin(ids, 6)
    tokens = [state.token.clone()]
    for _ in range(6):
        session.step(state)
        tokens.append(state.token.clone())
    assert torch.equal(written(runtime, exported[runtime], ids, 6), torch.cat(tokens, 1))


def test_made_for_the_bench_and_removed(
    exported: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """The dense model is exported for ONNX Runtime, the factored one is an export already; memory is measured of both."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made: list[dict[str, Path]] = []
    export_all = exports.export_all

    def watched(models: dict[str, Path], *rest: Any) -> None:
        made.append(models)
        export_all(models, *rest)

    monkeypatch.setattr("twofold.speed.runtimes._graphs.export_all", watched)
    flags = ["--prompt", 4, "--new", 3, "--prefill", 12, "--batch", "1,3", "--repeats", 1]
    code, out, err = run(
        "bench", exported["onnx"], "--against", exported["dense"], "--runtime", "onnx", *flags, "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    assert [(row["model"], row["runtime"]) for row in said["rows"]] == [
        (exported["dense"], "onnx"), (exported["onnx"], "onnx")
    ]  # fmt: skip
    assert len(made) == 1 and list(made[0]) == [exported["dense"]], "exported once, and not again for its memory"
    assert f"Exporting {exported['dense']} to onnx into {tmp_path}" in err
    assert not list(tmp_path.glob("twofold-bench-*")), "nothing is left behind"
    dense, small = said["rows"]
    for row in (dense, small):
        assert row["dtype"] == "float32" and row["peak_memory"] > 50e6 and set(row["decode"]) == {"1", "3"}
        assert all(timing["seconds"][0] > 0 for timing in (row["prefill"], row["first_token"], row["load"]))
    record = Exported.model_validate_json((Path(exported["onnx"]) / "twofold-export.json").read_text())
    assert small["disk"] == record.file_bytes and small["memory"] == record.weight_bytes < dense["memory"]
    assert small["disk"] == sum(path.stat().st_size for path in Path(exported["onnx"]).glob("model.onnx*"))
    factored = work_of(load_model(exported["small"], device="cpu").model)
    assert factored is not None and small["work"] == factored.model_dump()
    ratios = {ratio["what"]: ratio for ratio in said["ratios"]}
    assert set(ratios) == {"decode 1", "decode 3", "prefill", "first token", "load"}
    assert all(ratio["runtime"] == "onnx" and ratio["ideal"] > 1 for ratio in ratios.values())
    assert any(f"{exported['dense']} in onnx is an export that was made for this bench" in n for n in said["notes"])


def test_openvino_end_to_end(exported: dict[str, str]) -> None:
    result = bench([exported["openvino"]], runtime=["openvino"], **FAST, memory=False)
    (row,) = result.rows
    folder = Path(exported["openvino"])
    assert row.disk == sum((folder / name).stat().st_size for name in ("openvino_model.xml", "openvino_model.bin"))
    assert row.work == work_of(load_model(exported["dense"], device="cpu").model) and row.load.seconds[0] > 0
    assert row.decode[3].tokens == 9 and not result.ratios


@pytest.mark.parametrize(
    ("runtime", "package", "words"),
    [
        ("onnx", "onnxruntime", r"the runtime onnx needs onnxruntime, not installed: pip install 'twofold\[export\]'"),
        ("openvino", "openvino", r"the runtime openvino needs openvino, not installed: pip install"),
        ("onnx", "onnxscript", r"--to onnx needs onnxscript, which is not installed: pip install 'twofold\[export\]'"),
    ],
)
def test_a_missing_runtime_is_named_before_any_work(
    runtime: str, package: str, words: str, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    monkeypatch.setattr(bench_module, "opened", lambda *_: pytest.fail("it has begun"))
    code, out, err = run("bench", models[0], "--runtime", f"eager,{runtime}", "-q")
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert pytest.raises(TwofoldError, match=words).matches(TwofoldError(err))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "bfloat16"], "onnx runs in float32 on the processor, got --dtype bfloat16; leave --dtype out"),
        (["--device", "mps"], "onnx runs in float32 on the processor, got --device mps"),
        (["--prefill", "128"], "use --prefill 127"),
    ],
)
def test_refused_before_any_export(
    flags: list[str], words: str, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.setattr("twofold.speed.runtimes._graphs.export_all", lambda *_: pytest.fail("it exports"))
    code, _, err = run("bench", models[0], "--runtime", "onnx", "-q", *flags)
    assert code == 2 and words in err


def test_models_without_an_export_are_left_to_other_runtimes(
    models: tuple[str, str], tmp_path: Path, exported: dict[str, str]
) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(TwofoldError, match=r"none of the runtimes that are named .openvino: it does not write text"):
        bench([str(tmp_path / "bert")], runtime=["openvino"], **SHORT)
    with pytest.raises(TwofoldError, match=r"none of the runtimes .*openvino: a folder exported to onnx"):
        bench([exported["onnx"]], runtime=["openvino"], **SHORT)
    twofold.factorize(
        make_model(), make_tokenizer(), keep=0.7, bits=8, texts=[TEXT], tokens=64, window=32, quiet=True
    ).save_pretrained(tmp_path / "integers")
    result = bench([str(tmp_path / "integers")], runtime=["eager", "onnx"], **FAST, memory=False)
    assert [row.runtime for row in result.rows] == ["eager"]
    assert any("is not timed in onnx: its factors are quantized" in note for note in result.notes)


def test_an_export_that_fails_is_one_sentence(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(models[0]) / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TwofoldError, match=r"can't be exported to be timed in onnx .*; or leave onnx out of `runtime`"):
        exports.export_all({models[0]: Path(models[0]).parent / "out"}, "onnx", False, True)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(TwofoldError, match=r"the export to onnx failed \(exit code 1\); leave onnx out"):
        exports.export_all({models[1]: Path(models[1]).parent / "out"}, "onnx", False, True)


def test_graphs_that_can_not_be_timed(exported: dict[str, str], tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "fixed"
    shutil.copytree(exported["onnx"], folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    ids = next(one for one in graph.graph.input if one.name == "input_ids")
    ids.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(TwofoldError, match=r"small reads 2 sequences of any number of tokens at once and nothing else"):
        bench([str(folder)], runtime=["onnx"], **FAST, memory=False)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(TwofoldError, match=r"onnx can't open .*fixed/model.onnx: .*; export the model again"):
        bench([str(folder)], runtime=["onnx"], **FAST, memory=False)
    shutil.copy(Path(exported["onnx"]) / "model.onnx", folder / "model.onnx")
    (folder / "config.json").unlink()
    with pytest.raises(TwofoldError, match=r"has no config.json that says what its graph reads"):
        bench([str(folder)], runtime=["onnx"], **FAST, memory=False)
