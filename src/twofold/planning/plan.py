"""The plan: every weight of a model with its rank, or with the reason why it stays dense."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from twofold.errors import TwofoldError
from twofold.host.files import write_text
from twofold.nn.layers._basis import SharedBasis, SharedForm, basis_storage
from twofold.nn.layers.sliced import SlicedForm


class PlanEntry(pydantic.BaseModel, extra="forbid", allow_inf_nan=False):
    """One targeted weight W (out, in)."""

    name: str
    kind: str
    layer: int | None
    stack: str | None = None  # of blocks, that the layer is one of; "" outside of all; None: the model has one
    out_features: PositiveInt
    in_features: PositiveInt
    group: str  # the first target that shares its input
    rank: PositiveInt | None  # None: dense
    # "gauge": rows or columns, chosen when it is factorized; for kept-rows and kept-columns the rank is how many
    form: Literal["plain", "rows", "columns", "gauge", SlicedForm, SharedForm, "corrected"] | None
    basis: str | None = None  # that it shares with others: each of them counts an equal part of it
    columns: NonNegativeInt = 0  # inputs that are dense beside the factors
    bits: Annotated[int, Field(ge=2, le=8)] | None = None  # of the stored numbers; None: in the dtype of the checkpoint
    scale_group: PositiveInt | None = None  # inputs that share a scale; None: all of an output
    quantized_bytes: PositiveInt | None = None  # of codes and scales
    transposed: bool
    bias: bool
    centred: bool = False  # its losses are those of inputs without their mean, which goes into the bias with the rank
    element_bytes: PositiveInt | None = None  # of a number of the dense weight as it is stored; None: the plan's
    numbers_before: PositiveInt  # m · n
    numbers_after: NonNegativeInt
    predicted_loss: NonNegativeFloat | None  # Σ σ² left out, None if no spectrum was taken
    total_loss: NonNegativeFloat | None  # Σ σ²
    measured_loss: float | None = None  # Σ σ² left out, measured from the stored factors
    microseconds: NonNegativeFloat | None = None  # for one token, where the budget is in time
    dense_microseconds: NonNegativeFloat | None = None
    reason: str

    @pydantic.model_validator(mode="after")
    def _possible(self) -> PlanEntry:
        full = min(self.out_features, self.in_features)
        wide = dict.fromkeys(("kept-columns", *SharedBasis.FORMS), self.in_features)
        largest = {"kept-rows": self.out_features, **wide}.get(self.form or "", full)
        if (self.form in SharedBasis.FORMS) != (self.basis is not None):
            raise ValueError(f"the form {self.form} does not go with the shared basis {self.basis}")
        if self.rank is not None and self.rank > largest:
            raise ValueError(f"the rank {self.rank} is above the full rank of {self.out_features} × {self.in_features}")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _told_apart(self, write: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Say the stack only where there are several."""
        fields: dict[str, Any] = write(self)
        return fields if self.stack is not None else {key: value for key, value in fields.items() if key != "stack"}

    @property
    def keep(self) -> float:
        """The share of the weight that is stored."""
        return self.numbers_after / self.numbers_before

    @property
    def replaced(self) -> bool:
        """Whether another layer takes the place of the dense one."""
        return self.rank is not None or self.bits is not None

    def weight_bytes(self, element: int) -> int:
        """Return the bytes of the numbers, with scales; without order and guard."""
        if self.quantized_bytes is not None:
            return self.quantized_bytes
        return self.numbers_after * element if self.replaced else self.bytes_before(element)

    def bytes_before(self, element: int) -> int:
        """Return the bytes of the dense weight."""
        return self.numbers_before * (self.element_bytes or element)

    @property
    def multiplications(self) -> int:
        """The multiplications for one token: as many as numbers are stored, but each layer applies a shared basis in full."""
        if self.rank is None or (self.form != "shared-plain" and self.form != "shared-columns"):
            return self.numbers_after
        return self.rank * self.out_features + basis_storage(self.form, self.in_features, self.rank)

    @property
    def order_numbers(self) -> int:
        """The integers (four bytes each) that it stores by itself; of a form not chosen yet, the longer order of the two."""
        if self.rank is None:
            return 0
        m, n = self.out_features, self.in_features - self.columns
        orders = {"rows": m, "columns": n, "gauge": max(m, n), "kept-rows": self.rank, "kept-columns": self.rank}
        return orders.get(self.form or "", 0) + (self.in_features if self.columns else 0)


class DenseEntry(pydantic.BaseModel, extra="forbid"):
    """A parameter that is no target."""

    name: str
    shape: list[NonNegativeInt]
    numbers: NonNegativeInt
    reason: str
    element_bytes: PositiveInt | None = None  # of a number as it is stored; None: the plan's
    bits: Annotated[int, Field(ge=2, le=8)] | None = None  # of the stored numbers; None: in the dtype of the checkpoint
    scale_group: PositiveInt | None = None
    quantized_bytes: PositiveInt | None = None  # of codes, scales and guards

    def weight_bytes(self, element: int) -> int:
        """Return the bytes of the numbers."""
        return self.bytes_before(element) if self.quantized_bytes is None else self.quantized_bytes

    def bytes_before(self, element: int) -> int:
        """Return the bytes of the numbers in floating point."""
        return self.numbers * (self.element_bytes or element)


class UnusedEntry(pydantic.BaseModel, extra="forbid"):
    """A tensor in the files of the original that is not in the result."""

    name: str
    shape: list[NonNegativeInt]
    reason: str


class EffortTime(pydantic.BaseModel, extra="forbid"):
    """What a run at one level of effort stands for, and takes."""

    effort: str
    words: str  # tokens or samples, refinement, minutes
    seconds: float | None  # None: not known, or not to be done in the memory that may be used


class Estimate(pydantic.BaseModel, extra="forbid"):
    """What a run will take on this machine."""

    blocks_at_once: int | None  # None: the whole model is in memory
    peak_memory: int  # bytes
    memory_limit: int  # bytes
    memory: dict[str, int]  # peak of each stage, bytes
    seconds: dict[str, float]  # of each stage
    total_seconds: float
    moments_bytes: int  # on disk, kept for the next budget
    work_bytes: int  # on disk, while the run goes on
    output_bytes: int
    threads: int
    others: float = 0.0  # processors that other programs took while the machine was probed
    free_seconds: float | None = None  # where they disturbed the probe: by the processor time that it took itself
    efforts: list[EffortTime] = []


class Plan(pydantic.BaseModel, extra="forbid"):
    """What is to be done with every parameter of a model."""

    version: Literal[1] = 1
    model: str
    objective: str
    allocate: str
    loss_unit: str
    prediction: str = "token"  # what the model predicts one of
    element_bytes: PositiveInt
    entries: list[PlanEntry]
    dense: list[DenseEntry]
    unused: list[UnusedEntry] = []
    notes: list[str] = []
    estimate: Estimate | None = None  # what a run will take, in a plan that was asked for alone
    explanation: list[str] = []  # if it was asked for

    @pydantic.model_serializer(mode="wrap")
    def _named(self, write: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Say what a prediction is only where it is no token, and explain only what was asked about."""
        fields: dict[str, Any] = write(self)
        usual: tuple[tuple[str, Any], ...] = (("prediction", "token"), ("explanation", []))
        return {key: value for key, value in fields.items() if (key, value) not in usual}

    @property
    def target_before(self) -> int:
        return sum(entry.numbers_before for entry in self.entries)

    @property
    def target_after(self) -> int:
        return sum(entry.numbers_after for entry in self.entries)

    @property
    def multiplications_after(self) -> int:
        """The multiplications of the targeted weights for one token."""
        return sum(entry.multiplications for entry in self.entries)

    @property
    def dense_numbers(self) -> int:
        return sum(entry.numbers for entry in self.dense)

    @property
    def model_before(self) -> int:
        return self.target_before + self.dense_numbers

    @property
    def model_after(self) -> int:
        return self.target_after + self.dense_numbers

    @property
    def order_numbers(self) -> int:
        """The integers (four bytes each) that the forms add."""
        shared = {entry.basis: entry.in_features for entry in self.entries if entry.form == "shared-columns"}
        return sum(entry.order_numbers for entry in self.entries) + sum(shared.values())

    @property
    def bytes_before(self) -> int:
        return self.target_bytes_before + sum(entry.bytes_before(self.element_bytes) for entry in self.dense)

    @property
    def target_bytes_before(self) -> int:
        """The bytes of the targeted weights."""
        return sum(entry.bytes_before(self.element_bytes) for entry in self.entries)

    @property
    def integers(self) -> bool:
        """Whether some of the weights are stored as integers."""
        return any(e.bits is not None for e in self.entries) or any(e.bits is not None for e in self.dense)

    @property
    def dense_bytes(self) -> int:
        """The bytes of all that is no target."""
        return sum(entry.weight_bytes(self.element_bytes) for entry in self.dense)

    def stored_bytes(self, entry: PlanEntry) -> int:
        """Return the bytes of a weight with its order and guard; without the order of a basis that it shares."""
        element = self.element_bytes
        return entry.weight_bytes(element) + element * entry.replaced + 4 * entry.order_numbers

    @property
    def bytes_after(self) -> int:
        orders = 4 * (self.order_numbers - sum(entry.order_numbers for entry in self.entries))
        return sum(self.stored_bytes(entry) for entry in self.entries) + orders + self.dense_bytes

    @property
    def keep(self) -> float:
        """The share of the targeted weights that is stored."""
        return self.target_after / self.target_before

    @property
    def keep_model(self) -> float:
        """The share of the whole model that is stored."""
        return self.model_after / self.model_before

    @property
    def latency(self) -> float | None:
        """The share of the dense weights' measured time for one token; None where the budget was not in time."""
        times = [(entry.microseconds, entry.dense_microseconds) for entry in self.entries]
        before = sum(dense for _, dense in times if dense is not None)
        return sum(now for now, _ in times if now is not None) / before if before else None

    @property
    def predicted_divergence(self) -> float | None:
        """Half of the loss left out, in nats a prediction: a second-order estimate of the divergence from the original."""
        losses = [entry.predicted_loss for entry in self.entries]
        if self.loss_unit != "nats" or any(loss is None for loss in losses):
            return None
        return sum(loss for loss in losses if loss is not None) / 2

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            TwofoldError: if the file is missing or is no plan.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
        except FileNotFoundError as error:
            raise TwofoldError(f"there is no plan {path}") from error
        except OSError as error:
            raise TwofoldError(f"the plan {path} can't be read: {error.strerror}") from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TwofoldError(
                f"{path} is not a plan of this version of Twofold: {where + ': ' if where else ''}{first['msg']}"
            ) from error
        except UnicodeDecodeError as error:
            raise TwofoldError(f"{path} is not a plan of this version of Twofold: it is no text in UTF-8") from error
