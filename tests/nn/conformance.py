"""What holds of every storage layer: a suite that the tests of each layer inherit.

A layer is drawn in many sizes, and stands in a model of its own (``Home``) with what it refers to: a basis, or the table of an
embedding. In the last tests it stands in a model of transformers.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conftest import make_model
from twofold import TwofoldError
from twofold.checkpoint.plugin import FORMAT_VERSION, attach, stored_kind
from twofold.model.kinds import dense_weight
from twofold.nn.compact import LAYERS, Compact, CompactLinear
from twofold.nn.int_matrix import IntLinear, IntMatrix, groups
from twofold.nn.layers.tied import TiedLinear
from twofold.nn.places import cast_weights, hold_bases, replace_module
from twofold.planning.plan import Plan, PlanEntry
from twofold.refine.steps.training import trainable

IDS = torch.arange(20)[None]
Kind = TypeVar("Kind", bound=IntMatrix)


class Drawn:
    """The size of a layer, and the numbers that it is made of, in float64.

    Args:
        m, n: out and in; or how many rows an embedding has, and how long they are.
        share: of the largest size, where there is one to choose, such as a rank.
        bits, group: of integers.
    """

    def __init__(
        self, m: int, n: int, share: float = 0.3, bits: int = 4, group: int | None = 8, bias: bool = True,
        transposed: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.m, self.n, self.share, self.bits, self.group, self.transposed = m, n, share, bits, group, transposed
        self.generator = torch.Generator().manual_seed(seed)
        self.bias = self.matrix(1, m)[0] if bias or transposed else None  # a Conv1D has one

    def size(self, largest: int) -> int:
        """Return a size from 1 to the largest."""
        return 1 + round(self.share * (largest - 1))

    def matrix(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)

    def order(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator)

    def integers(self, rows: int, columns: int, kind: type[Kind]) -> tuple[Kind, Tensor]:
        """Return a matrix in integers, and the same in floating point."""
        half = 2 ** (self.bits - 1)
        codes = torch.randint(-half, half, (rows, columns), generator=self.generator)
        scales = torch.rand(rows, groups(columns, self.group), generator=self.generator).add(0.1).div(half).bfloat16()
        wide = scales.double().repeat_interleave(self.group or columns, 1)[:, :columns]
        return kind.of(codes, scales, self.bits, self.group), codes * wide


DRAWN = st.builds(
    Drawn, m=st.integers(3, 20), n=st.integers(3, 20), share=st.floats(0, 1), bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 8, 64]), bias=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip


def drawn(test: Any) -> Any:
    """Run a test of the suite on layers of many sizes; the classes that inherit it do so one by one."""
    check = [HealthCheck.differing_executors]
    return settings(max_examples=6, deadline=None, suppress_health_check=check)(given(draw=DRAWN)(test))


class Made(NamedTuple):
    """A layer, the matrix (m, n) that it stands for, and how many numbers represent it, with those that it refers to."""

    layer: Compact
    weight: Tensor
    numbers: int

    @property
    def home(self) -> Home:
        """The layer in a model of its own."""
        return Home(self.layer, self.layer.embedding if isinstance(self.layer, TiedLinear) else None)


class Home(nn.Module):
    """A model of one layer, and of what it refers to."""

    def __init__(self, layer: nn.Module, table: nn.Module | None = None) -> None:
        super().__init__()
        self.table = table
        self.layer = layer
        hold_bases(self)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def compact(self) -> dict[str, Compact]:
        """Return the modules that hold numbers, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Compact)}

    def wrong(self) -> list[str]:
        """Say what is wrong with the integers of all modules."""
        asked = [m.index_error() for m in self.modules() if isinstance(m, Compact | IntMatrix)]
        return [error for error in asked if error is not None]


class CompactSuite:
    """What holds of every storage layer. A subclass says how one is made, and tests what is special to it."""

    kind: ClassVar[type[Compact]]
    forms: ClassVar[tuple[str, ...]]
    integers: ClassVar[bool] = False  # whether its children may be integers too, by ``hold_integers``
    trained: ClassVar[tuple[str, ...]] = ()  # the parameters of ``Home`` that are trained, beside the bias
    said: ClassVar[tuple[str, ...]] = ("rank",)  # what its words name
    places: ClassVar[Mapping[str, str]] = {  # architecture → a weight whose place it takes
        "mistral": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc",
    }  # fmt: skip

    def make(self, form: str, draw: Drawn) -> Made:
        """Make a layer of float64, of floating point where it may have either."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            cases = [(form, held) for held in ([False, True] if self.integers else [False]) for form in self.forms]
            ids = [f"{form}-integers" if held else form for form, held in cases]
            metafunc.parametrize("case", cases, ids=ids)
        if "architecture" in metafunc.fixturenames:
            metafunc.parametrize("architecture", self.places)

    # What differs for a layer that is none of linear ones.

    def matrix(self, layer: Compact) -> Tensor:  # (m, n)
        """Return what a layer says its matrix is."""
        assert isinstance(layer, CompactLinear)
        return layer.to_dense(torch.float64)

    def dense(self, draw: Drawn) -> nn.Module:
        """Return a module whose place the layer takes."""
        if draw.transposed:
            return Conv1D(draw.m, draw.n).double()
        return nn.Linear(draw.n, draw.m, draw.bias is not None, dtype=torch.float64)

    def inputs(self, draw: Drawn) -> Tensor:
        return draw.matrix(6, draw.n).view(2, 3, draw.n)

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def planned(self, layer: Any, numbers: int, element: int) -> int:
        """Return the bytes that a plan counts for a layer, without its bias."""
        m, n = layer.shape
        rank = getattr(layer, "rank", None) or getattr(layer, "kept", None)
        basis = getattr(layer, "basis", None)
        entry = PlanEntry(
            name="layer", kind="layer", layer=None, group="layer", out_features=m, in_features=n, rank=rank,
            form=None if rank is None else layer.form, basis=basis and basis.name, columns=getattr(layer, "columns", 0),
            bits=layer.bits, scale_group=layer.group, quantized_bytes=layer.quantized_bytes, transposed=layer.transposed,
            bias=layer.bias is not None, numbers_before=m * n, numbers_after=numbers, predicted_loss=None,
            total_loss=None, reason="",
        )  # fmt: skip
        plan = Plan(model="", objective="", allocate="", loss_unit="", element_bytes=element, entries=[entry], dense=[])
        return plan.bytes_after

    # How a layer is drawn.

    def made(self, case: tuple[str, bool], draw: Drawn) -> Made:
        form, integers = case
        made = self.make(form, draw)
        assert getattr(made.layer, "form", form) == form
        if not integers:
            return made
        layer: Any = made.layer
        children = {}
        with torch.no_grad():
            for name in layer.CHILDREN:
                child = getattr(layer, name)
                children[name], numbers = draw.integers(child.out_features, child.in_features, IntLinear)
                child.weight.copy_(numbers)
        weight = layer.to_dense(torch.float64)
        layer.hold_integers(draw.bits, draw.group, **children)
        return Made(layer, weight, made.numbers)

    def skeleton(self, home: Home, draw: Drawn) -> Home:
        """Return the model without numbers that a loader makes of what config.json says."""
        said = {name: module.settings() for name, module in home.compact().items() if module.KIND}
        with torch.device("meta"):
            other = Home(self.dense(draw), None if home.table is None else nn.Embedding(draw.m, draw.n).double())
        shared: dict[str, Any] = {}
        for name, stored in json.loads(json.dumps(said)).items():
            kind = LAYERS.get(stored["kind"])
            replace_module(other, name, kind.empty(other.get_submodule(name), stored, other, shared))
        hold_bases(other)
        return other

    # ------------------------------------------------------------------------------------------------------------ The suite

    @drawn
    def test_computes_what_its_matrix_does(self, case: Any, draw: Drawn) -> None:
        layer, weight, _ = self.made(case, draw)
        x = self.inputs(draw)
        torch.testing.assert_close(self.matrix(layer), weight)
        torch.testing.assert_close(layer(x), self.expected(x, weight, draw.bias))

    @drawn
    def test_stores_what_it_says_and_a_plan_counts(self, case: Any, draw: Drawn) -> None:
        made = self.made(case, draw)
        home, layer, numbers = made.home, made.layer, made.numbers
        assert layer.shape == list(made.weight.shape) and layer.weight.tolist() == [0.0]
        children = {name: [getattr(one, child) for child in one.CHILDREN] for name, one in home.compact().items()}
        for name, module in home.compact().items():
            assert module.numbers == sum(count(child) for child in children[name])
        assert sum(module.numbers for module in home.compact().values()) == numbers
        if isinstance(layer, CompactLinear):
            assert layer.keep == layer.numbers / (draw.m * draw.n)
            rounded = None if layer.bits is None else sum(map(stored_bytes, children["layer"]))
            assert layer.quantized_bytes == rounded
        bias = 0 if draw.bias is None else 8 * draw.m
        assert stored_bytes(home) - bias == self.planned(layer, numbers, 8)

    def test_stores_less_than_the_dense_layer(self, case: Any) -> None:
        home = self.made(case, Drawn(48, 64, share=0.1, bias=False)).home.float()
        assert stored_bytes(home) < 4 * 48 * 64

    @drawn
    def test_is_built_from_its_settings_and_loaded_to_the_bit(self, case: Any, draw: Drawn) -> None:
        home, x = self.made(case, draw).home, self.inputs(draw)
        empty = self.skeleton(home, draw)
        assert all(tensor.is_meta for tensor in empty.state_dict().values()) and not empty.wrong()
        for name, module in home.compact().items():
            other: Any = empty.get_submodule(name)
            assert type(other) is type(module) and repr(other) == repr(module)
            assert (other.KIND, other.shape, other.numbers, other.words) == (
                module.KIND, module.shape, module.numbers, module.words,
            )  # fmt: skip
            assert not module.KIND or other.settings() == module.settings()
            assert not module.KIND or stored_kind(without(module.settings(), "kind")) == module.KIND  # formats up to 4
        shapes, others = ({k: (t.shape, t.dtype) for k, t in one.state_dict().items()} for one in (home, empty))
        assert shapes == others
        whole = empty.to_empty(device="cpu")
        whole.load_state_dict(home.state_dict())
        assert torch.equal(whole(x), home(x)) and not whole.wrong()

    @drawn
    def test_safetensors_give_it_back_to_the_bit(self, case: Any, draw: Drawn) -> None:
        home, x = self.made(case, draw).home, self.inputs(draw)
        other = self.skeleton(home, draw)
        other.load_state_dict(load(save(home.state_dict())), assign=True)
        for name, tensor in home.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]) and tensor.dtype == other.state_dict()[name].dtype
        assert torch.equal(other(x), home(x)) and torch.equal(self.matrix(other.layer), self.matrix(home.layer))

    @drawn
    def test_wrong_settings_are_refused(self, case: Any, draw: Drawn) -> None:
        home = self.made(case, draw).home
        layer: Any = home.layer
        for wrong in wrong_settings(layer.settings()):
            with pytest.raises((TypeError, ValueError)) as refused:
                self.kind.empty(self.dense(draw), wrong, home, {})
            assert one_phrase(str(refused.value)), wrong
        with pytest.raises(ValueError, match=r"it is no (linear layer|embedding) but a LayerNorm"):
            self.kind.empty(nn.LayerNorm(draw.n), layer.settings(), home, {})

    @drawn
    def test_casts_keep_integers(self, case: Any, draw: Drawn) -> None:
        made = self.made(case, draw)
        weight, home, x = made.weight, made.home, self.inputs(draw)
        bias = home.layer.bias if isinstance(home.layer, CompactLinear) else None
        expected = self.expected(x, weight, bias)
        children = [getattr(module, child) for module in home.compact().values() for child in module.CHILDREN]
        scale = math.prod(1 + float(child.weight.detach().norm()) for child in children) * (1 + x.double().norm())
        before = {name: tensor.clone() for name, tensor in home.state_dict().items() if not tensor.is_floating_point()}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            narrow, other = copy.deepcopy(home).to(dtype), copy.deepcopy(home)
            cast_weights(other, dtype)
            state = narrow.state_dict()
            for name, tensor in state.items():
                assert torch.equal(tensor, before[name]) if name in before else tensor.dtype == dtype
                assert torch.equal(tensor, other.state_dict()[name]) and tensor.dtype == other.state_dict()[name].dtype
            y = narrow(x.to(dtype) if x.is_floating_point() else x)
            assert y.dtype == narrow.layer.weight.dtype == dtype
            assert (y - expected).abs().max() <= 4 * torch.finfo(dtype).eps * scale

    @drawn
    def test_gradients_reach_what_is_trained(self, case: Any, draw: Drawn) -> None:
        made = self.made(case, draw)
        weight, home, x = made.weight, made.home, self.inputs(draw).requires_grad_(True)
        names = {
            name for name in self.trained if not isinstance(home.get_submodule(name.rpartition(".")[0]), IntMatrix)
        }
        names |= set() if draw.bias is None else {"layer.bias"}
        learned = trainable(home)
        assert set(learned) == names == set(dict(home.named_parameters()))
        y = home(x)
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * y.detach() @ weight)
        assert all(p.grad is not None and p.grad.any() for p in learned.values())

    @drawn
    def test_a_copy_computes_the_same_and_shares_nothing(self, case: Any, draw: Drawn) -> None:
        home, x = self.made(case, draw).home, self.inputs(draw)
        before, other = home(x), copy.deepcopy(home)
        assert torch.equal(other(x), before)
        places = [{tensor.data_ptr() for tensor in one.state_dict().values()} for one in (home, other)]
        assert not places[0] & places[1]
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert not other(x).any(), "a part of the original is still in use"
        assert torch.equal(home(x), before)

    @drawn
    def test_wrong_integers_are_named(self, case: Any, draw: Drawn) -> None:
        home = self.made(case, draw).home
        for name, buffer in list(home.named_buffers()):
            place, _, leaf = name.rpartition(".")
            for wrong in [] if buffer.is_floating_point() else wrong_integers(buffer, shapes=True):
                setattr(home.get_submodule(place), leaf, wrong)
                assert [error for error in home.wrong() if re.match(rf"{leaf} in the checkpoint \w+", error)]
                assert all(map(one_phrase, home.wrong()))
            setattr(home.get_submodule(place), leaf, buffer)
        assert not home.wrong()

    @drawn
    def test_its_words_are_a_phrase_that_names_its_size(self, case: Any, draw: Drawn) -> None:
        layer = self.made(case, draw).layer
        assert one_phrase(layer.words) and len(layer.words) <= 60
        for name in self.said:
            assert re.search(rf"\b{attrgetter(name)(layer)}\b", layer.words)

    @drawn
    def test_a_plain_module_computes_the_same(self, case: Any, draw: Drawn) -> None:
        layer, x = self.made(case, draw).layer, self.inputs(draw)
        plain: Any = layer.dense_module()
        assert type(plain) is type(self.dense(draw))
        matrix = dense_weight(plain) if isinstance(layer, CompactLinear) else plain.weight
        assert torch.equal(matrix, self.matrix(layer))
        torch.testing.assert_close(plain(x), layer(x))
        narrow = layer.dense_module(torch.bfloat16)
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}

    def stand_in(self, case: Any, architecture: str) -> tuple[Any, str]:
        """Return a model of transformers that holds a layer, and the layer's name."""
        model, name = make_model(architecture), self.places[architecture]
        dense: Any = model.get_submodule(name)
        m, n = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
        bias = getattr(dense, "bias", None) is not None
        home = self.made(case, Drawn(m, n, bias=bias, transposed=isinstance(dense, Conv1D))).home.float()
        if home.table is not None:
            model.set_input_embeddings(home.table)
        replace_module(model, name, home.layer)
        hold_bases(model)
        attach(model)
        return model, name

    def test_a_model_that_holds_it_is_loaded_to_the_bit(self, case: Any, architecture: str, tmp_path: Path) -> None:
        model, name = self.stand_in(case, architecture)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert config["format_version"] == FORMAT_VERSION and config["modules"][name]["kind"] == self.kind.KIND
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert type(loaded.get_submodule(name)) is self.kind
        with torch.no_grad():
            logits = loaded(IDS).logits
            assert torch.equal(logits, model(IDS).logits)
            dense = loaded.dequantize()
            assert not any(isinstance(module, Compact) for module in dense.modules())
            torch.testing.assert_close(dense(IDS).logits, logits, rtol=1e-4, atol=1e-4)

    def test_a_model_of_wrong_integers_is_refused(self, case: Any, tmp_path: Path) -> None:
        model, _ = self.stand_in(case, next(iter(self.places)))
        model.save_pretrained(tmp_path)
        stored, whole = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
        for name, tensor in whole.items():
            for wrong in [] if tensor.is_floating_point() else wrong_integers(tensor):
                save_file({**whole, name: wrong}, stored, {"format": "pt"})
                with pytest.raises(TwofoldError, match=re.escape(f"{name} in the checkpoint")) as refused:
                    AutoModelForCausalLM.from_pretrained(tmp_path)
                assert one_phrase(str(refused.value))


def count(child: Any) -> int:
    """Return how many numbers a module of numbers holds."""
    return int(child.numbers if isinstance(child, IntMatrix) else child.weight.numel())


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of all that a checkpoint stores of a module."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def one_phrase(words: str) -> bool:
    """Say whether words are one phrase, as a table or the end of a sentence holds it."""
    return bool(words) and "\n" not in words and not words.endswith(".") and words == words.strip()


def without(said: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: one for name, one in said.items() if name != key}


def wrong_settings(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield settings of a layer that none can have: of no number, of a size that does not fit, of a form that there is not."""
    yield said | {"colour": 3}
    for other in ("diagonal", None, [said["form"]], 3):
        yield said | {"form": other}
    for key, value in said.items():
        if key not in ("kind", "form", "group"):  # a form has a default, no group is one scale for all
            yield without(said, key)
            yield said | {key: None}
        if type(value) is int:
            for other in (str(value), float(value), True, -1, *([] if key == "group" else [10**12])):
                yield said | {key: other}
    if "basis" in said:
        for other in ("", "a.b", 3, [said["basis"]]):
            yield said | {"basis": other}


def wrong_integers(buffer: Tensor, *, shapes: bool = False) -> Iterator[Tensor]:
    """Yield buffers that can't be right, in the place of an order or an index, of codes or of their scales.

    Args:
        shapes: whether to yield those of another shape or type, too.
    """
    if buffer.dtype == torch.int32:
        for place, value in ((-1, 10**6), (0, -1), *([(0, int(buffer[-1]))] if len(buffer) > 1 else [])):
            wrong = buffer.clone()
            wrong[place] = value
            yield wrong
    if buffer.dtype == torch.int16:
        wrong = buffer.clone()
        wrong.view(torch.bfloat16)[-1, -1] = float("nan")
        yield wrong
    if shapes:
        yield buffer[:-1]
        yield buffer.double()
