"""Whisper in LiteWhisper's layout says what the factored model does: by its formulas, in ONNX Runtime, in transformers.js."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from conftest import make_tokenizer
from twofold import TwofoldError
from twofold.checkpoint.plugin import attach
from twofold.exports import speech_graphs
from twofold.exports.decoding import encoder_input, greedy
from twofold.exports.export import export
from twofold.exports.formats import lite_whisper
from twofold.exports.layers import compact_layers
from twofold.model.load import load_model
from twofold.nn.compact import CompactLinear
from twofold.nn.layers._basis import SharedBasis
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.nn.places import hold_bases, replace_module

END, START, NO_TIMES = 256, 257, 258
VOCABULARY = 259
WHOLE = {"self_attn.v_proj": ("plain", 3), "self_attn.k_proj": ("rows", 5), "fc1": ("columns", 7), "fc2": ("rows", 9)}
SECONDS = 1


def make_whisper(layers=1):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=layers + 1, decoder_layers=layers, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=50 * SECONDS,
        max_target_positions=128, decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    hidden = [number for number in range(VOCABULARY) if number not in range(65, 91)]  # it writes capital letters
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END, max_length=100,
        no_timestamps_token_id=NO_TIMES, is_multilingual=False, suppress_tokens=hidden,
    )  # fmt: skip
    return model


def whisper_tokenizer():
    """One token a byte, and Whisper's own."""
    letters = [chr(i) for i in range(256)]
    known = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(letters) if letter in known}
    for letter in sorted(set(known) - vocabulary.keys()):
        vocabulary[letter] = next(i for i in range(256) if i not in vocabulary.values())
    vocabulary |= {"<|endoftext|>": END, "<|startoftranscript|>": START, "<|notimestamps|>": NO_TIMES}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    return tokenizer


def factor(model, forms=WHOLE, block="model.encoder.layers.0.", bias=None):
    """Factor layers of one block by plain SVD, each in its form at its rank."""
    for name, (form, rank) in forms.items():
        module = model.get_submodule(block + name)
        u, s, v = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
        own = module.bias if bias is None else bias
        layer = FactoredLinear.from_factors(
            u[:, :rank] * s[:rank], v[:rank], None if own is None else own.detach(), form, dtype=torch.float32
        )
        assert layer.form == form
        replace_module(model, block + name, layer)
    return model


def save(model, folder):
    attach(model)
    model.save_pretrained(folder)
    whisper_tokenizer().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS).save_pretrained(folder)
    return folder


@pytest.fixture
def without_graphs(monkeypatch):
    monkeypatch.setattr(lite_whisper, "RUNTIME", ("not_a_package",))


def by_its_formulas(folder):
    """Whisper with the layers of LiteWhisper's own modeling file, from its two files alone."""

    class LinearLowRank(nn.Module):
        def __init__(self, inputs, outputs, rank):
            super().__init__()
            self.weight1 = nn.Parameter(torch.zeros(inputs, rank))
            self.weight2 = nn.Parameter(torch.zeros(rank, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return x @ self.weight1 @ self.weight2 + self.bias

    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("model_type") == "lite-whisper"
    config = WhisperConfig(**{key: value for key, value in settings.items() if key != "low_rank_config"})
    model = WhisperForConditionalGeneration(config).eval()
    d, inner = config.d_model, config.encoder_ffn_dim
    for layer, ranks in zip(model.model.encoder.layers, settings["low_rank_config"], strict=True):
        for key, rank in ranks.items():
            place = layer if key in ("fc1", "fc2") else layer.self_attn
            sizes = {"fc1": (d, inner), "fc2": (inner, d)}.get(key, (d, d))
            setattr(place, key, LinearLowRank(*sizes, rank))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and missing in ([], ["proj_out.weight"])
    return model


def heard(model):
    """The encoder's states, and logits of the first tokens."""
    features = encoder_input(model)
    with torch.no_grad():
        out = model(input_features=features, decoder_input_ids=torch.tensor([[START, NO_TIMES, 72]]))
    return out.encoder_last_hidden_state, out.logits


def test_the_layout_by_its_formulas(tmp_path, without_graphs):
    model = factor(make_whisper())
    factor(
        model, {"self_attn.q_proj": ("rows", 24), "self_attn.out_proj": ("plain", 4)}
    )  # 24 of 32: larger as plain factors
    factor(model, {"encoder_attn.q_proj": ("rows", 6)}, "model.decoder.layers.0.")
    save(model, tmp_path / "small")
    expected = heard(load_model(str(tmp_path / "small"), device="cpu").model)
    done = export(str(tmp_path / "small"), "lite-whisper", tmp_path / "out", quiet=True)
    for mine, theirs in zip(heard(by_its_formulas(tmp_path / "out")), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ranks = {"v_proj": 3, "k_proj": 5, "fc1": 7, "fc2": 9, "out_proj": 4}
    assert config["low_rank_config"] == [ranks, {}] and config["architectures"] == [
        "LiteWhisperForConditionalGeneration"
    ]
    assert "quantization_config" not in config and "transformers.js_config" not in config
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.encoder.layers.0.fc1.weight1"].shape == (32, 7)
    assert stored["model.encoder.layers.0.fc1.weight2"].shape == (7, 48)
    assert not stored["model.encoder.layers.0.self_attn.k_proj.bias"].any(), (
        "Whisper's keys have no bias, its layers do"
    )
    assert "5 of 6 factored layers of the encoder as plain factors" in done.notes[0]
    assert "1 are merged, since" in done.notes[0] and "1 layers outside" in done.notes[0]
    assert "needs not_a_package: pip install" in done.notes[1] and not (tmp_path / "out" / "onnx").exists()
    assert done.comparison.equal == done.comparison.tokens == 64 and done.comparison.relative < 1e-5
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "small" / name).read_bytes(), "carried along"


def test_factors_in_half_precision_are_the_very_numbers(tmp_path, without_graphs):
    model = factor(make_whisper()).to(torch.float16)
    save(model, tmp_path / "small")
    export(str(tmp_path / "small"), "lite-whisper", tmp_path / "out", quiet=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for name in WHOLE:
        key = f"model.encoder.layers.0.{name}"
        left, right = model.get_submodule(key).factors(torch.float16)
        assert torch.equal(stored[f"{key}.weight1"], right.T) and torch.equal(stored[f"{key}.weight2"], left.T)
    again = export(str(tmp_path / "small"), "lite-whisper", tmp_path / "again", quiet=True)
    assert again.comparison.relative < 1e-2
    for file in (tmp_path / "out").iterdir():
        if file.name != "twofold-export.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), "the same bytes each time"


def test_a_bias_of_keys_keeps_the_factors():
    """Whisper's keys have none, so that a matrix could not have it."""
    bias = torch.linspace(-1, 1, 32)
    model = factor(make_whisper(), {"self_attn.k_proj": ("rows", 24)}, bias=bias)
    assert lite_whisper.make_plain(model, compact_layers(model)) == [{"k_proj": 24}, {}]
    torch.testing.assert_close(model.model.encoder.layers[0].self_attn.k_proj.bias.detach(), bias)


def test_what_transformers_js_asks_for_is_written_in_its_own_form(tmp_path, without_graphs):
    folder = save(factor(make_whisper()), tmp_path / "small")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    features = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    nested = {"feature_extractor": features, "processor_class": "WhisperProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    export(str(folder), "lite-whisper", tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == "WhisperTokenizer"
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == features
    (folder / "processor_config.json").unlink()
    done = export(str(folder), "lite-whisper", tmp_path / "none", quiet=True)
    assert any("has no settings for the features" in note for note in done.notes)
    assert json.loads((tmp_path / "none" / "preprocessor_config.json").read_text()) == features


def shared(model):
    layer = model.model.encoder.layers[0].fc1
    basis, coefficients = SharedBasis.from_factors("b", layer.weight.detach()[:, :8], torch.randn(8, 32))
    replace_module(model, "model.encoder.layers.0.fc1", SharedLinear.on(basis, coefficients, layer.bias.detach()))
    hold_bases(model)
    return model


def bart():
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    ids = {"pad_token_id": END, "decoder_start_token_id": START, "bos_token_id": END, "eos_token_id": END}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **ids)).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factor(bart(), {"fc1": ("rows", 4)}), "takes Whisper models, and .* is a BartForConditionalGeneration"),
        (make_whisper, "takes a factored model, and .* has no factored layer"),
        (lambda: factor(make_whisper(), {"fc1": ("rows", 4)}, "model.decoder.layers.0."), "no factored layer in its encoder"),
        (lambda: shared(make_whisper()), r"layers\.0\.fc1 of .* shares its basis with others"),
    ],
)  # fmt: skip
def test_what_the_layout_does_not_hold_is_refused(make, message, tmp_path):
    model = make()
    if any(isinstance(module, CompactLinear) for module in model.modules()):
        attach(model)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(TwofoldError, match=message):
        export(str(tmp_path / "small"), "lite-whisper", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("make", [make_whisper, bart])
@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_other_formats_of_two_stacks(make, kind, tmp_path):
    """Their decoder reads and writes as others do, behind what the encoder makes of the same input each time."""
    model = make()
    model.save_pretrained(tmp_path / "original")
    attach(factor(model, {"fc1": ("rows", 7)}))
    model.save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    base = {"base": str(tmp_path / "original")} if kind == "lora" else {}
    done = export(str(tmp_path / "small"), kind, tmp_path / "out", quiet=True, **base)
    assert done.comparison.equal == done.comparison.tokens == 64 and done.comparison.relative < 1e-5


def spoken(folder, seconds=0.7):
    """Write a sound as float32 numbers at 16 kHz, and return it."""
    time = np.arange(int(16000 * seconds)) / 16000
    sound = (0.4 * np.sin(2 * np.pi * time * (300 + 900 * time)) * np.sin(9 * time)).astype(np.float32)
    (folder / "sound.f32").write_bytes(sound.tobytes())
    return sound


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny factored Whisper, and what it was exported to with its graphs, the decoder's weights beside one of them."""
    place = tmp_path_factory.mktemp("whisper")
    save(factor(make_whisper()), place / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech_graphs, "LARGEST", 60_000)
        done = export(str(place / "small"), "lite-whisper", place / "out", quiet=True)
    return place, done


@pytest.mark.slow
def test_the_graphs_decode_what_the_model_does(exported):
    place, done = exported
    assert done.comparison.equal == done.comparison.tokens == 64 and done.comparison.relative < 1e-5
    model = load_model(str(place / "small"), device="cpu").model
    features = WhisperFeatureExtractor.from_pretrained(place / "out")(spoken(place), sampling_rate=16000)
    inputs = torch.tensor(np.array(features["input_features"]))
    prompt = torch.tensor([[START, NO_TIMES]])
    tokens = greedy(speech_graphs.SpeechGraphs(place / "out" / "onnx", inputs), prompt, 60)[0][0].tolist()
    whole = prompt[0].tolist()
    for token in tokens:  # each time from the start, with no cache
        with torch.no_grad():
            logits = model(input_features=inputs, decoder_input_ids=torch.tensor([whole])).logits
        assert token == int(logits[0, -1].argmax())
        whole.append(token)
    assert len(set(tokens)) > 5, "no repetition"
    config = json.loads((place / "out" / "config.json").read_text())
    large = {"decoder_model_merged.onnx": 1}
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": large}
    files = sorted(path.name for path in (place / "out" / "onnx").iterdir())
    assert files == ["decoder_model_merged.onnx", "decoder_model_merged.onnx_data", "encoder_model.onnx"]
    graph = b"".join(path.read_bytes() for path in (place / "out" / "onnx").glob("*.onnx"))
    assert b"site-packages" not in graph and str(place).encode() not in graph, "no folder of this machine"


@pytest.mark.slow
def test_several_recordings_at_once(exported):
    import onnxruntime

    place, _ = exported
    encoder, decoder = (
        onnxruntime.InferenceSession(str(place / "out" / "onnx" / file))
        for file in (speech_graphs.ENCODER, speech_graphs.DECODER)
    )
    features = torch.randn(3, 8, 100 * SECONDS, generator=torch.Generator().manual_seed(1))
    states = encoder.run(None, {"input_features": features.numpy()})[0]
    ids = torch.randint(65, 91, (3, 7), generator=torch.Generator().manual_seed(2))
    model = load_model(str(place / "small"), device="cpu").model
    names = speech_graphs.cache_names(1)
    cache = {name: np.zeros((3, 4, 0, 8), np.float32) for name in names}
    outputs = [node.name for node in decoder.get_outputs()]
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=ids).logits.numpy()
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        feed = {"input_ids": ids[:, begin:end].numpy(), "encoder_hidden_states": states, **cache}
        out = dict(zip(outputs, decoder.run(None, feed), strict=True))
        np.testing.assert_allclose(out["logits"], expected[:, begin:end], rtol=1e-3, atol=1e-4)
        for name in names:
            present = out[name.replace("past_key_values", "present")]
            assert present.shape[2] == (end if ".decoder." in name else 0 if begin else 50 * SECONDS)
            cache[name] = present if ".decoder." in name or not begin else cache[name]


@pytest.mark.slow
def test_transformers_js_writes_the_same(exported):
    """The very folder, without a network; its features are its own, from the sound."""
    modules, node = os.environ.get("TWOFOLD_TRANSFORMERS_JS"), shutil.which("node")
    if not modules or not node:
        pytest.skip(
            "needs Node.js, and TWOFOLD_TRANSFORMERS_JS: a folder where npm install @huggingface/transformers was run"
        )
    place, _ = exported
    sound = spoken(place)
    script = Path(__file__).with_name("open_in_transformers_js.mjs")
    said = subprocess.run(
        [node, script, place / "out", place / "sound.f32", "40"], capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr
    answer = json.loads(said.stdout.splitlines()[-1])
    assert answer["model"] == "LiteWhisperForConditionalGeneration"
    loaded = load_model(str(place / "small"), device="cpu")
    features = WhisperFeatureExtractor.from_pretrained(place / "out")(sound, sampling_rate=16000, return_tensors="pt")
    tokens = loaded.model.generate(features["input_features"], max_new_tokens=40)
    text = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]
    assert answer["text"] == text and len(text) == 40 and len(set(text)) > 5
