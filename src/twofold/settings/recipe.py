"""The recipe: one model of settings that reads the command line, the YAML file and the checkpoint."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pydantic
import yaml
from pydantic import Field

from twofold.errors import TwofoldError
from twofold.nn.int_matrix import GROUP, default_group
from twofold.nn.packing import BITS
from twofold.objectives.base import OBJECTIVES
from twofold.settings.goal import Goal, parse_perplexity
from twofold.settings.sizes import parse_budget

ALIGNED = 8  # ranks are multiples of this where the budget is in time and nothing else was asked for
REST_BITS = 8  # of the embeddings, with --bits auto
SIZES = (
    "keep",
    "budget",
    "latency",
    "perplexity_at_most",
    "kl_at_most",
)  # exactly one of these says how small a model gets

Curvature = Literal["sampled", "gauss-newton", "empirical"]
Settings = TypeVar("Settings", bound=pydantic.BaseModel)


class Override(pydantic.BaseModel, extra="forbid"):
    """What is forced on the weights that match a pattern: one of keep, rank, dense."""

    keep: float | None = Field(None, gt=0, le=1)
    rank: int | None = Field(None, ge=1)
    dense: bool = False

    @pydantic.model_validator(mode="after")
    def _one(self) -> Override:
        if (self.keep is not None) + (self.rank is not None) + self.dense != 1:
            raise ValueError("an override needs exactly one of keep, rank, dense")
        return self


class Recipe(pydantic.BaseModel, extra="forbid"):
    """How a model is factorized. The description of each field is also the help of its flag."""

    model: Annotated[str, Field(description="a folder, a hub id, a .gguf file, or smollm2 (built in)")]
    keep: Annotated[
        float | None, Field(gt=0, le=1, description="share of the factorized weights' parameters to keep, in (0, 1]")
    ] = None
    budget: Annotated[
        str | None, Field(description="size of the whole model: parameters (90M), bytes (180MB) or a share (70%)")
    ] = None
    latency: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the dense linear layers' measured time for one token, on this machine"),
    ] = None
    perplexity_at_most: Annotated[
        str | None,
        pydantic.BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value),
        pydantic.AfterValidator(lambda value: _readable(value)),
        Field(description="the smallest model with this perplexity at most: 25, or 1.1x the dense model's"),
    ] = None
    kl_at_most: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="the smallest model with this divergence from the dense one at most, in nats per token",
        ),
    ] = None
    calibration: Annotated[
        list[str],
        pydantic.BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(description="text files, or data set names; 'self' samples texts from the model"),
    ] = ["self"]
    self_texts: Annotated[
        Literal["both", "plain", "chat"],
        Field(
            description="how texts sampled from the model begin: plain, chat (with a user's turn of the chat template), or both"
        ),
    ] = "both"
    dataset_config: Annotated[str | None, Field(description="the configuration of the data set")] = None
    dataset_split: Annotated[str, Field(description="the split of the data set")] = "train"
    text_column: Annotated[str, Field(description="the field of a data set or .jsonl row that holds the text")] = "text"
    tokens: Annotated[int, Field(ge=1, description="tokens to calibrate on")] = 65536
    continuations: Annotated[
        int,
        Field(ge=0, description="tokens that the model writes on from the calibration texts, to be calibrated on too"),
    ] = 0
    window: Annotated[int, Field(ge=2, description="tokens in a calibration window")] = 512
    batch_size: Annotated[int, Field(ge=1, description="windows in a calibration batch; more takes more memory")] = 1
    objective: Annotated[
        str,
        Field(
            description="what a rank is chosen to preserve: two-sided, svd-llm, asvd, fwsvd, svd, modegpt, dense-columns, "
            "basis-sharing, or two metrics as in whitened+rows; or how whole weights in integers are corrected: lqer, "
            "qera-exact, eora"
        ),
    ] = "two-sided"
    share_blocks: Annotated[
        int, Field(ge=1, description="basis-sharing: blocks in a row whose weights of one kind share a basis")
    ] = 2
    allocate: Annotated[
        str,
        Field(
            description="how ranks are shared out: global, uniform, energy, effective-rank, svd-llm-v2, sensitivity, zero-sum, "
            "measured, global-iterated"
        ),
    ] = "global"
    sensitivity_windows: Annotated[
        int, Field(ge=1, description="sensitivity: calibration windows that each weight is measured on at each share")
    ] = 1
    form: Annotated[
        Literal["gauge", "plain"], Field(description="how factors are stored: gauge r(m+n-r) numbers, plain r(m+n)")
    ] = "gauge"
    bits: Annotated[
        str | None,
        pydantic.BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
        pydantic.AfterValidator(lambda value: check_bits(value, "auto")),
        Field(
            description="bits of the factors' numbers, 2 to 8, or auto: a budget in bytes is shared out over ranks and bits "
            "together; without it they keep the dtype of the checkpoint"
        ),
    ] = None
    dense_bits: Annotated[
        str | None,
        pydantic.BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
        pydantic.AfterValidator(lambda value: check_bits(value, "none")),
        Field(
            description="bits of the embedding, the output layer and the linear layers that stay dense, 2 to 8; none leaves "
            "them as they are, and is the default; with --bits auto that is 8"
        ),
    ] = None
    rank: Annotated[
        int | None, Field(ge=1, description="lqer, qera-exact, eora: rank of every correction, 32 if it is not given")
    ] = None
    group_size: Annotated[
        int, Field(ge=8, description="inputs that share a scale, below 8 bits; with 8 bits all of an output do")
    ] = GROUP
    refine: Annotated[
        list[str],
        pydantic.BeforeValidator(lambda value: _split([value] if isinstance(value, str) else value)),
        Field(
            description="better the factors after the closed form, in turn: anchored, blockwise, distill, natural-gradient"
        ),
    ] = []
    anchor_mix: Annotated[
        float,
        Field(
            ge=0, le=1, description="anchored: how far to aim at the dense model's outputs, 0 is at the weight itself"
        ),
    ] = 1.0
    minutes: Annotated[float | None, Field(gt=0, description="that all refinements together may take")] = None
    refine_passes: Annotated[
        float, Field(gt=0, description="times that a refinement sees each window, if the minutes suffice")
    ] = 4
    refine_rate: Annotated[
        float, Field(gt=0, lt=1, description="how much of its own size a weight changes in a step of refinement")
    ] = 2e-4
    refine_labels: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="share of the text's own next tokens in the loss of distill and natural-gradient",
        ),
    ] = 0.0
    refine_batch: Annotated[int, Field(ge=1, description="windows in a step of refinement")] = 2
    refine_steps: Annotated[
        int | None,
        Field(
            ge=1,
            description="steps in the place of passes and minutes; those that a run.json says are planned repeat that run",
        ),
    ] = None
    refine_rounds: Annotated[int, Field(ge=1, description="natural-gradient: gradients and steps")] = 1
    damping: Annotated[
        float, Field(ge=0, le=1, description="added to the diagonal of each moment, relative to its mean")
    ] = 1e-2
    curvature: Annotated[
        Curvature, Field(description="how the gradients' moments are estimated: sampled, gauss-newton, empirical")
    ] = "sampled"
    rank_multiple: Annotated[
        int | None, Field(ge=1, description="ranks are multiples of this; 1, or 8 with --latency")
    ] = None
    min_rank: Annotated[int, Field(ge=1, description="the smallest rank")] = 1
    include: Annotated[list[str], Field(description="factorize only the layers that match these patterns")] = []
    exclude: Annotated[list[str], Field(description="leave the layers that match these patterns dense")] = []
    overrides: Annotated[
        dict[str, Override],
        Field(description="pattern=dense, pattern=rank:64 or pattern=keep:0.5; the last match wins"),
    ] = {}
    seed: Annotated[int, Field(ge=0, description="of sampled texts and labels")] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Field(description="of the loaded weights; auto is float32 on a processor"),
    ] = "auto"
    device: Annotated[str, Field(description="where to run: cpu, cuda, mps, or auto")] = "auto"
    memory: Annotated[
        str | None,
        Field(description="memory that may be used, as 6GB; a model that needs more is worked through block by block"),
    ] = None
    stream: Annotated[
        Literal["auto", "always", "never"],
        Field(description="whether to work block by block with the weights on disk; auto if the model does not fit"),
    ] = "auto"
    activations: Annotated[
        Literal["disk", "memory"],
        Field(description="where hidden states are kept between blocks; on disk a killed run goes on from them"),
    ] = "disk"
    revision: Annotated[str | None, Field(description="the revision of a hub model")] = None
    trust_remote_code: Annotated[bool, Field(description="run code that comes with the checkpoint")] = False
    eval_text: Annotated[
        str | None, Field(description="text file to measure on; without it, held-out calibration text")
    ] = None
    eval_windows: Annotated[int, Field(ge=0, description="windows to measure on; 0 measures nothing")] = 4

    @pydantic.model_validator(mode="after")
    def _one_size(self) -> Recipe:
        sizes = sum(getattr(self, name) is not None for name in SIZES)
        if self.corrects:
            _check_correction(self, sizes)
        elif self.rank is not None:
            raise ValueError(
                "--rank is that of a correction (lqer, qera-exact, eora); force one with --override PATTERN=rank:64"
            )
        elif sizes != 1:
            raise ValueError(
                "give either keep (share of the factorized weights), budget (size of the whole model), latency (share of the "
                "time for one token), perplexity_at_most (25 or 1.1x) or kl_at_most (nats per token), and only one of them"
            )
        if self.goal is not None and self.eval_windows == 0:
            raise ValueError(
                f"{self.goal.flag} needs measuring, and --eval-windows 0 measures nothing; give some windows, or --keep"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _bits_go_with_it(self) -> Recipe:
        if self.bits == "auto" and (self.budget is None or parse_budget(self.budget)[1] != "bytes"):
            raise ValueError(
                "--bits auto shares out a budget in bytes over ranks and bits; give one, as in --budget 60MB, or a number of bits"
            )
        if self.bits is not None and self.refine:
            raise ValueError(
                "a refinement trains factors of floating point, and --bits rounds them to integers; leave one of the two out"
            )
        if self.kept_bits is not None and "anchored" in self.refine:
            raise ValueError(
                "anchored solves for layers of floating point, and --dense-bits rounds some to integers; leave one of the two out"
            )
        return self

    @property
    def all_tokens(self) -> int:
        """The tokens to calibrate on, those of the texts and those that the model writes on."""
        return self.tokens + self.continuations

    @property
    def aligned(self) -> int:
        """What ranks are multiples of."""
        return self.rank_multiple or (1 if self.latency is None else ALIGNED)

    @property
    def corrects(self) -> bool:
        """Whether whole weights are rounded to integers and their error is corrected."""
        found = OBJECTIVES.get(self.objective)
        return found is not None and found.correct is not None

    @property
    def fixed_bits(self) -> int | None:
        """The bits of every factor, if they are one number."""
        return None if self.bits is None or self.bits == "auto" else int(self.bits)

    @property
    def rest_bits(self) -> int | None:
        """The bits of what is not factorized; with --bits auto that is the embeddings and the layers that are no targets."""
        return REST_BITS if self.bits == "auto" and self.dense_bits is None else self.kept_bits

    @property
    def kept_bits(self) -> int | None:
        """The bits of a target that stays dense, where the budget does not choose them."""
        return None if self.dense_bits is None or self.dense_bits == "none" else int(self.dense_bits)

    def group(self, bits: int) -> int | None:
        """The inputs that share a scale at so many bits; None: all of an output."""
        return None if default_group(bits) is None else self.group_size

    @property
    def goal(self) -> Goal | None:
        """How good the model must stay, if that is asked for in the place of a size."""
        if self.kl_at_most is not None:
            return Goal("divergence", self.kl_at_most)
        if self.perplexity_at_most is not None:
            number, kind = parse_perplexity(self.perplexity_at_most)
            return Goal(kind, number)
        return None

    def at(self, keep: float) -> Recipe:
        """The same with a share to keep in the place of a goal; a recipe without a goal as it is."""
        if self.goal is None:
            return self
        return self.model_copy(update={"keep": keep, "perplexity_at_most": None, "kl_at_most": None})

    def to_yaml(self) -> str:
        """The recipe as YAML; what is at its default is left in, so that a stored recipe says all."""
        settings = self.model_dump(mode="json", exclude_none=True, exclude={"trust_remote_code"})
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _check_correction(recipe: Recipe, sizes: int) -> None:
    """Refuse settings that a correction of integers does not go with."""
    if recipe.fixed_bits is None:
        raise ValueError(
            f"--objective {recipe.objective} corrects weights of integers: give --bits, as in --bits 4 (compare has none)"
        )
    if sizes:
        raise ValueError(
            f"--objective {recipe.objective} has its size from --bits and --rank; leave --keep, --budget and the qualities out"
        )
    if recipe.overrides or recipe.allocate != "global":
        raise ValueError(
            f"--objective {recipe.objective} gives every weight the same rank; leave --allocate and --override out, and take "
            "weights out with --exclude"
        )


def check_bits(bits: str | None, word: str) -> str | None:
    """Refuse what is neither a number of bits nor a word."""
    if bits is None or bits == word or bits in [str(number) for number in BITS]:
        return bits
    raise ValueError(f"must be {word}, or a whole number from {BITS[0]} to {BITS[-1]}")


def _readable(perplexity: str | None) -> str | None:
    """Refuse a perplexity that can't be read."""
    if perplexity is not None:
        parse_perplexity(perplexity)
    return perplexity


def _split(value: object) -> object:
    """Names between commas are several."""
    if not isinstance(value, list):
        return value
    return [name for one in value for name in (one.split(",") if isinstance(one, str) else [one]) if name]


def read_recipe(path: Path) -> dict[str, object]:
    """Read a YAML recipe as settings that flags may still override.

    Raises:
        TwofoldError: if the file is missing or holds no mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TwofoldError(f"the recipe {path} can't be read: {error.strerror}") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a date or a number that is none, or too much nesting
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise TwofoldError(f"the recipe {path} is not YAML: {where}{reason}") from error
    if not isinstance(settings, dict):
        raise TwofoldError(f"the recipe {path} holds no settings; write one as in: keep: 0.8")
    if settings.get("trust_remote_code"):
        raise TwofoldError(
            f"the recipe {path} asks to run a checkpoint's code; take that out, and give --trust-remote-code if you trust it"
        )
    return settings


def make_recipe(settings: dict[str, object]) -> Recipe:
    """Check settings and give the recipe.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    return checked(Recipe, settings, list(Recipe.model_fields))


def checked(model: type[Settings], settings: dict[str, object], names: list[str]) -> Settings:
    """Settings as a pydantic model of them.

    Args:
        names: of all the settings that there are.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    try:
        return model.model_validate(settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(part for part in first["loc"] if isinstance(part, str))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("extra_forbidden", "invalid_key"):
            unknown = ".".join(map(str, first["loc"]))
            raise TwofoldError(f"there is no setting {unknown!r}; the settings are {', '.join(names)}") from error
        if not where:
            raise TwofoldError(message) from error
        flag = (
            f"--override {where.partition('.')[2]}".strip()
            if where.startswith("overrides")
            else "--" + where.replace("_", "-")
        )
        if first["type"] == "missing":
            raise TwofoldError(f"{flag} is missing; give it, or put it into a recipe") from error
        raise TwofoldError(f"{flag}: {message[0].lower()}{message[1:]}, got {_short(first['input'])}") from error


def _short(value: object) -> str:
    """A value in some words: a few lines of YAML can stand for more than any memory holds."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring = 2, 80
    return brief.repr(value)


def parse_override(text: str) -> tuple[str, dict[str, object]]:
    """Read PATTERN=dense, PATTERN=rank:64 or PATTERN=keep:0.5.

    Raises:
        TwofoldError: if it is none of these.
    """
    pattern, equals, value = text.rpartition("=")
    key, _, number = value.partition(":")
    try:
        if pattern and equals:
            if key == "dense" and not number:
                return pattern, {"dense": True}
            if key == "rank":
                return pattern, {"rank": int(number)}
            if key == "keep":
                return pattern, {"keep": float(number)}
    except ValueError:
        pass
    raise TwofoldError(
        f"the override {text!r} is not understood: write PATTERN=dense, PATTERN=rank:64 or PATTERN=keep:0.5"
    )
