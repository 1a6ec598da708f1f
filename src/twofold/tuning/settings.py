"""The settings of a fine-tuning: one pydantic model for the flags, Python and the record of the run."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from twofold.errors import TwofoldError
from twofold.settings.base import Settings, as_list, validated
from twofold.task.text.settings import Reading

Method = Literal[
    "lora", "rslora", "dora", "pissa", "olora", "corda", "eva", "vera", "adalora",
    "factors", "factors-top", "factors-tail", "full",
]  # fmt: skip
PROJECTED = ("galore", "apollo")  # optimizers of gradients of low rank
RATES: dict[str, float] = {"full": 2e-5, "factors": 2e-5, "factors-top": 1e-4, "factors-tail": 1e-4, "vera": 2e-3}
RATE = 2e-4  # of the methods that train adapters


class Rows(Reading):
    """What is learnt."""

    TITLE = "Rows"

    data: Annotated[
        list[str],
        pydantic.BeforeValidator(as_list),
        Field(
            min_length=1,
            description="files of rows (.jsonl, .json, .parquet, .csv), or data sets of the hub, to train on",
        ),
    ]
    length: Annotated[int, Field(ge=8, description="tokens of the longest row, and of a packed window")] = 1024
    long: Annotated[
        Literal["refuse", "cut", "skip"], Field(description="what becomes of a row that is longer: refuse, cut, skip")
    ] = "refuse"
    packing: Annotated[bool, Field(description="put several rows into one window, each blind to the others")] = False
    loss: Annotated[Literal["answers", "all"], Field(description="learn the answers alone, or all of a row")] = (
        "answers"
    )
    held_out: Annotated[
        float, Field(ge=0, description="rows to measure on and not to train on: a share below 1, or how many")
    ] = 0.1


class Trained(Settings):
    """What is trained."""

    TITLE = "What is trained"

    method: Annotated[
        Method,
        Field(description="what is trained: " + ", ".join(Method.__args__)),  # type: ignore[attr-defined]
    ] = "lora"
    rank: Annotated[
        int | None,
        Field(ge=1, description="rank of an adapter, or how many directions are trained [default: 16; vera 256]"),
    ] = None
    alpha: Annotated[
        float | None, Field(gt=0, description="an adapter's product counts alpha / rank times [default: 2 × rank]")
    ] = None
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout before an adapter")] = 0.0
    include: Annotated[list[str], Field(description="patterns of layers to train; all linear layers if none")] = []
    exclude: Annotated[list[str], Field(description="patterns of layers to leave as they are")] = []


class Steps(Settings):
    """How it is trained."""

    TITLE = "Training"

    learning_rate: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="the highest rate [default: that of the method]")
    ] = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False, description="times that the rows are gone through")] = 1.0
    steps: Annotated[int | None, Field(ge=1, description="steps of the optimizer, in the place of epochs")] = None
    batch: Annotated[int, Field(ge=1, description="rows (or packed windows) of one step")] = 8
    micro_batch: Annotated[int, Field(ge=1, description="rows that are in memory at once; must divide the batch")] = 1
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of AdamW")] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adafactor", "galore", "apollo"],
        Field(description="adamw; with a smaller state: adafactor, and for `method=full` galore, apollo"),
    ] = "adamw"
    optimizer_rank: Annotated[
        int | None, Field(ge=1, description="galore, apollo: rank of the projected gradients [default: 128]")
    ] = None
    bound: Annotated[
        float,
        Field(gt=0, description="factors: the most that one step changes a product, as a share of its spectral norm"),
    ] = 0.02
    evaluate_every: Annotated[
        int | None,
        Field(ge=1, description="steps between two looks at the held-out rows [default: a tenth of the run]"),
    ] = None
    save_every: Annotated[
        int | None, Field(ge=1, description="steps between two checkpoints [default: a tenth of the run]")
    ] = None
    patience: Annotated[
        int | None, Field(ge=1, description="stop after so many looks without a better held-out loss")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the split, the order and the adapters")] = 0


class Machine(Settings):
    """Where the model is, and what it may take."""

    TITLE = "Model and machine"

    model: Annotated[str, Field(description="a folder, a hub id, a .gguf file, or smollm2 (built in)")]
    gradient_checkpointing: Annotated[
        bool, Field(description="less memory for more time: activations are computed anew in the backward pass")
    ] = False
    memory: Annotated[
        str | None, Field(description="the most memory, as in 4GB: picks micro-batch, checkpointing and method")
    ] = None
    dtype: Annotated[str, Field(description="of the computation; auto is float32 on a processor")] = "auto"
    device: Annotated[str, Field(description="cpu, cuda, mps, or auto")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="run code that comes with the checkpoint")] = False
    dequantize: Annotated[
        bool, Field(description="turn weights that are quantized already into ordinary ones as they are loaded")
    ] = False


class TuneSettings(Machine, Steps, Trained, Rows):
    """How a model is fine-tuned."""

    @pydantic.model_validator(mode="after")
    def _fit(self) -> TuneSettings:
        if self.batch % self.micro_batch:
            raise ValueError(f"`micro_batch` must divide `batch`, got {self.micro_batch} and {self.batch}")
        if self.held_out > 1 and not float(self.held_out).is_integer():
            raise ValueError(f"`held_out` must be a share below 1 or a whole number of rows, got {self.held_out}")
        if self.optimizer in PROJECTED and self.method != "full":
            raise ValueError(
                f"`optimizer={self.optimizer}` keeps the state of whole weights small, so it goes with `method=full` alone, got "
                f"`method={self.method}`"
            )
        if self.optimizer == "adafactor" and self.method == "factors":
            raise ValueError("`method=factors` bounds the steps of AdamW; leave `optimizer` out, or take factors-top")
        if self.save_every is not None and not self.keeps_checkpoints:
            raise ValueError(f"{self._without} keeps no checkpoints, so there is nothing to `save_every`; leave it out")
        if self.optimizer_rank is not None and self.optimizer not in PROJECTED:
            raise ValueError(f"`optimizer_rank` is for {' and '.join(PROJECTED)}; leave it out for {self.optimizer}")
        if self.steps is not None:
            self.intervals(self.steps)
        return self

    def intervals(self, steps: int) -> tuple[int, int]:
        """Return the steps between two looks at the held-out rows, and between two checkpoints, in a run of so many steps.

        Raises:
            TwofoldError: if the best state could not be taken, as ``patience`` does.
        """
        often = max(1, steps // 10)
        look = self.evaluate_every or often
        save = self.save_every or (look if self.patience else often)
        if self.patience and (not self.held_out or save % look):
            raise TwofoldError(
                "`patience` needs held-out rows, and a `save_every` that is a multiple of `evaluate_every`"
            )
        if self.patience and not self.keeps_checkpoints:
            raise TwofoldError(f"`patience` takes the best checkpoint, and {self._without} keeps none; leave it out")
        return look, save

    @property
    def keeps_checkpoints(self) -> bool:
        """Tell whether a run can resume: PEFT saves no ranks of adalora, and the state of some optimizers needs a pickle."""
        return self.method != "adalora" and self.optimizer not in PROJECTED

    @property
    def _without(self) -> str:
        """Name the setting for whose sake there are no checkpoints."""
        return f"`optimizer={self.optimizer}`" if self.optimizer in PROJECTED else f"`method={self.method}`"

    @property
    def projected_rank(self) -> int:
        """Return the rank of the projected gradients of galore and apollo."""
        return self.optimizer_rank or 128

    @property
    def rate(self) -> float:
        """Return the highest learning rate."""
        return self.learning_rate or RATES.get(self.method, RATE)

    @property
    def scale(self) -> float:
        """Return alpha: what an adapter's product is multiplied by, times its rank."""
        return self.alpha or 2.0 * self.size

    @property
    def size(self) -> int:
        """Return the rank of an adapter, or how many directions are trained."""
        return self.rank or (256 if self.method == "vera" else 16)


def make_settings(values: dict[str, object]) -> TuneSettings:
    """Check settings.

    Raises:
        TwofoldError: naming the first one that is wrong, what it must be, and what came.
    """
    return validated(TuneSettings, values, list(TuneSettings.model_fields))
