"""A sentence encoder that Twofold writes is one for sentence-transformers, and is measured as that library measures it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import tiny
import twofold


@pytest.mark.long
def test_a_factored_encoder_loads_and_gives_the_features_that_are_measured(tmp_path):
    tiny.bert().save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    transformer = Transformer(str(tmp_path / "plain"))
    SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="cls")]).save(str(tmp_path / "dense"))
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(tiny.sentences(40)), encoding="utf-8")
    run = twofold.compress(
        str(tmp_path / "dense"), tmp_path / "small", keep=0.6, calibration=str(sentences), samples=30, quiet=True
    )
    assert run.task == "embedding" and run.unit == "samples" and "modules.json" in run.carried
    small = SentenceTransformer(str(tmp_path / "small"))
    assert any(isinstance(module, twofold.FactoredLinear) for module in small.modules())
    rows = tmp_path / "pairs.jsonl"
    given = [{"sentence1": a, "sentence2": b, "score": i % 5} for i, (a, b) in enumerate(tiny.pairs(10))]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    result = twofold.evaluate(str(tmp_path / "small"), data=str(rows), against=str(tmp_path / "dense"), quiet=True)
    ours = result.models[1]
    texts = [row[name] for row in given for name in ("sentence1", "sentence2")]
    vectors = torch.tensor(np.stack([small.encode(text) for text in texts]))  # one by one: nothing is padded
    dense = SentenceTransformer(str(tmp_path / "dense"))
    originals = torch.tensor(np.stack([dense.encode(text) for text in texts]))
    cosines = torch.cosine_similarity(vectors, originals)
    assert ours.agreement == pytest.approx(float(cosines.mean()), abs=1e-4)
    assert ours.divergence == pytest.approx(32 * float((1 - cosines).mean()), abs=1e-3)
    assert -1 <= ours.scores["spearman"] <= 1
