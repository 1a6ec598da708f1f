"""What stands beside the weights is carried along in every way, or named with its reason; and it can't fail a run."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import twofold
from conftest import make_model
from twofold.checkpoint.beside import (
    ADAPTER,
    LICENCE,
    MODEL,
    PATTERNS,
    TOKENIZER,
    WHOLE,
    base_licence,
    files_beside,
)
from twofold.errors import TwofoldError
from twofold.exports.export import export
from twofold.factor import verify as verify_module
from twofold.host.faults import REPORT, decorating
from twofold.model.generation import answering_generation, plain_generation
from twofold.model.load import load_model
from twofold.model.written import Companions, save_model, write_generation
from twofold.report.record import Run
from twofold.task.text.answers import answer
from twofold.task.text.special import prompt_ids

pytestmark = pytest.mark.long
CARRIED = {
    "LICENSE": "all rights", "NOTICE.txt": "notice", "USE_POLICY.md": "policy", "COPYING": "copying", "licence.pdf": "%PDF",
    "modules.json": json.dumps([{"path": place, "type": "T"} for place in ("", "1_Pooling", "2_Dense", "3_Normalize")]),
    "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "weights",
    "1_Pooling/config.json": '{"pooling": "mean"}', "config_sentence_transformers.json": "{}", "sentence_bert_config.json": "{}",
    "preprocessor_config.json": '{"size":  3}', "processor_config.json": "{}", "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages[0]['content'] }}", "additional_chat_templates/tool.jinja": "{{ 1 }}",
    "added_tokens.json": "{}", "vocab.txt": "a\nb\n", "tokenizer.model": "\x00sp", "generation_config.json": '{"top_k":   7}',
}  # fmt: skip
LEFT = {
    "README.md": "---\nlicense: apache-2.0\n---\n# The original", "optimizer.pt": "x", "training_args.bin": "x",
    "rng_state.pth": "x", "trainer_state.json": "{}", "model.onnx": "x", "model.gguf": "x", "pytorch_model.bin": "x",
    "consolidated.safetensors": "x", "original/params.json": "{}", "banner.png": "x", "quantize_config.json": "{}",
    "adapter_model.safetensors": "x", "train.json": "[]", "notes.txt": "private", "unused.py": "1 / 0", ".gitattributes": "*",
}  # fmt: skip
CODE = {
    "configuration_mine.py": "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n",
    "modeling_mine.py": "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
    "from .layers_mine import WIDE\nclass MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n",
    "layers_mine.py": "WIDE = 1\n",
}  # fmt: skip
OF_A_RUN = {"plan.json", "recipe.yaml", "run.json", "spectra.safetensors", "report.html", "README.md", "config.json"}
SHORT: dict[str, Any] = {
    "keep": 0.6, "tokens": 128, "window": 32, "eval_windows": 1, "objective": "svd", "allocate": "uniform", "quiet": True,
}  # fmt: skip


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def with_own_code(folder: Path) -> Path:
    put(folder, CODE)
    path = folder / "config.json"
    own = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    settings = {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": own}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def compress(folder: Path | str, out: Path, text_file: Path, **settings: Any) -> Run:
    run = twofold.compress(str(folder), out, calibration=[str(text_file)], **(SHORT | settings))
    assert run is not None and not any(REPORT in note for note in run.notes)
    return run


def beside_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a result without its weights and what describes the run."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if n not in OF_A_RUN and ("/" in n or ".safetensors" not in n)}


def cut_and_padded(folder: Path) -> None:
    """Let the tokenizer's file cut and pad."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.enable_truncation(32)
    own.enable_padding(length=32, pad_id=258, pad_token="<pad>")
    own.save(str(folder / "tokenizer.json"))


def test_both_ways_carry_the_same_files_and_name_the_others(checkpoint, text_file, tmp_path, modules_cache):
    cut_and_padded(checkpoint)
    put(with_own_code(checkpoint), CARRIED | LEFT)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    runs = {
        way: compress(checkpoint, tmp_path / way, text_file, stream=way, trust_remote_code=True)
        for way in ("never", "always")
    }
    memory, streamed = (beside_of(tmp_path / way) for way in runs)
    assert memory == streamed
    expected = {*CARRIED, *CODE, "tokenizer.json", "tokenizer_config.json"}
    assert memory.keys() == expected
    assert all(memory[name] == (checkpoint / name).read_bytes() for name in expected)
    assert {path: path.read_bytes() for path in before} == before
    one, other = ((tmp_path / way / "config.json").read_bytes() for way in runs)
    assert one == other
    for way, run in runs.items():
        assert set(run.carried) == expected and run.licence == {"license": "apache-2.0"}
        told, card = " ".join(run.notes), (tmp_path / way / "README.md").read_text()
        assert all((name.split("/")[0] + "/" if "/" in name else name) in told for name in LEFT)
        assert "license: apache-2.0" in card.split("---")[1] and "LICENSE" in card and "The original" not in card
    with pytest.raises(TwofoldError):
        load_model(str(tmp_path / "never"))
    loaded = load_model(str(tmp_path / "always"), trust_remote_code=True)
    assert type(loaded.model).__name__ == "MineForCausalLM"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "never")("a")["input_ids"]) == 1


def test_all_commands_carry_a_licence_and_the_tokenizer_as_it_is(checkpoint, text_file, tmp_path):
    cut_and_padded(checkpoint)
    put(checkpoint, {"LICENSE": "all rights", "modules.json": "[]", "notes.txt": "private"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    compress(checkpoint, tmp_path / "small", text_file)
    export(str(tmp_path / "small"), "dense", tmp_path / "dense", quiet=True)
    export(str(tmp_path / "small"), "portable", tmp_path / "portable", quiet=True)
    common: dict[str, Any] = {"data": [str(rows)], "steps": 2, "quiet": True}
    twofold.tune(str(checkpoint), tmp_path / "adapter", **common)
    tuned = twofold.tune(str(checkpoint), tmp_path / "full", method="full", **common)
    twofold.merge(str(checkpoint), str(tmp_path / "adapter"), tmp_path / "merged")
    twofold.extract(str(tmp_path / "full"), str(checkpoint), tmp_path / "extracted", rank=2)
    assert "notes.txt" in " ".join(tuned.notes) and "LICENSE" in (tmp_path / "full" / "README.md").read_text()
    tokenizer = (checkpoint / "tokenizer.json").read_bytes()
    for name in ("small", "dense", "portable", "adapter", "full", "merged", "extracted"):
        assert (tmp_path / name / "LICENSE").read_text() == "all rights", name
        assert "license: other" in (tmp_path / name / "README.md").read_text().split("---")[1], name
        has_tokenizer, whole = name != "extracted", name not in ("extracted", "adapter")
        assert (tmp_path / name / "tokenizer.json").exists() == has_tokenizer, name
        assert not has_tokenizer or (tmp_path / name / "tokenizer.json").read_bytes() == tokenizer, name
        assert (tmp_path / name / "modules.json").exists() == whole, name


GENERATION = {
    "stop strings": {"stop_strings": ["###"]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "beams in groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "a quantized cache": {"cache_implementation": "quantized"},
    "a static cache": {"cache_implementation": "static"},
    "an unknown cache": {"cache_implementation": "strange"},
    "drawn beams": {"do_sample": True, "num_beams": 3, "temperature": 0.0},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
    "a watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "a forced token": {"forced_bos_token_id": 9999, "forced_eos_token_id": 9999},
    "a length below the prompt": {"max_length": 2},
    "bad words beyond the table": {"bad_words_ids": [[99999]]},
    "no new tokens": {"max_new_tokens": -1},
    "ids beyond the table": {"eos_token_id": [99999, "</s>"], "pad_token_id": -1},
    "draws without drawing": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "an unknown field": {"made_up": {"deep": [1]}},
    "other types": {"num_beams": "many", "top_k": [1], "stop_strings": 5},
    "no object": [],
    "no JSON": "{top_k: 5",
}


@pytest.mark.parametrize("held", GENERATION)
def test_no_settings_of_generation_can_stop_an_answer_or_a_write(held, checkpoint, tokenizer, tmp_path):
    """They are carried along as they are, and the samples are those of plain decoding."""
    path, settings = checkpoint / "generation_config.json", GENERATION[held]
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    loaded, out = load_model(str(checkpoint)), tmp_path / "out"
    own = loaded.model.generation_config
    ids = prompt_ids(tokenizer, "the castle")
    assert answer(loaded.model, tokenizer, ids, 12) == answer(make_model(), tokenizer, ids, 12)
    assert loaded.model.generation_config is own
    companions = Companions.of(loaded)
    save_model(loaded.model, out)
    write_generation(loaded.model, out)  # where a checkpoint has no file of its own
    companions.write(out)
    assert (out / path.name).read_bytes() == path.read_bytes()
    assert isinstance(settings, dict) != any("generation_config.json holds no settings" in n for n in companions.notes)


def test_no_settings_of_generation_can_stop_a_run(checkpoint, text_file, tmp_path):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(GENERATION["stop strings"]))
    for way in ("never", "always"):
        run = compress(checkpoint, tmp_path / way, text_file, stream=way)
        assert (tmp_path / way / path.name).read_bytes() == path.read_bytes()
        assert bool(run.samples) == (way == "never")


@pytest.mark.parametrize(
    ("held", "method"), [("draws without drawing", "full"), ("stop strings", "lora"), ("no object", "full")]
)
def test_no_settings_of_generation_can_stop_a_training(held, method, checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(GENERATION[held]))
    run = twofold.tune(
        str(checkpoint), tmp_path / "out", data=[str(rows)], method=method, steps=2, save_every=1, quiet=True
    )
    assert run.samples and not any("no sample answers" in note for note in run.notes)
    assert method == "lora" or (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_a_conversation_takes_of_the_model():
    model = make_model()
    own = model.generation_config
    own.update(
        num_beams=4, penalty_alpha=0.6, stop_strings=["#"], top_p=0.5, repetition_penalty=1.2, eos_token_id=[7, 999]
    )
    plain, greedy = plain_generation(model), answering_generation(model, do_sample=False, max_new_tokens=5)
    drawn = answering_generation(model, do_sample=True, temperature=0.5)
    assert (
        plain.eos_token_id == 7 and plain.stop_strings is None and not plain.do_sample and plain.num_beams in (None, 1)
    )
    assert greedy.stop_strings == ["#"] and greedy.repetition_penalty == 1.2 and greedy.max_new_tokens == 5
    assert (greedy.top_p, drawn.top_p, drawn.temperature) == (None, 0.5, 0.5) and drawn.num_beams in (None, 1)


def test_an_export_reads_its_result_with_the_flag_that_it_was_given(checkpoint, text_file, tmp_path, modules_cache):
    compress(with_own_code(checkpoint), tmp_path / "small", text_file, trust_remote_code=True)
    for to, more in (("dense", {}), ("lora", {"base": str(checkpoint)})):
        made = export(str(tmp_path / "small"), to, tmp_path / to, trust_remote_code=True, quiet=True, **more)
        assert made.comparison.relative < 1e-5
    assert {*CODE} <= {path.name for path in (tmp_path / "dense").iterdir()}
    with pytest.raises(TwofoldError):
        export(str(tmp_path / "small"), "dense", tmp_path / "again", quiet=True)


def test_a_model_of_the_hub_takes_its_files_from_there(checkpoint, text_file, tmp_path, monkeypatch):
    """As the hub's cache has them: links to the blobs of the repository."""
    put(checkpoint, {"LICENSE": "all rights", "sentence_bert_config.json": "{}"})
    repository = tmp_path / "hub" / "models--someone--tiny"
    repository.mkdir(parents=True)
    put(repository, {"refs/main": "abc", "blobs/none": ""})
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(repository / "blobs" / str(number))
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = {}
    for way in ("never", "always"):
        run = compress("someone/tiny", tmp_path / way, text_file, stream=way)
        found[way] = beside_of(tmp_path / way)
        assert run.licence == {"license": "other", "license_link": "LICENSE"}
    assert found["never"] == found["always"] and {"LICENSE", "tokenizer.json"} <= found["never"].keys()
    assert not (tmp_path / "never" / "LICENSE").is_symlink()


@pytest.mark.parametrize(
    "part", ["twofold.run.ways.answer", "twofold.report.page.write_report", "twofold.report.card.write_card"]
)
def test_what_only_decorates_fails_alone(part, checkpoint, text_file, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("unheard of")

    monkeypatch.setattr(part, broken)
    run = twofold.compress(str(checkpoint), tmp_path / "out", calibration=[str(text_file)], **SHORT)
    written = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert sum("unheard of" in note for note in written) == 1 and run is not None and run.notes == written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_fault_of_ours_and_one_of_the_model_are_told_apart():
    notes: list[str] = []
    with decorating("samples", notes):
        verify_module.verify(None, None, None)  # type: ignore[arg-type]
    with decorating("samples", notes):
        torch.zeros(2) @ torch.zeros(3)
    with decorating("samples", notes):
        raise TwofoldError("no room")
    assert [REPORT in note for note in notes] == [True, False, False]
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(error)), decorating("samples", notes):
            raise error
    assert len(notes) == 3


def test_links_pickles_and_paths_that_lead_away_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "model"
    folder.mkdir()
    modules = [{"path": "../away"}, {"path": "2_Dense"}, 3, {"path": ["x"]}]
    put(folder, {"modules.json": json.dumps(modules), "2_Dense/pytorch_model.bin": "x", "2_Dense/config.json": "{}"})
    put(
        folder,
        {
            "tokenizer_config.json": '{"vocab_file": "words.lst", "auto_map": {"AutoTokenizer": ["../a.T", null, "tok.T"]}}'
        },
    )
    put(folder, {"words.lst": "a", "tok.py": "from . import more\nfrom ..away import x\n", "more.py": "def broken(:"})
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    found = files_beside(folder)
    assert found.carried.keys() == {
        "modules.json",
        "2_Dense/config.json",
        "tokenizer_config.json",
        "words.lst",
        "tok.py",
        "more.py",
    }
    assert found.left.keys() == {"LICENSE", "2_Dense/pytorch_model.bin"} and "outside" in found.left["LICENSE"]


A_FILE = {"license": "other", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("card", "licence", "said"),
    [
        ("# The original", A_FILE, ""),
        ("---\ntags: [a]\n---\n", A_FILE, ""),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}, ""),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}, ""),
        (
            "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: [1]\n---\n",
            {"license": "other", "license_name": "qwen-research"},
            "can't be read, in license_link",
        ),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", A_FILE, "can't be read"),
        ("---\nlicense: mit\nbad: [\n---\n", A_FILE, "can't be read"),
        ("---\nlicense: {a: 1}\n---\n", A_FILE, "can't be read, in license"),
    ],
)
def test_what_a_card_says_of_the_licence_is_kept_or_named(card, licence, said, tmp_path):
    put(tmp_path, {"LICENSE": "all rights", "README.md": card})
    found, notes = base_licence(tmp_path)
    assert found == licence and [said in note for note in notes] == [True] * bool(said)


LICENCES = (
    "LICENSE", "MODEL_LICENSE", "Model_License.txt", "Llama-3-LICENSE.txt", "llama-license.md", "UNLICENSE", "ModelLicence.pdf",
    "EULA.txt", "gemma_terms.md", "Community License for Baichuan2 Model.pdf", "LICENSES/MIT.txt", "license/any.html",
    "README_LICENSE.md", "third-party notices.txt", "Acceptable_Use_Policy.md",
)  # fmt: skip
NO_LICENCES = (
    "license.py",
    "license.safetensors",
    "MODEL_LICENSE.bin",
    "license_plates.jsonl",
    "LICENSES/check.py",
    "museum.txt",
)


def test_a_licence_is_carried_whatever_its_name_but_no_code_or_weights(tmp_path):
    put(tmp_path, dict.fromkeys((*LICENCES, *NO_LICENCES), "x"))
    for kinds in (WHOLE, ADAPTER):
        found = files_beside(tmp_path, kinds)
        assert set(found.carried) == set(LICENCES)
        assert kinds == ADAPTER or found.left.keys() == set(NO_LICENCES)
    patterns = [path for path in LICENCES if any(fnmatch(path, pattern) for pattern in PATTERNS)]
    assert patterns == list(LICENCES), "all are fetched from the hub"


def test_records_of_ours_are_no_loss_and_those_of_others_are_named(tmp_path):
    records = {"plan.json": "{}", "run.json": "{}", "report.html": "", "README.md": ""}
    put(tmp_path, records)
    assert files_beside(tmp_path).left.keys() == records.keys()
    put(tmp_path, {"config.json": "{}"})  # now it is a factored checkpoint
    assert files_beside(tmp_path).left.keys() == {"README.md"}


def test_a_form_without_the_code_names_what_it_drops(tmp_path):
    put(tmp_path, {"custom_generate/generate.py": "", "preprocessor_config.json": "{}"})
    found = files_beside(tmp_path, (LICENCE, TOKENIZER, MODEL))
    assert found.carried.keys() == {"preprocessor_config.json"} and found.left.keys() == {"custom_generate/generate.py"}


def test_a_configuration_that_can_not_be_written_is_refused_before_the_work(checkpoint, text_file, tmp_path):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_attentions": True}))
    with pytest.raises(
        TwofoldError, match=r"tiny can't be written again \(.*output_attentions.*; mend its config.json"
    ):
        compress(checkpoint, tmp_path / "out", text_file)
    assert not list(tmp_path.glob("out*"))
