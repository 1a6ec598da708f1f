"""A package of somebody else's: one of everything that can be added to Twofold, made of twofold.extend alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

import twofold.extend as tf
from twofold.nn import FactoredLinear


@tf.objective("outside", source="nobody", needs={"input"}, loss="output")
def outside_objective(weight: Tensor, moments: Any, damping: float) -> Any:
    """Activation-aware, as svd-llm."""
    side = "columns" if weight.shape[0] > weight.shape[1] else "rows"
    metric = tf.input_side(weight, moments, damping)
    if side == "columns":
        return tf.Problem(metric, weight.T @ weight, side)
    return tf.Problem(None, metric, side)


class Generous(tf.Settings):
    TITLE = "Method"

    generous_first: Annotated[int, Field(ge=0, description="outside: how many weights get their largest rank")] = 1


@tf.allocation("outside", settings=Generous)
def outside_allocation(candidates: list[Any], budget: float) -> list[Any]:
    """The smallest rank everywhere."""
    return [tf.Choice(0) for _ in candidates]


@tf.refinement("outside", trains=False, seconds=lambda price, settings: price.predict)
def outside_refinement(job: Any) -> Any:
    """Every bias and factor stays as it is."""
    loss = job.divergence()
    return tf.Refined(
        method="outside", steps=0, planned=0, tokens=0, parameters=0, seconds=0.0, unit="nats", loss_before=loss,
        loss_after=loss, ended="nothing was to be done",
    )  # fmt: skip


@tf.export_format("outside", integers=True, weights=(".pt",), dtypes=("float32",))
def outside_format(source: Any, folder: Path) -> Any:
    """A file of float32 numbers."""
    torch.save({name: weight.float() for name, weight in source.model.state_dict().items()}, folder / "weights.pt")
    return tf.Written(lambda: tf.ModelDecoder(source.model), ["read by nobody"])


class OutsideLinear(tf.CompactLinear):
    """y = s·Wx with one number s a layer and W of signs."""

    KIND = "outside"
    CHILDREN = ("signs",)
    FORMS = ("signs",)

    def __init__(self, in_features: int, out_features: int, form: str = "signs", **place: Any) -> None:
        super().__init__(in_features, out_features, form, **place)
        self.signs = self.child(in_features, out_features)

    @property
    def words(self) -> str:
        return "signs"

    def product(self, x: Tensor) -> Tensor:
        return self.signs(x)  # type: ignore[no-any-return]

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.signs.weight.detach().to(dtype or self.weight.dtype)


class Rows(tf.Samples):
    """Short rows of token ids."""

    unit = "rows"

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.source = ids, "drawn rows"

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, first: int, last: int) -> Any:
        return {"input_ids": self.ids[first:last]}

    def take(self, places: Sequence[int]) -> Rows:
        return Rows(self.ids[list(places)])

    def __add__(self, others: Rows) -> Rows:
        return Rows(torch.cat([self.ids, others.ids]))

    def units(self, first: int, last: int) -> int:
        return last - first

    @property
    def shape(self) -> list[int]:
        return list(self.ids.shape)

    @property
    def sha256(self) -> str:
        return f"{int(self.ids.sum())}"


@tf.task
class LastToken(tf.Task):
    """The token after a row, and nothing else: one prediction a row."""

    name: ClassVar[str] = "last-token"
    output = tf.CATEGORICAL
    settings = tf.Settings

    def fits(self, model: Any) -> bool:
        return False  # only where it is named

    def data(
        self,
        loaded: Any,
        settings: Any,
        hashed: str,
        given: Iterable[Any] | None = None,
        *,
        held_out: int,
        quiet: bool = False,
    ) -> Any:
        rows = Rows(torch.randint(200, (24 + held_out, 12), generator=torch.Generator().manual_seed(0)))
        return tf.Data(rows[:24], rows[24:], 24)

    def measured(self, loaded: Any, settings: Any) -> None:
        return None

    def example(self, model: Any) -> Any:
        return {"input_ids": torch.arange(6)[None]}

    def read(self, result: Any, batch: Any, model: Any) -> Tensor:
        return result.logits[:, -1]  # type: ignore[no-any-return]

    def labels(self, batch: Any) -> Tensor:
        return torch.zeros(len(batch["input_ids"]), dtype=torch.int64)


@tf.task
class NextSentence(tf.ExampleTask):
    """Whether a sentence follows another."""

    name = "next-sentence"
    output = tf.CATEGORICAL
    reads, unit = "text", "pairs"
    mappings = ("NEXT_SENTENCE_PREDICTION",)

    def encode(self, record: Any, loaded: Any) -> Iterable[Any]:
        batch = loaded.tokenizer(record.need("text"), record.need("target"), return_tensors="pt")
        yield tf.Example(dict(batch))

    def read(self, result: Any, batch: Any, model: Any) -> Tensor:
        return result.logits  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """y = (s W) x, which no kind of Twofold's own knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(linear.weight.detach() / 2), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.scale * self.weight)


@tf.kind
class ScaledKind(tf.Kind):
    name = "scaled"

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, Scaled)

    def dense(self, module: Any) -> Tensor:
        return module.scale * module.weight  # type: ignore[no-any-return]

    def watch(self, module: nn.Module, sink: Any) -> list[Any]:
        def passed(module: nn.Module, args: Any, output: Tensor) -> None:
            take = None if sink.calls is None else sink.calls(args[0], lambda: output)
            if take is not None and output.requires_grad:
                output.register_hook(lambda g: take(g) and None)

        return [module.register_forward_hook(passed)]

    def layer(self, module: nn.Module, left: Tensor, right: Tensor, form: str, dtype: torch.dtype) -> Any:
        return FactoredLinear.from_factors(left, right, None, form, dtype=dtype)
