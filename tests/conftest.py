"""Tiny models of many architectures from their configurations, and a byte tokenizer, so that no test needs a hub."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core; so have those that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from short import shorten

pytest.register_assert_rewrite("conformance")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.disable_progress_bar()
# On a machine that decides about a change, the same change gives the same draws; elsewhere each run draws anew.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
EACH = 3  # of a long test's cases, make test runs every third
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = 264

_SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(**_SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": lambda: LlamaConfig(
        **_SHAPE, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    ),
    "mistral": lambda: MistralConfig(
        **_SHAPE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=16,
    ),
    "qwen2": lambda: Qwen2Config(
        **_SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "opt": lambda: OPTConfig(
        **_SHAPE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
}  # fmt: skip
ARCHITECTURES = sorted(CONFIGS)


def make_model(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights that are large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    specials = ["<bos>", "<eos>", "<pad>"]
    vocabulary |= {name: 256 + i for i, name in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def interruptible() -> None:
    """Let Ctrl-C reach a process that is about to start; one of tests in the background would inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


TEXT = "".join(
    f"Paragraph {i}: the {w} of {n} stands by the river, and its people tell of the year {1300 + 7 * i}.\n"
    for i, (w, n) in enumerate(
        (w, n)
        for w in ("castle", "market", "bridge", "garden", "harbour")
        for n in ("Arles", "Bruges", "Cádiz", "Derry")
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave cases of long tests to make check-slow: make test runs every third one, and all of those marked ``each``."""
    cases: dict[str, int] = {}
    for item in items:
        if "long" in item.keywords and "slow" not in item.keywords and hasattr(item, "callspec"):
            test = item.nodeid.partition("[")[0]
            cases[test] = cases.get(test, -1) + 1
            if cases[test] % EACH and "each" not in item.keywords:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No test reads or leaves anything in the user's cache, but those that need the built-in model fetch it once."""
    if "real" not in request.keywords:
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No run draws figures or writes long answers, three quarters of the time of a tiny one, but those of ``whole``."""
    if "whole" not in request.keywords:
        shorten(monkeypatch.setattr)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code of a checkpoint is copied to a cache before it is run; no test leaves any in the user's, or finds another's."""
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    path = [*sys.path]
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Any:
    return make_model()


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, _tiny: Path) -> Path:
    """A tiny Llama on disk, for this test alone."""
    return shutil.copytree(_tiny, tmp_path / "tiny")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
