"""Tiny models of every task from their configurations, with processors and samples that need no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf

from conftest import VOCABULARY, make_tokenizer
from twofold.model.load import LoadedModel
from twofold.model.processor import parts_of
from twofold.recipe import make_recipe

_TEXT = {"vocab_size": VOCABULARY + 1, "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
BERT = {
    **_TEXT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
_STACKS = {
    **_TEXT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 257,
}  # fmt: skip
RATE = 16_000


def made(model: Callable[[Any], Any], config: Any, seed: int = 0) -> Any:
    """A model with random weights that are large enough to matter."""
    torch.manual_seed(seed)
    found = model(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if not parameter.requires_grad:  # tables of sines, which some classes make anew when they are loaded
                continue
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


def aligned(model: Any) -> Any:
    """Give each tensor memory of its own: those of a file begin anywhere, and some processors then round products otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def bert() -> Any:
    return made(hf.BertModel, hf.BertConfig(**BERT))


def bert_masked() -> Any:
    return made(hf.BertForMaskedLM, hf.BertConfig(**BERT))


def bert_classes() -> Any:
    return made(hf.BertForSequenceClassification, hf.BertConfig(**BERT, num_labels=3))


def bert_tokens() -> Any:
    return made(hf.BertForTokenClassification, hf.BertConfig(**BERT, num_labels=3))


def bart() -> Any:
    return made(hf.BartForConditionalGeneration, hf.BartConfig(**_STACKS, max_position_embeddings=128))


def whisper() -> Any:
    config = hf.WhisperConfig(
        **_STACKS, num_mel_bins=16, max_source_positions=50, max_target_positions=24, max_length=16,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return made(hf.WhisperForConditionalGeneration, config)


def vit() -> Any:
    config = hf.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_labels=3,
    )  # fmt: skip
    return made(hf.ViTForImageClassification, config)


def llava() -> Any:
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 48}  # fmt: skip
    text = {**_TEXT, "vocab_size": VOCABULARY + 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**text), image_token_index=260
    )
    return made(hf.LlavaForConditionalGeneration, config)


def tokenizer() -> Any:
    """One token a byte, and a mask. Made anew: a processor that is saved leaves its name on the tokenizer that it holds."""
    found = make_tokenizer()
    found.add_special_tokens({"mask_token": "<mask>"})
    return found


def listener() -> Any:
    """A feature extractor with a tokenizer."""
    extractor = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1, n_fft=400, hop_length=160)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return hf.WhisperProcessor(extractor, hf.WhisperTokenizer(vocab=tokenizer().get_vocab(), merges=[], **special))


def reader() -> Any:
    """An image processor with a tokenizer that has a token for pictures."""
    words = make_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<mask>", "<image>"]})
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.LlavaProcessor(pixels, words, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
                             num_additional_image_tokens=1)  # fmt: skip


def viewer() -> Any:
    return hf.ViTImageProcessor(size={"height": 16, "width": 16})


def sentences(count: int = 12) -> list[str]:
    places = ("Arles", "Bruges", "Cádiz", "Derry")
    return [f"The bridge of {places[i % 4]} is {100 + 7 * i} paces long." for i in range(count)]


def pairs(count: int = 12) -> list[tuple[str, str]]:
    return [(text, text[::-1]) for text in sentences(count)]


def clips(count: int = 4) -> list[Any]:
    draw = np.random.default_rng(0)
    time = np.arange(RATE // 2) / RATE
    return [
        (np.sin(2 * np.pi * (200 + 60 * i) * time) + 0.1 * draw.standard_normal(len(time))).astype(np.float32)
        for i in range(count)
    ]


def pictures(count: int = 12) -> list[Any]:
    return [np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8) for i in range(count)]


def described(count: int = 8) -> list[dict[str, Any]]:
    return [{"image": image, "text": text} for image, text in zip(pictures(count), sentences(count), strict=True)]


@dataclass(frozen=True)
class Row:
    """One task: a model and a processor of its family, and what factorize is called with to have samples that both can read."""

    model: Callable[[], Any]
    processor: Callable[[], Any]
    given: dict[str, Any]

    def samples(self, task: Any) -> Any:
        """The samples of a model of this row."""
        given = self.given.get("samples", self.given.get("texts"))
        settings = {name: value for name, value in self.given.items() if name not in ("samples", "texts")}
        recipe = make_recipe({"model": "m", "keep": 0.5, **settings})
        parts = parts_of(self.processor())
        tokenizer = parts.pop("tokenizer", None)
        loaded = LoadedModel(self.model(), tokenizer, "m", None, torch.float32, processors=parts)
        return task.data(loaded, recipe, "", given, held_out=1, quiet=True).samples
