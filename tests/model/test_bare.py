"""Models with something around them or on them: refused in one sentence, or factorized as the plain model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import twofold
from conftest import ARCHITECTURES, TEXT, make_model, make_tokenizer
from twofold.calibrate.fingerprint import model_hash
from twofold.errors import TwofoldError
from twofold.model.bare import check_bare

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(3, 30)[None]
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def factorized(model: Any, **settings: Any) -> Any:
    settings = {"keep": 0.6, "texts": [TEXT], "tokens": 256, "window": 32, "quiet": True} | settings
    return twofold.factorize(model, make_tokenizer(), **settings)


def layer(model: Any) -> Any:
    return model.model.layers[0].self_attn.q_proj


def also(model: Any, act: Callable[[Any], object]) -> Any:
    act(model)
    return model


def dispatched(model: Any, device: str) -> Any:
    from accelerate import cpu_offload, dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True) if device == "cpu" else cpu_offload(model, "cpu")


def in_int8(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def in_fp8(model: Any) -> None:
    layer(model).weight = nn.Parameter(layer(model).weight.detach().to(torch.float8_e4m3fn), False)


def two_places(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = layer(model)


def one_parameter(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


class Around(nn.Module):
    """As wrappers that put a value head on a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.pretrained_model = model.config, model


def with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(len(model.lm_head.weight)))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


UPON: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapter": (lambda m: get_peft_model(m, LORA), "merge_and_unload"),
    "adapter inside": (lambda m: inject_adapter_in_model(LORA, m), "q_proj of the model carries an adapter"),
    "adapter of transformers": (lambda m: also(m, lambda m: m.add_adapter(LORA)), "carries an adapter"),
    "prefix": (lambda m: get_peft_model(m, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")), "adapter"),
    "compiled": (torch.compile, r"model\._orig_mod"),
    "compiled in place": (lambda m: also(m, lambda m: m.compile()), "compiled in place"),
    "a layer compiled": (lambda m: also(m, lambda m: setattr(m.model.layers, "0", torch.compile(m.model.layers[0]))), "layers.0"),
    "parallel": (nn.DataParallel, r"model\.module"),
    "hooks of accelerate": (lambda m: dispatched(m, "cpu"), "accelerate"),
    "offloaded": (lambda m: dispatched(m, "disk"), "accelerate"),
    "meta": (lambda m: m.to("meta"), "meta device|no numbers in memory|no weights yet"),
    "hook": (lambda m: also(m, lambda m: layer(m).register_forward_hook(lambda *a: 2 * a[2])), "q_proj of the model has a hook"),
    "hook before": (
        lambda m: also(m, lambda m: m.model.register_forward_pre_hook(lambda *a: None)),
        "layer model of the model has a hook",
    ),
    "weight norm": (lambda m: also(m, lambda m: parametrizations.weight_norm(layer(m))), "parametrization"),
    "old weight norm": (lambda m: also(m, lambda m: nn.utils.weight_norm(layer(m))), "has a hook, WeightNorm"),
    "orthogonal": (lambda m: also(m, lambda m: parametrizations.orthogonal(layer(m))), "parametrization"),
    "parametrized table": (
        lambda m: also(m, lambda m: nn.utils.parametrize.register_parametrization(m.model.embed_tokens, "weight", Doubled())),
        "embed_tokens of the model has a parametrization",
    ),
    "pruned": (lambda m: also(m, lambda m: prune.l1_unstructured(layer(m), "weight", 0.5)), r"prune\.remove"),
    "forward": (
        lambda m: also(m, lambda m: setattr(layer(m), "forward", lambda x: 2 * x)),
        "forward that is not that of its class",
    ),
    "torchao": (in_int8, "not a plain tensor|quantized"),
    "fp8": (lambda m: also(m, in_fp8), "float8_e4m3fn"),
    "two places": (lambda m: also(m, two_places), "are one weight"),
    "one parameter": (lambda m: also(m, one_parameter), "are one weight"),
    "wrapper": (Around, r"got Around; pass the model inside it, model\.pretrained_model"),
    "no model": (lambda m: nn.Linear(2, 2), "takes a transformers model or its name, got Linear"),
    "quantized by torch": (
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
        r"no model\.layers\.0\.self_attn\.q_proj\.weight \(a torch\.ao\.nn\.quantized.* stands there\)",
    ),
    "bias": (lambda m: also(m, with_bias), r"the model has lm_head\.bias, which a LlamaForCausalLM of its configuration has not"),
    "one more layer": (
        lambda m: also(m, lambda m: m.model.layers.append(copy.deepcopy(m.model.layers[1]))),
        r"the model has model\.layers\.2\.\S+weight, which",
    ),
    "no norm": (lambda m: also(m, lambda m: setattr(m.model, "norm", nn.Identity())), r"no model\.norm\.weight .*Identity"),
    "no projection": (
        lambda m: also(m, lambda m: setattr(m.model.layers[1].self_attn, "q_proj", nn.Identity())),
        r"the model has no model\.layers\.1\.self_attn\.q_proj\.weight .*set model\.config to what the model is",
    ),
    "fewer layers": (lambda m: also(m, lambda m: m.model.layers.pop(1)), r"the model has no model\.layers\.1\.self_attn"),
    "larger table": (
        lambda m: also(m, lambda m: (m.resize_token_embeddings(270), setattr(m.config, "vocab_size", 264))),
        r"model\.embed_tokens\.weight of the model is 270 × 32, and a LlamaForCausalLM of its configuration has 264 × 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UPON)
def test_what_stands_around_or_on_a_model_is_told_in_one_sentence(name: str) -> None:
    put, words = UPON[name]
    with pytest.raises(TwofoldError, match=words):
        factorized(put(make_model()))
    with pytest.raises(TwofoldError, match=words):
        twofold.factorize(put(make_model()), init="spectral", keep=0.6)


@pytest.mark.parametrize("name", ["adapter", "adapter inside", "compiled", "parallel"])
def test_it_is_told_before_a_factored_model_is_optimized(name: str) -> None:
    from factored import factored_model

    model = factored_model()
    with pytest.raises(TwofoldError, match=UPON[name][1]):
        twofold.optimize(UPON[name][0](model), merge="never", quiet=True)


def capturing(model: Any) -> None:
    model(input_ids=IDS, output_hidden_states=True, output_attentions=True)


SAME: dict[str, Callable[[Any], object]] = {
    "training": lambda m: m.train(),
    "gradient checkpointing": lambda m: (m.train(), m.gradient_checkpointing_enable()),
    "inputs that need gradients": lambda m: m.enable_input_require_grads(),
    "frozen": lambda m: m.requires_grad_(False),
    "partly frozen": lambda m: layer(m).requires_grad_(False),
    "captured": capturing,
    "pruned for good": lambda m: (prune.identity(layer(m), "weight"), prune.remove(layer(m), "weight")),
}


@pytest.fixture(scope="module")
def plain() -> Any:
    """A model that was factorized as it was made."""
    return factorized(make_model())


@pytest.mark.parametrize("name", SAME)
def test_modes_change_nothing_of_the_result(name: str, plain: Any) -> None:
    model = make_model()
    SAME[name](model)
    modes = {key: module.training for key, module in model.named_modules()}
    result = factorized(model)
    assert all(module.training == modes.get(key, model.training) for key, module in result.named_modules())
    assert torch.equal(logits(result.eval()), logits(plain))


def test_dropout_is_off_while_a_model_is_measured() -> None:
    from transformers import GPT2LMHeadModel

    config = make_model("gpt2").config
    assert config.resid_pdrop > 0
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    bare = factorized(copy.deepcopy(model).eval())
    result = factorized(model.train())
    assert result.training
    assert torch.equal(logits(result.eval()), logits(bare))


def test_each_weight_keeps_its_dtype() -> None:
    model = make_model().to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm") or name == "model.embed_tokens":  # the first weight has another dtype than most
            module.float()
    table = model.model.embed_tokens.weight.detach().clone()
    result = factorized(model)
    dtypes = {name: parameter.dtype for name, parameter in result.named_parameters()}
    assert torch.equal(result.model.embed_tokens.weight, table)
    assert {dtype for name, dtype in dtypes.items() if "norm" in name or "embed" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "proj" in name} == {torch.bfloat16}


def tripled(model: Any) -> None:
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        result.logits = 3 * result.logits
        return result

    model.forward = forward


OTHERWISE: dict[str, tuple[Callable[[Any], object], str]] = {
    "forward": (tripled, "the model has a forward that is not that of its class"),
    "forward of a block": (
        lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x: 0 * x),
        r"the layer model\.layers\.1\.mlp of the model has a forward",
    ),
    "activation": (
        lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
        r"mlp\.act_fn of the model is ReLU, where its class and configuration have SiLU",
    ),
    "one more part": (
        lambda m: setattr(m, "value", nn.LayerNorm(32)),
        "the layer value of the model is LayerNorm, where its class and configuration have nothing",
    ),
    "number": (
        lambda m: setattr(m.config, "rms_norm_eps", 0.5),
        r"has variance_epsilon = 1e-06, where its class and configuration have 0\.5; so it is in 4 further places",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_of_the_class_is_noted_and_calibrated_anew(name: str) -> None:
    change, words = OTHERWISE[name]
    models = [make_model(), make_model(), make_model()]
    for model in models[1:]:
        change(model)
    hashes = [model_hash(model) for model in models]
    assert hashes[0] == model_hash(models[0])
    assert hashes[1] != hashes[0]
    assert (hashes[1] != hashes[2]) == ("forward" in name)  # what another forward computes can't be told
    assert [note for note in factorized(models[1]).twofold_plan.notes if re.search(words, note)]
    started = twofold.factorize(models[2], init="spectral", keep=0.6)
    assert [note for note in started.twofold_plan.notes if re.search(words, note)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_nothing_to_say_of_a_plain_model(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    assert check_bare(model) == []
    assert check_bare(also(model, lambda m: m.resize_token_embeddings(270))) == []
    model.save_pretrained(tmp_path)
    assert check_bare(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == []
    assert check_bare(factorized(make_model(architecture))) == []


def test_a_class_that_takes_more_than_a_configuration_is_not_refused() -> None:
    class Larger(LlamaForCausalLM):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)

    assert re.search("no Larger can be made of its configuration alone", check_bare(Larger(make_model().config, 2))[0])
