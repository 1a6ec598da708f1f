"""examples/translation on sentences that are made up: trained dense and in factors, taken up again after a stop, and scored."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MarianConfig, MarianMTModel

import twofold
from twofold.nn.layers.factored import FactoredLinear

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "translation"
WORDS = {
    "The": "Der", "dog": "Hund", "man": "Mann", "boy": "Junge", "fish": "Fisch", "bear": "Bär",
    "eats": "isst", "sees": "sieht", "swims": "schwimmt", "today": "heute", "alone": "allein", "here": "hier",
}  # fmt: skip
EPOCHS = 2
SMALL = f"--width 32 --layers 1 --vocabulary 320 --batch-tokens 100 --lr 1e-2 --threads 1 --epochs {EPOCHS}".split()


def marian() -> MarianConfig:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return MarianConfig(vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1, pad_token_id=0, **heads)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in ("pairs", "train", "score", "steps"):
        sys.modules.pop(name, None)


@pytest.fixture
def pairs(tmp_path: Path, example: None) -> Path:
    """Write 50 made-up pairs as Multi30k's files, and let the example make its rows of them."""
    words = list(WORDS)
    sentences = [f"{a} {b} {c} {d}." for a, b, c, d in itertools.product(["The"], words[1:6], words[6:9], words[9:])]
    sentences = [*sentences, *(f"{a} {b} {c}." for a, b, c in itertools.product(["The"], words[1:3], words[6:9]))][:50]
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("train", "val", "test_2016_flickr"):
        german = [" ".join(WORDS[word] for word in sentence[:-1].split()) + "." for sentence in sentences]
        (raw / f"{name}.en").write_text("\n".join(sentences) + "\n", "utf-8")
        (raw / f"{name}.de").write_text("\n".join(german) + "\n", "utf-8")
    importlib.import_module("pairs").main([str(raw), str(tmp_path / "pairs")])
    return tmp_path / "pairs"


@pytest.mark.long
def test_the_example_learns_and_goes_on_after_a_stop(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, score, steps = map(importlib.import_module, ("train", "score", "steps"))
    dense, scratch, stopped = (str(tmp_path / name) for name in ("dense", "scratch", "stopped"))

    def losses(*more: str) -> list[float]:
        train.main([str(pairs), *more, *SMALL])
        return [float(loss) for loss in re.findall(r"dev (\S+)", capsys.readouterr().out)]

    factored = ("--keep", "0.5")
    for curve in (losses(dense), losses(scratch, *factored)):
        assert len(curve) == EPOCHS and curve[-1] < 0.95 * curve[0]

    def save_and_stop(*args: object, **state: object) -> None:
        save(*args, **state)
        raise KeyboardInterrupt

    save = train.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", save_and_stop)
        losses(stopped, *factored)
    capsys.readouterr()
    assert len(losses(stopped, *factored)) == EPOCHS - 1
    whole, resumed = (load_file(Path(folder) / "model.safetensors") for folder in (scratch, stopped))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    rows = score.main([str(pairs / "test.jsonl"), dense, scratch, "--limit", "5", "--threads", "1"])
    assert [row["sentences"] for row in rows] == [5, 5] and rows[1]["parameters"] < rows[0]["parameters"]
    times = steps.main([str(pairs), dense, scratch, "--pairs", "1", "--batch-tokens", "50", "--threads", "1"])
    assert times["dense_s"] > 0 and times["factorized_s"] > 0


def test_translations_come_back_in_the_order_of_their_sentences(example: None) -> None:
    class Echo:
        def generate(self, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
            return input_ids

    train, score = map(importlib.import_module, ("train", "score"))
    texts = ["Ein Bär, groß.", "a", "The man sees a fish.", "The dog"]
    tokenizer = train.make_tokenizer([(text, text) for text in texts], 300)
    assert score.translate(Echo(), tokenizer, texts, 2) == texts


def test_both_stacks_of_a_translation_model_are_factorized_before_it_is_trained(tmp_path: Path) -> None:
    model = twofold.factorize(marian(), init="spectral", keep=0.5)  # the configuration names no class
    assert type(model) is MarianMTModel
    layers = {name for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    projections = ["fc1", "fc2", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))]
    crossed = [f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    expected = {f"model.encoder.layers.0.{name}" for name in projections}
    assert layers == expected | {f"model.decoder.layers.0.{name}" for name in [*projections, *crossed]}
    dense = {entry.name: entry.reason for entry in model.twofold_plan.entries if not entry.replaced}
    assert not dense.keys() - {"lm_head"}

    tokens = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 8]])}
    twofold.training_optimizer(model, lr=1e-2)
    model(**tokens, labels=torch.tensor([[9, 8, 1]])).loss.backward()
    assert all(layer.reduce.weight.grad.abs().sum() > 0 for name in layers for layer in [model.get_submodule(name)])
    model.eval().save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["MarianMTModel"]
    again = MarianMTModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(model(**tokens).logits, again(**tokens).logits)
