"""What makes images and clips into inputs of a model: its image processor, its feature extractor."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line, quiet_bars
from twofold.model.tokenizer import OWN_CODE, needs_trust

if TYPE_CHECKING:
    from twofold.model.load import LoadedModel

IMAGES, CLIPS, TOKENS, WHOLE = "image_processor", "feature_extractor", "tokenizer", "processor"
FILES = ("preprocessor_config.json", "processor_config.json")


def parts_of(given: Any) -> dict[str, Any]:
    """Return the parts of a processor that a caller gave, or the part that it is itself; what is neither is a tokenizer."""
    from transformers import FeatureExtractionMixin, ImageProcessingMixin, ProcessorMixin

    if given is None:
        return {}
    if isinstance(given, ProcessorMixin):
        found = {name: getattr(given, name, None) for name in (TOKENS, IMAGES, CLIPS)}
        return {WHOLE: given, **{name: part for name, part in found.items() if part is not None}}
    if isinstance(given, ImageProcessingMixin):
        return {IMAGES: given}
    return {CLIPS if isinstance(given, FeatureExtractionMixin) else TOKENS: given}


def image_processor_of(loaded: LoadedModel) -> Any:
    """Return the image processor of a model, the one that works on pictures of Pillow.

    Raises:
        TwofoldError: if it has none, or it can't be used.
    """
    return _part(loaded, IMAGES)


def feature_extractor_of(loaded: LoadedModel) -> Any:
    """Return the feature extractor of a model of speech; its ``sampling_rate`` is that of clips, in hertz.

    Raises:
        TwofoldError: if it has none, or it can't be used.
    """
    extractor = _part(loaded, CLIPS)
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int) or isinstance(rate, bool) or rate <= 0:
        raise TwofoldError(
            f"the feature extractor of {loaded.name} has a sampling rate of {rate}; put the one that the model was trained "
            f"with into {FILES[0]}"
        )
    return extractor


def processor_of(loaded: LoadedModel) -> Any:
    """Return the processor of a model that puts pictures into texts.

    Raises:
        TwofoldError: if it has none, or it can't be used.
    """
    return _part(loaded, WHOLE)


def _part(loaded: LoadedModel, name: str) -> Any:
    """Return a part of the processor of a model, which is read once."""
    if name not in loaded.processors:
        loaded.processors[name] = _read(loaded, name)
    return loaded.processors[name]


def _read(loaded: LoadedModel, name: str) -> Any:
    words = name.replace("_", " ")
    folder = loaded.source or (loaded.fetch() if loaded.fetch is not None else None)
    lacking = f"the model {loaded.name} has no {words}; put its {FILES[0]} beside the weights, or pass processor= with a model"
    if folder is None:
        raise TwofoldError(lacking)
    if name in (IMAGES, WHOLE) and importlib.util.find_spec("PIL") is None:
        raise TwofoldError("to read images, install the package pillow: pip install 'twofold[vision]'")
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    # With Pillow wherever it runs, so that a model sees the same on every machine.
    kinds = {IMAGES: AutoImageProcessor, CLIPS: AutoFeatureExtractor, WHOLE: AutoProcessor}
    kind, how = kinds[name], {} if name == CLIPS else {"backend": "pil"}
    try:
        with quiet_bars():
            return kind.from_pretrained(folder, trust_remote_code=loaded.trusted, **how)
    except Exception as error:
        if needs_trust(error):
            raise TwofoldError(f"the {words} of {loaded.name} {OWN_CODE}") from error
        if not any((folder / file).is_file() for file in FILES):
            raise TwofoldError(lacking) from error
        raise TwofoldError(
            f"the {words} of {loaded.name} can't be made of its {FILES[0]}: {first_line(error)}"
        ) from error
