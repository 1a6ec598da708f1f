"""What holds for every family of models, on a tiny one from its configuration. A new family is one more row."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import tiny
import twofold
from conftest import TEXT
from tiny import Row, made
from twofold.model.kinds.linear import READ_AS_IT_IS
from twofold.task import TASKS, find_task

pytestmark = [pytest.mark.long, pytest.mark.each]  # two factorizations, a checkpoint and a pipeline each

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = {"vocab_size": 265, "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
PICTURE = {"image_size": 16, "patch_size": 4}
SENTENCES, PAIRS = {"samples": tiny.sentences(6)}, {"samples": tiny.pairs(4)}
WINDOWS = {"texts": [TEXT], "tokens": 128, "window": 32}
PICTURES, CLIPS = {"samples": tiny.pictures(6)}, {"samples": tiny.clips(2)}


@dataclass(frozen=True)
class Family(Row):
    """One family: a model and its processor, what it is for, and what else of transformers runs on it.

    Args:
        task: that is found for it.
        dense: what of it stays dense for a reason of its own: words of the reason, by a part of a name.
        writes: what ``generate`` is given, if it writes: the names of inputs.
        pipeline: the kind, what it is given, and settings.
        needs: packages that are no part of the tests' own.
    """

    task: str = ""
    dense: dict[str, str] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    pipeline: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


class PlainConfig(hf.PreTrainedConfig):
    model_type = "plain-torch"


class PlainModel(hf.PreTrainedModel):
    """Blocks and an attention of PyTorch between layers of its own."""

    config_class = PlainConfig
    main_input_name = "input_ids"

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.table, self.before = nn.Embedding(265, 32), nn.Linear(32, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True), 2)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 9))
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> SequenceClassifierOutput:
        states = self.before(self.table(input_ids))
        states = self.encoder(states)
        states = states + self.attention(states, states, states, need_weights=False)[0]
        return SequenceClassifierOutput(logits=self.head(states[:, 0]))


def plain_batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(265, (1, 10), generator=torch.Generator().manual_seed(i))} for i in range(12)]


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=265, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=258,
        feed_forward_proj="gated-gelu", pad_token_id=258, eos_token_id=257,
    )  # fmt: skip
    return made(hf.T5ForConditionalGeneration, config)


def marian() -> Any:
    settings = {**tiny._STACKS, "decoder_start_token_id": 258, "max_position_embeddings": 128}
    return made(hf.MarianMTModel, hf.MarianConfig(**settings))


def wav2vec2() -> Any:
    config = hf.Wav2Vec2Config(
        vocab_size=265, pad_token_id=258, **SIZE, conv_dim=[16, 16], conv_kernel=[10, 8], conv_stride=[8, 8],
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return made(hf.Wav2Vec2ForCTC, config)


def hearing() -> Any:
    return hf.Wav2Vec2Processor(hf.Wav2Vec2FeatureExtractor(), tiny.tokenizer())


def clip() -> Any:
    text = hf.CLIPTextConfig(**WORDS, **SIZE, projection_dim=16)
    vision = hf.CLIPVisionConfig(**PICTURE, **SIZE, projection_dim=16)
    return made(
        hf.CLIPModel, hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )


def two_eyes() -> Any:
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.CLIPProcessor(pixels, tiny.tokenizer())


def swin() -> Any:
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=9
    )
    return made(hf.SwinForImageClassification, config)


def timm_vit() -> Any:
    config = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=9,
        model_args={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    return made(hf.TimmWrapperForImageClassification, config)


def text_model(name: str, task: str, pipeline: str, given: dict[str, Any], **settings: Any) -> Family:
    """A model of texts of the usual sizes."""
    model, config = getattr(hf, name), getattr(hf, name.partition("For")[0].removesuffix("Model") + "Config")
    settings = {**WORDS, **SIZE, "max_position_embeddings": 128, **settings}
    text = "A bridge<mask>" if pipeline == "fill-mask" else "A bridge of stone."
    return Family(lambda: made(model, config(**settings)), tiny.tokenizer, given, task, pipeline=(pipeline, text))


def image_model(name: str, task: str, pipeline: str, **settings: Any) -> Family:
    """A model of images of the usual sizes."""
    model, config = getattr(hf, name), getattr(hf, name.partition("For")[0].removesuffix("Model") + "Config")
    settings = {**PICTURE, **SIZE, **settings}
    convolution = {"patch_embeddings.projection.weight": "convolution"}
    return Family(lambda: made(model, config(**settings)), tiny.viewer, PICTURES, task, convolution,
                  pipeline=(pipeline, tiny.pictures()[0]))  # fmt: skip


FAMILIES: dict[str, Family] = {
    "bert": text_model("BertForMaskedLM", "masked-lm", "fill-mask", WINDOWS),
    "roberta": text_model(
        "RobertaForSequenceClassification",
        "sequence-classification",
        "text-classification",
        SENTENCES,
        num_labels=9,
        max_position_embeddings=400,
    ),
    "deberta-v2": text_model(
        "DebertaV2ForTokenClassification",
        "token-classification",
        "token-classification",
        SENTENCES,
        num_labels=9,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=False,
        conv_kernel_size=3,
    ),
    "modernbert": text_model(
        "ModernBertForMaskedLM",
        "masked-lm",
        "fill-mask",
        WINDOWS,
        global_attn_every_n_layers=2,
        local_attention=8,
        cls_token_id=256,
        sep_token_id=257,
    ),
    "distilbert": text_model(
        "DistilBertModel", "embedding", "feature-extraction", SENTENCES, dim=32, hidden_dim=48, n_layers=2, n_heads=2
    ),
    "t5": Family(t5, tiny.tokenizer, PAIRS, "seq2seq", writes=("input_ids",)),
    "bart": Family(tiny.bart, tiny.tokenizer, PAIRS, "seq2seq", writes=("input_ids",)),
    "marian": Family(marian, tiny.tokenizer, PAIRS, "seq2seq", writes=("input_ids",)),
    "whisper": Family(
        tiny.whisper,
        tiny.listener,
        CLIPS,
        "speech",
        {"conv1.weight": "convolution"},
        ("input_features",),
        ("automatic-speech-recognition", tiny.clips()[0], {"generate_kwargs": {"max_new_tokens": 8}}),
    ),
    "wav2vec2": Family(
        wav2vec2,
        hearing,
        CLIPS,
        "speech",
        {"conv_layers.0.conv.weight": "convolution"},
        pipeline=("automatic-speech-recognition", tiny.clips()[0]),
    ),
    "vit": image_model("ViTForImageClassification", "image-classification", "image-classification", num_labels=9),
    "dinov2": image_model("Dinov2Model", "embedding", "image-feature-extraction", mlp_ratio=2),
    "clip": Family(
        clip,
        two_eyes,
        {"samples": tiny.described(4)},
        "embedding",
        {"patch_embedding.weight": "convolution"},
        pipeline=("zero-shot-image-classification", tiny.pictures()[0], {"candidate_labels": ["a cat", "a bridge"]}),
    ),
    "swin": Family(
        swin,
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}),
        PICTURES,
        "image-classification",
        {"projection.weight": "convolution"},
        pipeline=("image-classification", tiny.pictures()[0]),
    ),
    "llava": Family(
        tiny.llava,
        tiny.reader,
        {"samples": tiny.described(4)},
        "image-text-to-text",
        {"patch_embedding.weight": "convolution"},
        ("input_ids", "pixel_values"),
    ),
    "timm": Family(
        timm_vit,
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}),
        PICTURES,
        "image-classification",
        {"patch_embed.proj.weight": "convolution"},
        needs=("timm", "torchvision"),
    ),
}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    found = FAMILIES[request.param]
    for package in found.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return found


def shrunk(family: Family, **settings: Any) -> Any:
    return twofold.factorize(family.model(), family.processor(), eval_windows=0, quiet=True, **family.given, **settings)


@torch.no_grad()
def test_full_rank_gives_the_outputs_back_and_every_weight_is_in_the_plan(family):
    dense, task = family.model(), TASKS.get(family.task)
    assert find_task(dense) is task
    whole, samples = shrunk(family, keep=1.0, form="plain"), family.samples(task)
    for batch in samples:
        torch.testing.assert_close(task.outputs(whole, batch), task.outputs(dense, batch), rtol=1e-3, atol=1e-3)
    plan = whole.twofold_plan
    reasons = {entry.name: entry.reason for entry in plan.dense}
    named = {f"{entry.name}.{leaf}" for entry in plan.entries for leaf in ("weight", "bias")} | reasons.keys()
    assert {name for name, _ in dense.named_parameters()} <= named and all(reasons.values())
    assert sum(p.numel() for p in dense.parameters()) == plan.model_before
    for name, words in family.dense.items():
        assert [words in reason for place, reason in reasons.items() if place.endswith(name)].count(True) >= 1


@torch.no_grad()
def test_a_smaller_model_is_saved_loaded_and_used_as_any_other(family, tmp_path):
    task = TASKS.get(family.task)
    small = shrunk(family, keep=0.6)
    assert small.twofold_plan.keep <= 0.6
    small.save_pretrained(tmp_path)
    family.processor().save_pretrained(tmp_path)
    again = tiny.aligned(type(small).from_pretrained(tmp_path))
    assert {n: b.tolist() for n, b in again.named_buffers()} == {n: b.tolist() for n, b in small.named_buffers()}
    samples = family.samples(task)
    for batch in samples:
        assert torch.equal(task.outputs(again, batch), task.outputs(small, batch))
    if family.writes:
        given = {name: samples.small[name] for name in family.writes}
        how = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6}
        assert torch.equal(again.generate(**given, **how), small.generate(**given, **how))
    if family.pipeline:
        kind, given, *settings = family.pipeline
        given = Image.fromarray(given) if "image" in kind else given
        assert hf.pipeline(kind, model=str(tmp_path))(given, **dict(*settings))


@torch.no_grad()
def test_blocks_of_pytorch_in_a_class_of_ones_own(tmp_path):
    """No task knows it; what the fast paths read as it is stays dense, and they give the same."""
    logits = lambda model, batch: model(**batch).logits  # noqa: E731
    given = {"outputs": logits, "samples": plain_batches(), "eval_windows": 0, "quiet": True}
    dense = made(PlainModel, PlainConfig())
    whole = twofold.factorize(made(PlainModel, PlainConfig()), keep=1.0, form="plain", **given)
    small = twofold.factorize(made(PlainModel, PlainConfig()), keep=0.6, **given)
    reasons = [entry.reason for entry in small.twofold_plan.dense]
    assert reasons.count(READ_AS_IT_IS) == 2 * 4 + 2
    assert {entry.name for entry in small.twofold_plan.entries} == {"before", "head.0", "head.2"}
    small.save_pretrained(tmp_path)
    again = tiny.aligned(PlainModel.from_pretrained(tmp_path))
    for batch in plain_batches():
        torch.testing.assert_close(logits(whole, batch), logits(dense, batch), rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(again, batch), logits(small, batch))
