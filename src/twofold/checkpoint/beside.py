"""The files beside the weights of a checkpoint: which belong to the model, and which are left out, each with its reason.

What belongs to it is carried along byte for byte, whichever command writes the result. Code is copied where an ``auto_map``
names it, and never run.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import yaml

from twofold.checkpoint.headers import leads_out
from twofold.host.folders import is_by_twofold
from twofold.host.quiet import first_line

# The fields of a card that name a licence; one under several has a list.
Licence: TypeAlias = dict[str, str | list[str]]

LICENCE, TOKENIZER, MODEL, CODE = "licence", "tokenizer", "model", "code"
WHOLE = (LICENCE, TOKENIZER, MODEL, CODE)  # what goes with a whole model
ADAPTER = (LICENCE, TOKENIZER)  # what goes with an adapter, which is put on a model that has the rest
FOLDERS = {"additional_chat_templates": TOKENIZER, "custom_generate": CODE}  # that transformers knows by name
GENERATION = "generation_config.json"

# What a command writes itself, or reads as the weights; nothing is lost that would have to be told.
OWN = re.compile(r"config\.json|model([.-].*)?\.safetensors(\.index\.json)?|manifest\.json")
# Files and folders that hold terms, wherever the word stands in the name; rows may have it in theirs, and are none.
LICENCES = re.compile(
    r"(?!.*\.(csv|tsv|jsonl|parquet|arrow)$).*(licen[cs]|(?<![a-z])(copying|copyright|notice|eula|terms|patents|use[-_ ]?policy|"
    r"acceptable[-_ ]?use|third[-_ ]?party)).*", re.I,
)  # fmt: skip
RECORDS = re.compile(r"(plan|run|twofold-export)\.json|recipe\.yaml|spectra\.safetensors|report\.html|loss\.svg")
NEVER = (  # a name, and why it is not carried along, whatever else the name says; the first that matches
    (r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz)", "it may hold a pickle, which can run code"),
    (r".*\.(safetensors|gguf|onnx|onnx[._]data|h5|msgpack|tflite|ot|xml)|.*\.index\.json|params\.json|consolidated.*",
     "weights in another form"),
    (r".*\.(py|pyc|so|dll)", "code that no auto_map names"),
)  # fmt: skip
LEFT = (  # the same of what is no licence
    (r"README.*", "it describes the original"),
    (RECORDS.pattern, "the record of how the original was made"),
    (r"trainer_state\.json|.*_results\.json|zero_to_fp32\.py|latest|events\.out.*|.*\.(distcp|log)", "left by a training"),
    (r"adapter_.*", "an adapter, which is no part of the model"),
    (r"(quant|quantize|quantization|hf_quant)_config\.json", "it describes how the original's weights were stored"),
    (r".*\.(png|jpe?g|gif|svg|webp|pdf|mp4)", "it belongs to the original's description"),
    (r"\..*", "it belongs to the repository that the original came from"),
)  # fmt: skip
TOKENIZERS = re.compile(
    r".*token.*\.json|tokenizer\..*|tekken\.json|normalizer\.json|vocab.*\.(json|txt|bpe)|merges\.txt|dict\.txt|chat_template\..*"
    r"|.*\.(model|tiktoken|bpe|spm|vocab|codes|jinja)"
)
MODELS = re.compile(r".*(config|processor|modules|labels?).*\.json|requirements\.txt")
LICENCE_FIELD = re.compile(r"[\w.+:/#?=&%() -]{1,200}")
# What is fetched of a model on the hub, beside its weights.
PATTERNS = [
    "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.bpe", "*.spm", "*.vocab", "*.codes", "README.md",
    "[0-9]_*/*.safetensors",
    *(f"*{word}*" for name in ("licen", "copying", "copyright", "notice", "eula", "terms", "patents", "policy", "accept", "third")
      for word in (name, name.capitalize(), name.upper())),
]  # fmt: skip


@dataclass
class Beside:
    """The files beside the weights in a folder, by their names in it."""

    folder: Path
    carried: dict[str, str] = field(default_factory=dict)  # name → what it belongs to
    left: dict[str, str] = field(default_factory=dict)  # name, or that of a folder → why

    def only(self, kinds: Collection[str]) -> Beside:
        """Return the same for a result that is to have these kinds alone; what an adapter leaves to its model is not told."""
        if set(kinds) >= set(WHOLE):
            return self
        kept = {name: kind for name, kind in self.carried.items() if kind in kinds}
        if MODEL not in kinds:
            return Beside(self.folder, kept, {n: reason for n, reason in self.left.items() if LICENCES.fullmatch(n)})
        dropped = {
            name: f"{kind} of the original, which this form does not take"
            for name, kind in self.carried.items()
            if name not in kept
        }
        return Beside(self.folder, kept, self.left | dropped)

    @property
    def notes(self) -> list[str]:
        """What is left out, with the reasons; and what is carried along although nothing can read it."""
        said = []
        if self.left:
            reasons: dict[str, list[str]] = {}
            for name, reason in self.left.items():
                reasons.setdefault(reason, []).append(name)
            parts = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
            said.append(f"not carried along from the folder of the original: {'; '.join(parts)}")
        if GENERATION in self.carried and not read_settings(self.folder / GENERATION):
            said.append(f"{GENERATION} holds no settings that can be read; it is carried along as it is")
        return said

    def copy(self, out: Path) -> None:
        """Copy what is carried along, byte for byte.

        Where the model's own code is, the configuration that was written names it as the original's does.
        """
        for name in self.carried:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, out / name)
        own, path = read_settings(self.folder / "config.json").get("auto_map"), out / "config.json"
        written = read_settings(path)
        if CODE in self.carried.values() and own and written and written.get("auto_map") != own:
            path.write_text(json.dumps(written | {"auto_map": own}, indent=2) + "\n", encoding="utf-8")


def files_beside(folder: Path, kinds: Collection[str] = WHOLE) -> Beside:
    """Tell for each file in a checkpoint's folder whether it is carried along.

    Args:
        kinds: what the result is to have of it.
    """
    found = Beside(folder)
    named = _named_folders(folder)
    vocabularies = {
        value for key, value in read_settings(folder / "tokenizer_config.json").items() if key.endswith("_file")
    }
    ours = is_by_twofold(folder)
    for path in sorted(folder.iterdir()):
        inside = next((kind for place, kind in named.items() if PurePosixPath(place).parts[0] == path.name), None)
        if path.is_dir() and inside is None and LICENCES.fullmatch(path.name):
            inside = LICENCE
        if path.is_dir() and inside is None:
            found.left[f"{path.name}/"] = "a folder that no file of the model names"
        elif path.is_dir() and inside is not None:
            for file in sorted(file for file in path.rglob("*") if not file.is_dir()):
                code = inside != LICENCE and file.suffix in (".py", ".safetensors")
                _put(found, file, inside, "" if code else _why_left(file.name, is_licence=inside == LICENCE or None))
        elif not OWN.fullmatch(path.name) and not (ours and RECORDS.fullmatch(path.name)):
            kind = TOKENIZER if path.name in vocabularies else _kind(path.name)
            _put(found, path, kind or MODEL, "" if kind else _why_left(path.name) or "not known to belong to a model")
    found = found.only(kinds)
    for name in _code(folder, [*(["config.json"] if CODE in kinds else []), *found.carried]):
        if leads_out(folder / name, folder) is None:
            found.left.pop(name, None)
            found.carried[name] = CODE
    return found


def _put(found: Beside, path: Path, kind: str, reason: str) -> None:
    """Write down that a file is carried along; or left out, if there is a reason or it is no file of this folder."""
    name, target = path.relative_to(found.folder).as_posix(), leads_out(path, found.folder)
    if not reason and target is not None:
        reason = f"a link to {target}, outside of its folder"
    elif not reason and not path.is_file():
        reason = "no file"
    if reason:
        found.left[name] = reason
    else:
        found.carried[name] = kind


def _kind(name: str) -> str | None:
    """Return what a file belongs to by its name; None if it is not carried along."""
    if _why_left(name):
        return None
    if LICENCES.fullmatch(name):
        return LICENCE
    return TOKENIZER if TOKENIZERS.fullmatch(name) else MODEL if MODELS.fullmatch(name) else None


def _why_left(name: str, *, is_licence: bool | None = None) -> str:
    """Return why a file is never carried along; empty if it may be. Whether it is a licence is told by its name if not given."""
    is_licence = LICENCES.fullmatch(name) is not None if is_licence is None else is_licence
    rules = NEVER if is_licence else (*LEFT, *NEVER)
    return next((why for pattern, why in rules if re.fullmatch(pattern, name)), "")


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _named_folders(folder: Path) -> dict[str, str]:
    """Return the folders that belong to the model: those that transformers knows, and the modules of sentence-transformers."""
    named = dict(FOLDERS)
    with suppress(OSError, ValueError, RecursionError):
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        for module in modules if isinstance(modules, list) else []:
            place = module.get("path") if isinstance(module, dict) else None
            if isinstance(place, str) and place and ".." not in PurePosixPath(place).parts:
                named[place] = MODEL
    return named


def _code(folder: Path, settings: Collection[str]) -> list[str]:
    """Return the files of code that the ``auto_map`` of some settings names, with those that they import from beside them."""
    waiting = [
        reference.rpartition(".")[0]
        for name in settings
        if name.endswith(".json")
        for reference in _references(read_settings(folder / name).get("auto_map"))
    ]
    names: dict[str, None] = {}
    while waiting:
        name = f"{waiting.pop().replace('.', '/')}.py"
        if name not in names and (folder / name).is_file():
            names[name] = None
            waiting += _imports(folder, name)
    return sorted(names)


def _references(auto_map: Any) -> Iterator[str]:
    """Yield the classes that an ``auto_map`` names in this folder; those of another repository stand behind its name and --."""
    for value in auto_map.values() if isinstance(auto_map, dict) else []:
        for reference in value if isinstance(value, list | tuple) else [value]:
            if isinstance(reference, str) and "--" not in reference:
                yield reference


def _imports(folder: Path, name: str) -> Iterator[str]:
    """Yield the modules that a file of code imports relatively, by their dotted names from the folder."""
    with suppress(OSError, ValueError, SyntaxError, RecursionError):
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        package = PurePosixPath(name).parent.parts
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(package) + 1:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                stem = ".".join(part for part in base if part)
                yield from filter(None, [stem, f"{stem}.__init__" if stem else "__init__"])
                yield from (f"{stem}.{alias.name}".lstrip(".") for alias in node.names)


def base_licence(folder: Path) -> tuple[Licence, list[str]]:
    """Return the licence that a model's card names, in the fields of a card; else the file that holds it, if there is one.

    Returns:
        The fields, and what is to be said of a card that can't be read.
    """
    about, notes = _front_matter(folder / "README.md")
    fields = {key: about[key] for key in ("license", "license_name", "license_link") if about.get(key) is not None}
    named = {key: value for key, value in fields.items() if _is_licence(value)}
    if fields.keys() - named.keys():
        notes.append(
            f"README.md names a licence that can't be read, in {', '.join(sorted(fields.keys() - named.keys()))}"
        )
    if "license" in named:
        return named, notes
    names = (path.name for path in folder.iterdir() if LICENCES.fullmatch(path.name) and not _why_left(path.name))
    files = sorted(
        (name for name in names if re.search(r"licen[cs]|copying|eula", name, re.I)),
        key=lambda name: (re.match(r"licen[cs]|copying", name, re.I) is None, name),
    )
    return {"license": "other", "license_link": files[0]} if files else {}, notes


def _is_licence(value: Any) -> bool:
    """Tell whether a field of a card names a licence, or several."""
    several = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, str) and LICENCE_FIELD.fullmatch(one) for one in several)


def _front_matter(card: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the fields at the head of a card, which is data and may hold anything; with a note where it can't be read."""
    try:
        text = card.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("---"):
            return {}, []
        about = yaml.safe_load(text.lstrip().removeprefix("---").partition("\n---")[0])
        if not isinstance(about, dict):
            raise ValueError("they are no table")
        return about, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return {}, [
            f"the fields of README.md can't be read, so the licence that it may name is not: {first_line(error)}"
        ]
