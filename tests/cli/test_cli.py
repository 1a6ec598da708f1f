"""The command: what it prints, its exit codes, and that every bad input ends in one clear sentence and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import twofold.cli
from conftest import TEXT, make_model, make_tokenizer
from runs import kill_program, run_program
from twofold.host.cache import cache_folder
from twofold.host.folders import staged_folder
from twofold.planning.plan import Plan


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        code = 0
        try:
            twofold.cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def quick(checkpoint, text_file):
    return [checkpoint, "--calibration", text_file, "--tokens", 96, "--window", 32, "--quiet"]


def refused(result, message):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert message in err
    assert err.startswith("twofold: ") and err.count("\n") == 1, "one sentence, no traceback"


@pytest.mark.long
def test_compress_prints_what_it_did(run, quick, tmp_path):
    code, out, err = run("compress", *quick, "--keep", 0.6, "--out", tmp_path / "small")
    assert code == 0, err
    for part in (
        "Ranks by kind",
        "whole model, parameters",
        "whole model, bytes",
        "perplexity",
        "original:",
        "factored:",
        "report.html",
    ):
        assert part in out
    assert err == ""


@pytest.mark.long
def test_json_is_json(run, quick, tmp_path, text_file, checkpoint):
    code, out, _ = run("compress", *quick, "--keep", 0.6, "--out", tmp_path / "small", "--json")
    record = json.loads(out)
    assert code == 0 and record["keep"] == pytest.approx(0.6, abs=0.005)
    code, out, _ = run("plan", *quick, "--keep", 0.6, "--json")
    assert code == 0 and len(json.loads(out)["entries"]) == 14
    code, out, _ = run(
        "eval", tmp_path / "small", "--against", checkpoint, "--text", text_file, "--window", 64, "--json", "--quiet"
    )
    models = json.loads(out)["models"]
    assert code == 0 and [m["name"] for m in models] == [str(checkpoint), str(tmp_path / "small")]
    assert models[0]["divergence"] is None and models[1]["divergence"] > 0 and models[1]["disk"] < models[0]["disk"]
    code, out, _ = run("inspect", checkpoint, "--json")
    found = json.loads(out)
    assert code == 0 and found["total_numbers"] == sum(p.numel() for p in make_model().parameters())
    assert found["shared"] == ["q_proj, k_proj, v_proj", "gate_proj, up_proj"]


@pytest.mark.long
def test_progress_goes_to_standard_error_as_lines(run, quick, tmp_path):
    code, out, err = run("compress", *quick[:-1], "--keep", 0.6, "--out", tmp_path / "small", "--json")
    assert code == 0 and json.loads(out)
    assert "Calibrating: done in" in err and "\x1b" not in err


def test_eval_of_the_same_model_diverges_by_nothing(run, checkpoint, text_file):
    code, out, _ = run(
        "eval", checkpoint, "--against", checkpoint, "--text", text_file, "--window", 64, "--json", "--quiet"
    )
    first, second = json.loads(out)["models"]
    assert code == 0 and first["perplexity"] == second["perplexity"]
    assert second["divergence"] == pytest.approx(0, abs=1e-7) and second["agreement"] == 1


def test_perplexity_is_that_of_the_definition(run, checkpoint, text_file):
    _, out, _ = run("eval", checkpoint, "--text", text_file, "--window", 64, "--windows", 2, "--json", "--quiet")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor(make_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    row = json.loads(out)["models"][0]
    assert row["perplexity"] == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


@pytest.mark.long
def test_inspect_shows_factored_layers(run, quick, tmp_path):
    run("compress", *quick, "--keep", 0.6, "--out", tmp_path / "small")
    code, out, _ = run("inspect", tmp_path / "small", "--all")
    assert code == 0 and "factored" in out


@pytest.mark.long
def test_plan_and_inspect_read_no_weight(run, checkpoint, tmp_path, monkeypatch):
    """A model of 70 billion parameters, of which only the configuration is here."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder = tmp_path / "llama-70b"
    config.save_pretrained(folder)
    code, out, err = run("plan", folder, "--keep", 0.6, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert len(plan["entries"]) == 560 and plan["element_bytes"] == 2
    assert (
        sum(e["numbers_before"] for e in plan["entries"]) + sum(d["numbers"] for d in plan["dense"]) == 70_553_706_496
    )
    assert "no weight was read" in plan["notes"][0]
    code, out, err = run("inspect", folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["total_numbers"] == 70_553_706_496
    assert found["shared"] == ["q_proj, k_proj, v_proj", "gate_proj, up_proj"]


@pytest.mark.long
def test_recipe_file_flags_and_stored_recipe_are_one(run, checkpoint, text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {checkpoint}\ncalibration: [{text_file}]\ntokens: 96\nwindow: 32\nkeep: 0.5\n"
        "overrides:\n  v_proj: {dense: true}\n"
    )
    code, _, err = run("compress", "--recipe", recipe, "--keep", 0.7, "--out", tmp_path / "a", "--quiet")
    assert code == 0, err
    plan = Plan.load(tmp_path / "a" / "plan.json")
    assert plan.keep == pytest.approx(0.7, abs=0.005)
    assert all(e.rank is None for e in plan.entries if e.kind == "v_proj")
    code, _, err = run("compress", "--recipe", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "b", "--quiet")
    assert code == 0, err
    assert Plan.load(tmp_path / "b" / "plan.json") == plan
    code, _, _ = run(
        "compress",
        "--recipe",
        recipe,
        "--budget",
        "80%",
        "--override",
        "o_proj=rank:5",
        "--out",
        tmp_path / "c",
        "--quiet",
    )
    changed = Plan.load(tmp_path / "c" / "plan.json")
    assert code == 0 and changed.keep_model == pytest.approx(0.8, abs=0.01)
    assert {e.rank for e in changed.entries if e.kind == "o_proj"} == {5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep"),
        (["--keep", "1.5"], "--keep"),
        (["--keep", "-1"], "--keep"),
        (["--keep", "nan"], "--keep"),
        ([], "give either --keep (share"),
        (["--keep", "0.5", "--budget", "70%"], "give either --keep"),
        (["--keep", "0.5", "--perplexity-at-most", "1.1x"], "give either --keep"),
        (["--perplexity-at-most", "0.9x"], "must be at least 1x, which is the dense model itself"),
        (["--perplexity-at-most", "little"], "--perplexity-at-most: must be a perplexity"),
        (["--perplexity-at-most", "2"], "the dense model itself has a perplexity of"),
        (["--kl-at-most", "0"], "--kl-at-most"),
        (["--kl-at-most", "inf"], "--kl-at-most"),
        (["--kl-at-most", "0.1", "--eval-windows", "0"], "--eval-windows 0 measures nothing"),
        (
            ["--kl-at-most", "0.1", "--stream", "always"],
            "whole in memory, and this one is worked through block by block",
        ),
        (["--budget", "lots"], "is not understood"),
        (["--budget", "1K"], "the smallest possible is"),
        (["--budget", "1KB"], "the smallest possible is"),
        (["--keep", "0.0001"], "below the smallest possible"),
        (["--keep", "0.5", "--objective", "magic"], "there is no objective 'magic'"),
        (["--keep", "0.5", "--allocate", "magic"], "there is no allocation 'magic'"),
        (["--keep", "0.5", "--exclude", "nothing_like_it"], "matches no linear layer"),
        (["--keep", "0.5", "--override", "q_proj=big"], "is not understood"),
        (["--keep", "0.5", "--override", "nothing=dense"], "matches no weight"),
        (["--keep", "0.5", "--override", "q_proj=rank:500"], "above its full rank"),
        (["--keep", "0.5", "--window", "4096"], "longer than this model's 128 positions"),
        (["--keep", "0.5", "--window", "1"], "--window"),
        (["--keep", "0.5", "--device", "abacus"], "there is no device 'abacus'"),
        (["--keep", "0.5", "--dtype", "int4"], "--dtype"),
        (["--keep", "0.5", "--recipe", "missing.yaml"], "the recipe missing.yaml can't be read"),
    ],
)
def test_bad_settings(run, quick, tmp_path, arguments, message):
    refused(run("compress", *quick, "--out", tmp_path / "small", *arguments), message)
    assert not (tmp_path / "small").exists()


@pytest.mark.long
def test_a_quality_in_the_place_of_a_size(run, quick, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("keep: 0.9")
    flags = [*quick, "--recipe", recipe, "--kl-at-most", 0.05, "--json"]
    code, out, err = run("compress", *flags, "--out", tmp_path / "small")
    assert code == 0, err
    record = json.loads(out)
    assert record["keep"] < 0.9 and record["quality"]["factored"]["divergence"] <= 0.05 and len(record["probes"]) > 1
    code, out, err = run("plan", *flags)
    assert code == 0, err
    assert sum(e["numbers_after"] for e in json.loads(out)["entries"]) == record["target_after"]
    again = ["--recipe", tmp_path / "small" / "recipe.yaml", "--quiet"]
    code, _, err = run("compress", *again, "--keep", 0.9, "--out", tmp_path / "larger")
    assert code == 0, err
    assert Plan.load(tmp_path / "larger" / "plan.json").keep == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [("keep: [", "is not YAML"), ("- 1", "holds no settings"), ("kep: 0.5", "there is no setting 'kep'"),
     ("keep: much", "--keep"), ("keep: 0.5\noverrides: {q_proj: {rank: 3, dense: true}}", "exactly one of")],
)  # fmt: skip
def test_bad_recipes(run, quick, tmp_path, content, message):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(content)
    refused(run("compress", *quick, "--out", tmp_path / "small", "--recipe", recipe), message)


@pytest.mark.parametrize("content", ["", "   \n\n", "short"])
def test_empty_and_tiny_texts(run, checkpoint, tmp_path, content):
    text = tmp_path / "text.txt"
    text.write_text(content)
    message = "fewer than one window" if content == "short" else "is empty"
    refused(
        run(
            "compress",
            checkpoint,
            "--calibration",
            text,
            "--window",
            32,
            "--keep",
            0.5,
            "--out",
            tmp_path / "s",
            "--quiet",
        ),
        message,
    )
    refused(run("eval", checkpoint, "--text", text, "--window", 64, "--quiet"), message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "tiny"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bytes.txt", b"\xff\xfe\x00\x01" * 50, "is not a text file in UTF-8"),
        ("rows.jsonl", b'{"text": "fine"}\nnot json\n', "rows.jsonl, line 2: it is not JSON"),
        ("rows.jsonl", b'{"other": 1}\n', "rows.jsonl, line 1: a row needs"),
    ],
)
def test_texts_that_can_not_be_read(run, checkpoint, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    refused(
        run("compress", checkpoint, "--calibration", path, "--keep", 0.5, "--out", tmp_path / "s", "--quiet"), message
    )


def test_texts_that_are_not_there(run, checkpoint, tmp_path):
    common = ["--keep", 0.5, "--out", tmp_path / "s", "--quiet"]
    refused(run("compress", checkpoint, "--calibration", tmp_path / "no.txt", *common), "there is no file")
    refused(run("compress", checkpoint, "--calibration", tmp_path, *common), "is a folder")
    refused(
        run("compress", checkpoint, "--calibration", "surely-no-such-data-set", *common),
        "neither a file nor a data set",
    )


@pytest.mark.long
def test_jsonl_and_data_sets_are_read(run, checkpoint, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()))
    common = ["--tokens", 96, "--window", 32, "--keep", 0.5, "--quiet"]
    code, _, err = run("compress", checkpoint, "--calibration", rows, *common, "--out", tmp_path / "a")
    assert code == 0, err
    folder = tmp_path / "dataset"
    folder.mkdir()
    import datasets

    datasets.Dataset.from_dict({"story": TEXT.splitlines()}).to_parquet(str(folder / "train.parquet"))
    capsys.readouterr()
    code, _, err = run(
        "compress", checkpoint, "--calibration", folder, "--text-column", "story", *common, "--out", tmp_path / "b"
    )
    assert code == 0, err
    chat = tmp_path / "chat.jsonl"
    said = {"role": "user", "content": TEXT}, {"role": "assistant", "content": "So it is."}
    chat.write_text(json.dumps({"messages": said}))
    code, _, err = run("compress", checkpoint, "--calibration", chat, *common, "--out", tmp_path / "c")
    assert code == 0, err


@pytest.mark.long
def test_several_texts_and_patterns(run, checkpoint, tmp_path):
    for i, half in enumerate((TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :])):
        (tmp_path / f"part-{i}.txt").write_text(half)
    common = ["--tokens", 1600, "--window", 32, "--keep", 0.5, "--quiet", "--json"]
    files = [tmp_path / "part-0.txt", tmp_path / "part-1.txt"]
    hashes = set()
    for i, given in enumerate(([files[0], files[1]], [files[0], "--calibration", files[1]], [tmp_path / "part-*.txt"])):
        code, out, err = run("compress", checkpoint, "--calibration", *given, *common, "--out", tmp_path / str(i))
        assert code == 0, err
        hashes.add(json.loads(out)["calibration_sha256"])
    assert len(hashes) == 1
    refused(
        run("compress", checkpoint, "--calibration", tmp_path / "no-*.txt", *common, "--out", tmp_path / "x"),
        "no file matches",
    )


def test_models_that_are_not_there(run, tmp_path, text_file):
    for name, message in [
        (tmp_path / "nothing", "there is no folder"),
        ("no-such-owner/no-such-model", "there is no folder no-such-owner/no-such-model, and "),
        (text_file, "is a file but not a .gguf"),
    ]:
        refused(run("inspect", name), message)
    (tmp_path / "empty").mkdir()
    refused(run("inspect", tmp_path / "empty"), "it has no config.json")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(run("eval", tmp_path / "empty", "--text", text_file), "has no weights in safetensors")


def test_pickles_are_never_loaded(run, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    refused(run("eval", checkpoint, "--text", checkpoint / "config.json"), "pickles, which can run code")


def test_not_a_transformer(run, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "model_type": "toaster", "architectures": ["Toaster"]})
    )
    refused(run("inspect", checkpoint), "can't be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(run, quick, checkpoint, tmp_path, value):
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][2, 3] = value
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    refused(run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "s"), f"the weight {name} of")


def test_checkpoints_that_are_not_whole(run, checkpoint, tmp_path, text_file):
    measure = ["--text", text_file, "--window", 64, "--quiet"]
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k},
        checkpoint / "model.safetensors",
        {"format": "pt"},
    )
    refused(
        run("eval", checkpoint, *measure),
        "is not whole: it lacks 1 weights, first model.layers.1.mlp.up_proj.weight",
    )
    cut = (checkpoint / "model.safetensors").read_bytes()[:-50]
    (checkpoint / "model.safetensors").write_bytes(cut)
    refused(run("eval", checkpoint, *measure), "model.safetensors can't be read")
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    gone.unlink()
    refused(run("eval", tmp_path / "shards", *measure), f"shards, first {gone.name}")


def test_an_index_can_not_leave_its_folder(run, tmp_path):
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    for outside in ("../other.safetensors", "/etc/passwd"):
        index["weight_map"][name] = outside
        path.write_text(json.dumps(index))
        refused(run("inspect", tmp_path / "shards"), "names a file outside of its folder")
    path.write_text("not json")
    refused(run("inspect", tmp_path / "shards"), "can't be read")


@pytest.mark.long
def test_a_factored_checkpoint_that_is_not_whole(run, quick, tmp_path, text_file):
    small = tmp_path / "small"
    run("compress", *quick, "--keep", 0.5, "--out", small)
    refused(run("compress", small, *quick[1:], "--keep", 0.5, "--out", tmp_path / "again"), "it is factorized already")
    config = json.loads((small / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(iter(modules))
    modules[name]["rank"] += 1
    (small / "config.json").write_text(json.dumps(config))
    refused(run("eval", small, "--text", text_file, "--window", 64, "--quiet"), f"the weight {name}.")
    modules["model.layers.7.q"] = modules.pop(name)
    (small / "config.json").write_text(json.dumps(config))
    refused(run("eval", small, "--text", text_file, "--window", 64, "--quiet"), "does not fit this model")


@pytest.mark.long
def test_an_output_that_exists_needs_overwrite(run, quick, tmp_path):
    out = tmp_path / "small"
    command = ["compress", *quick, "--keep", 0.5, "--out", out]
    assert run(*command)[0] == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    refused(run(*command), "exists; name another one, or replace it with --overwrite")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert run(*command, "--overwrite")[0] == 0
    assert (out / "model.safetensors").stat().st_mtime_ns != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(
        run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "mine", "--overwrite"),
        "was not written by Twofold, so it is not replaced",
    )
    (tmp_path / "file").write_text("")
    refused(run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "file"), "is a file; name a folder")
    assert not list(tmp_path.glob(".*"))


def test_the_output_never_takes_the_place_of_what_is_read(run, checkpoint, text_file, tmp_path, quick):
    common = ["--tokens", 96, "--window", 32, "--keep", 0.5, "--quiet", "--overwrite"]
    for name in ("plan.json", "run.json"):
        (checkpoint / name).write_text("{}")  # as if Twofold had written it
    before = sorted(p.name for p in checkpoint.iterdir())
    refused(
        run("compress", checkpoint, "--calibration", text_file, *common, "--out", checkpoint), "which this run reads"
    )
    inside = run("compress", checkpoint, "--calibration", text_file, *common, "--out", checkpoint / "small")
    refused(inside, f"lies in {checkpoint}, which this run reads")
    text = checkpoint.parent / "data"
    text.mkdir()
    for name in ("config.json", "plan.json", "run.json"):
        (text / name).write_text("{}")
    (text / "texts.txt").write_text(TEXT)
    refused(
        run("compress", checkpoint, "--calibration", text / "texts.txt", *common, "--out", text), "which this run reads"
    )
    assert sorted(p.name for p in checkpoint.iterdir()) == before


def test_staging_folders_of_other_runs_are_left_alone(tmp_path):
    mine = tmp_path / f".small.{os.getpid()}.abcd1234.partial"
    other = tmp_path / ".small.8.99999999.abcd1234.partial"  # of an output named small.8
    dead = tmp_path / ".small.99999999.abcd1234.partial"
    for folder in (mine, other, dead):
        folder.mkdir()
    with staged_folder(tmp_path / "small") as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "file").write_text("x")
    assert mine.exists() and other.exists() and not dead.exists()
    assert os.access(tmp_path / "small" / "sub", os.X_OK)


def test_a_bad_evaluation_text_is_refused_before_any_work(run, quick, tmp_path):
    result = run("compress", *quick, "--keep", 0.5, "--eval-text", tmp_path / "no.txt", "--out", tmp_path / "s")
    refused(result, "there is no file")
    assert not (cache_folder() / "moments").exists()


def test_moments_that_can_not_be_kept_are_refused_before_any_work(run, quick, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(
        "compress", *quick, "--keep", 0.5, "--moments", tmp_path / "file" / "m.safetensors", "--out", tmp_path / "s"
    )
    assert result[0] == 2 and "Traceback" not in result[2]


def test_a_recipe_can_not_turn_on_foreign_code(run, quick, tmp_path):
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text("keep: 0.5\ntrust_remote_code: true\n")
    refused(run("compress", *quick, "--recipe", recipe, "--out", tmp_path / "s"), "asks to run a checkpoint's code")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["clip", "vit", "t5"])
def test_models_that_do_not_run_on_text_alone(run, kind, tmp_path, text_file, tokenizer):
    import transformers as t

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = {
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(text_config={**small, "vocab_size": 264}, vision_config={**small, "image_size": 32})
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**small, image_size=32)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=264, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
        ),
    }[kind]()  # fmt: skip
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    for calibration in ([], ["--calibration", text_file]):
        result = run("compress", tmp_path / kind, *calibration, "--tokens", 32, "--window", 16, "--keep", 0.6,
                     "--out", tmp_path / "s", "--quiet")  # fmt: skip
        assert result[0] == 2 and result[2].startswith("twofold: ") and "Traceback" not in result[2], result[2]
    result = run("eval", tmp_path / kind, "--text", text_file, "--window", 16, "--quiet")
    assert result[0] == 2 and "Traceback" not in result[2], result[2]
    code, _, err = run("compress", tmp_path / kind, "--objective", "svd", "--allocate", "uniform", "--keep", 0.6,
                       "--out", tmp_path / "s", "--quiet")  # fmt: skip
    assert code == 0, err
    assert run("inspect", tmp_path / kind)[0] == 0


def test_no_space_leaves_nothing(run, quick, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("twofold.planning.plan.Plan.save", full)
    refused(run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "s"), "no space left while writing")
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s.*"))
    monkeypatch.undo()
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "s"), "no space for")


def test_a_failure_of_ours_is_said_to_be_ours(run, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.run.prepare.targets_of", lambda *a: 1 / 0)
    code, _, err = run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "s")
    assert code == 1 and "this is a failure of ours (ZeroDivisionError" in err


@pytest.mark.long
def test_rank_deficient_moments_and_one_window(run, checkpoint, text_file, tmp_path):
    code, out, err = run(
        "compress", checkpoint, "--calibration", text_file, "--tokens", 4, "--window", 4, "--damping", 0,
        "--keep", 0.6, "--out", tmp_path / "s", "--json", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["calibration_tokens"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert torch.isfinite(loaded(input_ids=torch.arange(20)[None]).logits).all()


@pytest.mark.long
def test_a_killed_run_goes_on_from_the_saved_moments(checkpoint, text_file, tmp_path):
    """Killed after its calibration: nothing half-written; started again it uses the moments and gives the same bits."""
    cache = tmp_path / "cache"
    command = ["compress", str(checkpoint), "--calibration", str(text_file), "--tokens", "96",
               "--window", "32", "--keep", "0.6", "--out", str(tmp_path / "small"), "--json"]  # fmt: skip
    kill_program(command, cache, "*/moments/*/moments.json")
    assert list(cache.glob("moments/*/moments.json"))
    assert not (tmp_path / "small").exists()
    again = run_program(command, cache)
    assert json.loads(again.stdout)["moments_reused"]
    assert "the moments of an earlier run fit" in again.stderr
    fresh = [*command[:-2], str(tmp_path / "fresh"), "--json"]
    run_program(fresh, tmp_path / "other")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "fresh")]
    assert files[0] == files[1]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.long
def test_named_moments_must_fit(run, quick, tmp_path):
    path = tmp_path / "moments"
    assert run("compress", *quick, "--keep", 0.5, "--moments", path, "--out", tmp_path / "a")[0] == 0
    assert (path / "moments.json").is_file() and not (cache_folder() / "moments").exists()
    command = ["compress", *quick, "--keep", 0.5, "--moments", path, "--seed", 9, "--out", tmp_path / "b"]
    refused(run(*command), "belong to another model, text, seed or setting")
    (path / "moments.json").write_bytes(b"nonsense")
    refused(run("compress", *quick, "--keep", 0.5, "--moments", path, "--out", tmp_path / "b"), "can't be read")


@pytest.mark.long
def test_cached_moments_that_are_not_whole_are_collected_again(run, quick, tmp_path):
    assert run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "a")[0] == 0
    (kept,) = (cache_folder() / "moments").glob("*/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    code, out, _ = run("compress", *quick, "--keep", 0.5, "--out", tmp_path / "b", "--json")
    assert code == 0 and not json.loads(out)["moments_reused"]


def test_help_and_version(run):
    assert run("--version")[1].strip() == twofold.__version__
    code, out, _ = run("compress", "--help")
    assert code == 0
    for flag in (
        "--keep",
        "--budget",
        "--calibration",
        "--objective",
        "--allocate",
        "--seed",
        "--out",
        "--json",
        "--recipe",
    ):
        assert flag in out
    assert Path(twofold.cli.__file__).is_file()
