"""A checkpoint with its own code: plain transformers loads it with ``trust_remote_code=True``, without Twofold.

It has a model type of its own. With the native one, a loader without trust would build the native model and leave its weights
random.
"""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from twofold.checkpoint.beside import LICENCE, MODEL, TOKENIZER
from twofold.checkpoint.ties import tie, tied_names
from twofold.errors import TwofoldError
from twofold.exports import portable_layers
from twofold.exports.formats import Source, Written, export_format
from twofold.exports.layers import compact_layers
from twofold.exports.other_process import OtherProcess
from twofold.model.written import save_model, write_generation
from twofold.nn.places import cast_weights

FILE = "modeling_twofold"
OWN = ("model_type", "quantization_config", "architectures", "auto_map", "transformers_version", "dtype")
HEADS = (
    "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice",
    "AutoModelForImageClassification", "AutoModelForImageTextToText",
)  # fmt: skip
README = """---
library_name: transformers
tags: [twofold, low-rank]
---
A {native} whose weight matrices are kept as products of smaller ones, in Twofold's portable format. It needs no package but
transformers; the code that builds it is `{file}.py`, which stands beside the weights. Read it before you trust it.

```python
from transformers import {auto}

model = {auto}.from_pretrained(FOLDER, trust_remote_code=True)
```
"""


@export_format("portable", factored=True, beside=(LICENCE, TOKENIZER, MODEL))
def write_portable(source: Source, folder: Path) -> Written:
    """Write the weights as they are, and a modeling file that subclasses the architecture's own classes.

    Raises:
        TwofoldError: if the architecture is not one of transformers' own.
    """
    model = source.model
    native = type(model)
    if not native.__module__.startswith("transformers."):
        raise TwofoldError(
            f"{source.loaded.name} has an architecture of its own, {native.__name__}, and `to=portable` takes those of "
            "transformers; use `to=dense`"
        )
    base = modeling_auto.MODEL_MAPPING.get(type(model.config), None)
    base = base if isinstance(base, type) else native
    heads = [auto for auto in HEADS if _knows(auto, native)]
    (folder / f"{FILE}.py").write_text(_code(type(model.config), base, native), encoding="utf-8")

    cast_weights(model, source.dtype)
    mine = _build(folder / f"{FILE}.py", model, native)
    config = mine.config
    config.dtype = source.dtype
    config.auto_map = {"AutoConfig": f"{FILE}.{_name(type(model.config))}", "AutoModel": f"{FILE}.{_name(base)}"}
    config.auto_map |= dict.fromkeys(heads, f"{FILE}.{_name(native)}")
    save_model(mine, folder)
    write_generation(model, folder)
    auto = next(iter(heads), "AutoModel")
    (folder / "README.md").write_text(README.format(native=native.__name__, file=FILE, auto=auto), encoding="utf-8")
    return Written(
        lambda: OtherProcess(folder, auto),
        [
            "Read again by plain transformers with trust_remote_code, in a process that can't import twofold.",
            "Not for tensor parallelism: every process of such a server would hold all factors.",
        ],
    )


def _knows(auto: str, native: type) -> bool:
    """Tell whether an Auto class knows a model class."""
    names = getattr(transformers, auto)._model_mapping._model_mapping.values()
    known = any(native.__name__ in (name if isinstance(name, tuple | list) else (name,)) for name in names)
    return known and getattr(transformers, native.__name__, None) is native


def _name(native: type) -> str:
    return f"Twofold{native.__name__}"


def _code(config: Any, base: type, native: type) -> str:
    """Write the modeling file: the layers, and classes that put them in the place of the architecture's own."""
    kinds = list(dict.fromkeys((base, native)))
    imports = "\n".join(f"from {kind.__module__} import {kind.__name__}" for kind in [config, *kinds])
    torchs = "from torch import Tensor, nn\n"
    layers = inspect.getsource(portable_layers).replace(torchs, torchs + imports + "\n", 1)
    configuration = f'''
class {_name(config)}({config.__name__}):
    """The configuration of the architecture, and which of its layers are smaller (`twofold_modules`)."""

    model_type = "twofold_{config.model_type}"
    base_model_tp_plan = None
'''
    classes = [
        f'''
class {_name(kind)}({kind.__name__}):
    """The architecture's own class, with smaller layers."""

    config_class = {_name(config)}
    _tp_plan = None

    def __init__(self, config, *inputs, **settings):
        super().__init__(config, *inputs, **settings)
        shrink(self, config.twofold_modules)
'''
        for kind in kinds
    ]
    return "\n".join([layers, configuration, *classes])


def _build(file: Path, model: Any, native: type) -> Any:
    """Build the model again, of the class in a modeling file, with the very tensors."""
    classes = runpy.run_path(str(file), run_name=FILE)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in OWN}
    modules = {name: layer.settings() for name, layer in compact_layers(model).items()}
    for about in modules.values():
        del about["kind"]  # the portable code tells the kinds apart by the other keys
    config = classes[_name(type(model.config))](**settings, twofold_modules=modules)
    with torch.device("meta"):
        mine = classes[_name(native)](config)
    mine.load_state_dict(model.state_dict(), assign=True)
    tie(mine, tied_names(model))
    return mine
