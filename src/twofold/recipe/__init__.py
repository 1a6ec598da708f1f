"""The recipe: the settings of all stages and methods together, as the command line, a YAML file and a stored run have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from twofold.allocate import ALLOCATIONS
from twofold.objectives import OBJECTIVES
from twofold.planning.settings import SIZES
from twofold.recipe.effort import Dial, parts_of
from twofold.refine import REFINEMENTS
from twofold.settings.base import Settings, validated
from twofold.task.text.settings import HELD_OUT


def method_settings() -> list[type[Settings]]:
    """Return the settings that the registered methods bring, each once."""
    methods: list[Any] = [*OBJECTIVES.all(), *ALLOCATIONS.all(), *REFINEMENTS.all()]
    return list(dict.fromkeys(method.settings for method in methods if method.settings is not None))


class _Recipe(Dial):
    """How a model is factorized. The description of each field is also the help of its flag."""

    @pydantic.model_validator(mode="after")
    def _as_published(self) -> _Recipe:
        """Give a published method the settings that its source has, where none are named."""
        for name, value in OBJECTIVES.get(self.objective).defaults.items():
            if name not in self.model_fields_set:
                setattr(self, name, value)
        return self

    @pydantic.model_validator(mode="after")
    def _dialled(self) -> _Recipe:
        """Give the parts that an effort stands for their values, where they are not named."""
        if self.effort is not None:
            for name, value in parts_of(self.effort, self).items():
                if name not in self.model_fields_set and (name != "minutes" or self.refine):
                    setattr(self, name, value)
        return self

    @pydantic.model_validator(mode="after")
    def _sized(self) -> _Recipe:
        """Refuse no size, more than one, and what a size does not go with."""
        sizes = sum(getattr(self, name) is not None for name in SIZES)
        if self.corrects and sizes:
            raise ValueError(
                f"`objective={self.objective}` has its size from `bits` and `rank`; leave `keep`, `budget` and the qualities out"
            )
        if not self.corrects and sizes != 1:
            raise ValueError(
                "give either `keep` (share of the factorized weights), `budget` (size of the whole model), `latency` (share of "
                "the time for one token), `perplexity_at_most` (25 or 1.1x) or `kl_at_most` (nats per token), and only one of "
                "them"
            )
        if self.goal is not None and self.eval_windows == 0:
            raise ValueError(
                f"{self.goal.setting} needs measuring, and `eval_windows=0` measures nothing; give some windows, or `keep`"
            )
        if self.bits == "auto" and not self.in_bytes:
            raise ValueError(
                "`bits=auto` shares out a budget in bytes over ranks and bits; give one, as in `budget=60MB`, or a number of bits"
            )
        return self

    @property
    def held_out_windows(self) -> int:
        """The windows to set aside: a refinement stops on others than those that the quality is measured on."""
        return HELD_OUT + (self.eval_windows if self.refine and self.eval_text is None else 0)

    @property
    def held_out_samples(self) -> int:
        """The same where samples are no windows: none that nothing looks at."""
        measured = self.eval_windows if self.eval_text is None else 0
        return measured + (HELD_OUT if self.refine else 0)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, defaults included, so that a stored recipe says all."""
        settings = self.model_dump(mode="json", exclude_none=True, exclude={"trust_remote_code"})
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


if TYPE_CHECKING:
    Recipe = _Recipe
else:
    Recipe = pydantic.create_model("Recipe", __base__=(*method_settings(), _Recipe), __module__=__name__)
    Recipe.__doc__ = _Recipe.__doc__


def recipe_type() -> type[Recipe]:
    """Return the recipe with the settings of methods that other packages have registered since."""
    more = [kind for kind in method_settings() if not kind.model_fields.keys() <= Recipe.model_fields.keys()]
    bases: Any = (*more, Recipe)
    return pydantic.create_model("Recipe", __base__=bases) if more else Recipe


def make_recipe(settings: dict[str, object]) -> Recipe:
    """Check settings and return the recipe.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    kind = recipe_type()
    return validated(kind, settings, list(kind.model_fields))
