"""A model's image processor and feature extractor: from its folder or from the caller, once, and never by code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
)

from clips import RATE, picture, put, tone
from conftest import make_tokenizer
from twofold.errors import TwofoldError
from twofold.model.load import LoadedModel, load_model
from twofold.model.processor import feature_extractor_of, image_processor_of, parts_of
from twofold.model.written import Companions
from twofold.recipe import make_recipe
from twofold.run.open import open_loaded


def loaded_from(folder: Path | None, **more: Any) -> LoadedModel:
    return LoadedModel(torch.nn.Linear(1, 1), None, "tiny", folder, torch.float32, **more)


def tiny_vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).eval()


def test_they_are_those_of_the_folder_and_read_once(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    processor = image_processor_of(loaded)
    assert image_processor_of(loaded) is processor
    pixels = processor(images=picture(), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 16, 16)
    with torch.no_grad():
        assert torch.isfinite(loaded.model(**pixels).logits).all()
    found = Companions.of(loaded)
    assert found.record["carried"] == ["preprocessor_config.json"] and not found.notes


@pytest.mark.parametrize("extractor", [WhisperFeatureExtractor(feature_size=20), Wav2Vec2FeatureExtractor()])
def test_feature_extractors_of_speech(extractor, tmp_path):
    extractor.save_pretrained(tmp_path)
    for found in (
        feature_extractor_of(loaded_from(tmp_path)),
        feature_extractor_of(loaded_from(None, fetch=lambda: tmp_path)),
    ):
        assert type(found) is type(extractor) and found.sampling_rate == RATE
        batch = found(tone(), sampling_rate=RATE, return_tensors="np")
        expected = extractor(tone(), sampling_rate=RATE, return_tensors="np")
        assert all((batch[name] == expected[name]).all() for name in expected)


def test_a_caller_gives_a_processor_or_a_part_of_one(tmp_path):
    images, clips, tokenizer = CLIPImageProcessorPil(), Wav2Vec2FeatureExtractor(), make_tokenizer()
    assert parts_of(None) == {} and parts_of(tokenizer) == {"tokenizer": tokenizer}
    assert parts_of(images) == {"image_processor": images} and parts_of(clips) == {"feature_extractor": clips}
    assert parts_of(object()).keys() == {"tokenizer"}
    recipe = make_recipe({"model": "tiny", "keep": 0.5, "objective": "svd", "task": "image-classification"})
    loaded = open_loaded(tiny_vit(), images, recipe).loaded
    assert image_processor_of(loaded) is images and loaded.tokenizer is None
    both = Wav2Vec2Processor(clips, tokenizer)
    assert parts_of(both) == {"feature_extractor": clips, "tokenizer": tokenizer, "processor": both}


def test_a_model_without_one_says_so(tmp_path):
    words = (
        "the model tiny has no {}; put its preprocessor_config.json beside the weights, or pass processor= with a model"
    )
    for folder in (tmp_path, None):
        with pytest.raises(TwofoldError, match=words.format("image processor")):
            image_processor_of(loaded_from(folder))
        with pytest.raises(TwofoldError, match=words.format("feature extractor")):
            feature_extractor_of(loaded_from(folder))


BAD = {
    "not JSON": "{",
    "no object": "[1]",
    "unknown": json.dumps({"image_processor_type": "UnheardOf", "feature_extractor_type": "UnheardOf"}),
    "a module": json.dumps({"image_processor_type": "os.system", "feature_extractor_type": "os.system"}),
    "a number": json.dumps({"image_processor_type": 3, "feature_extractor_type": 3}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("of", [image_processor_of, feature_extractor_of])
def test_a_file_that_can_not_be_used_is_told_in_a_sentence(name, of, tmp_path):
    put(tmp_path, {"preprocessor_config.json": BAD[name]})
    with pytest.raises(TwofoldError, match=r"of tiny can't be made of its preprocessor_config.json: .+") as error:
        of(loaded_from(tmp_path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("rate", [0, -1, None, "16000"])
def test_a_feature_extractor_without_a_rate_is_refused(rate, tmp_path):
    extractor = Wav2Vec2FeatureExtractor()
    settings = json.loads(extractor.to_json_string()) | {"sampling_rate": rate}
    put(tmp_path, {"preprocessor_config.json": json.dumps(settings)})
    with pytest.raises(TwofoldError, match=f"the feature extractor of tiny has a sampling rate of {rate}"):
        feature_extractor_of(loaded_from(tmp_path))


@pytest.mark.parametrize(
    ("of", "auto"), [(image_processor_of, "AutoImageProcessor"), (feature_extractor_of, "AutoFeatureExtractor")]
)
def test_code_of_a_checkpoint_is_not_run_unless_it_is_trusted(of, auto, tmp_path, modules_cache):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import Wav2Vec2FeatureExtractor, ViTImageProcessorPil\n"
    code += (
        "class Mine(Wav2Vec2FeatureExtractor): pass\n"
        if "Feature" in auto
        else "class Mine(ViTImageProcessorPil): pass\n"
    )
    put(
        tmp_path / "model", {"mine.py": code, "preprocessor_config.json": json.dumps({"auto_map": {auto: "mine.Mine"}})}
    )
    put(tmp_path / "model", {"config.json": json.dumps({"model_type": "llama"})})
    with pytest.raises(TwofoldError, match=r"of tiny has code of its own; .* by `trust_remote_code`"):
        of(loaded_from(tmp_path / "model"))
    assert not mark.exists()
    assert type(of(loaded_from(tmp_path / "model", trusted=True))).__name__ == "Mine" and mark.exists()
