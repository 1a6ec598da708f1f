"""Corrupted and hostile input of every kind: each ends in one clear sentence, and leaves nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import twofold
import twofold.cli
from conftest import TEXT, make_model, make_tokenizer
from twofold.checkpoint.plugin import FORMAT_VERSION
from twofold.model.load import load_model
from twofold.planning.plan import Plan
from twofold.run.inspect import inspect

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM, UP, DOWN = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj"
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\n"  # leaves a trace if it is ever run
LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@dataclass(frozen=True)
class Case:
    """One corruption: what it does to a folder that holds ``model`` and ``texts.txt``, and what the sentence must name."""

    name: str
    spoil: Callable[[Path], None]
    says: tuple[str, ...]
    base: str = "dense"  # the checkpoint that is spoiled: dense, shards, factored
    command: str = "compress"


CASES: list[Case] = []


def case(name: str, *says: str, **settings: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a corruption to the table."""

    def add(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES.append(Case(name, spoil, says, **settings))
        return spoil

    return add


# --- Safetensors: length, header, data


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def bytes_of(change: Callable[[bytes], bytes], file: str = WEIGHTS) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "model" / file
        path.write_bytes(change(path.read_bytes()))

    return spoil


def header_of(change: Callable[[dict[str, Any]], Any], data: bytes = b"") -> Callable[[Path], None]:
    """Change a header in place; ``data`` is put behind the data."""

    def edit(raw: bytes) -> bytes:
        header, rest = split(raw)
        change(header)
        return join(header, rest + data)

    return bytes_of(edit)


def tensors_of(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a file that stays a proper one."""

    def spoil(root: Path) -> None:
        path = root / "model" / WEIGHTS
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

    return spoil


for size in (0, 1, 4, 7, 8, 9, 20, 100, 500, 1000):
    case(f"cut at byte {size}", WEIGHTS)(bytes_of(lambda raw, size=size: raw[:size]))
for part in (2, 3, 5, 10, 50):
    case(f"cut after 1/{part}", WEIGHTS)(bytes_of(lambda raw, part=part: raw[: len(raw) // part]))
for lost in (1, 2, 4, 50, 4096):
    case(f"cut {lost} bytes short", WEIGHTS)(bytes_of(lambda raw, lost=lost: raw[:-lost]))
for more in (1, 8, 4096):
    case(f"{more} bytes too many", WEIGHTS)(bytes_of(lambda raw, more=more: raw + b"\0" * more))
for bit in (*range(0, 16, 3), 17, 24, 31, 40, 55, 62, 63):

    @case(f"bit {bit} of the header's length flipped", WEIGHTS)
    @bytes_of
    def _(raw: bytes, bit: int = bit) -> bytes:
        return bytes([*raw[: bit // 8], raw[bit // 8] ^ (1 << bit % 8), *raw[bit // 8 + 1 : 8]]) + raw[8:]


for length in (0, 1, 2, 2**32, 2**63, 2**64 - 1):
    case(f"the header's length is {length}", WEIGHTS)(
        bytes_of(lambda raw, length=length: struct.pack("<Q", length) + raw[8:])
    )
for place in (8, 9, 10, 60, 130, 200):
    case(f"bit 7 of header byte {place} flipped", WEIGHTS)(
        bytes_of(lambda raw, place=place: raw[:place] + bytes([raw[place] ^ 0x80]) + raw[place + 1 :])
    )
for name, text in {
    "is empty": b"{}",
    "is a list": b"[]",
    "is a number": b"7",
    "is null": b"null",
    "is nested deeply": b"[" * 50_000,
    "is blanks": b" " * 64,
    "is zeros": b"\0" * 64,
    "is no UTF-8": b'{"\xff\xfe": {}}',
    "names a tensor null": b'{"a": null}',
    "names a tensor of no dtype": b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
    "has metadata that are no words": b'{"__metadata__": {"format": 7}}',
}.items():
    case(f"the header {name}", "model")(bytes_of(lambda raw, text=text: join(text, split(raw)[1])))
for name, change in {
    "unknown dtype": lambda h: h[UP].update(dtype="F31"),
    "no dtype": lambda h: h[UP].pop("dtype"),
    "dtype of half the width": lambda h: h[UP].update(dtype="BF16"),
    "dtype of twice the width": lambda h: h[UP].update(dtype="F64"),
    "negative size": lambda h: h[UP].update(shape=[-80, 32]),
    "fractional size": lambda h: h[UP].update(shape=[80.5, 32]),
    "size beyond 64 bits": lambda h: h[UP].update(shape=[2**70, 1]),
    "sizes whose product overflows": lambda h: h[UP].update(shape=[2**40, 2**40]),
    "huge size": lambda h: h[UP].update(shape=[10**12, 32]),
    "size in words": lambda h: h[UP].update(shape=["80", 32]),
    "shape null": lambda h: h[UP].update(shape=None),
    "one row less": lambda h: h[UP].update(shape=[79, 32]),
    "no offsets": lambda h: h[UP].pop("data_offsets"),
    "offsets the wrong way round": lambda h: h[UP].update(data_offsets=h[UP]["data_offsets"][::-1]),
    "offsets of another tensor": lambda h: h[UP].update(data_offsets=h[DOWN]["data_offsets"]),
    "offsets behind the end": lambda h: h[UP].update(data_offsets=[10**9, 10**9 + 10240]),
    "negative offsets": lambda h: h[UP].update(data_offsets=[-10240, 0]),
    "three offsets": lambda h: h[UP].update(data_offsets=[0, 1, 2]),
    "a tensor without its entry": lambda h: h.pop(UP),
    "an entry without its data": lambda h: h.update(more={"dtype": "F32", "shape": [2], "data_offsets": [10**6, 10**6 + 8]}),
    "an entry that is a list": lambda h: h.update({UP: [1]}),
}.items():  # fmt: skip
    case(f"header entry: {name}", WEIGHTS)(header_of(change))


def twice(raw: bytes) -> bytes:
    """The header with one key twice."""
    header, data = split(raw)
    text = json.dumps(header)
    return join((text[:-1] + f', "{UP}": {json.dumps(header[DOWN])}' + "}").encode(), data)


case("header entry: a name twice", "model")(bytes_of(twice))
for name, shape in {
    "transposed": [32, 80],
    "flat": [2560],
    "with a third dimension": [80, 32, 1],
    "with other factors": [160, 16],
    "one-dimensional first": [1, 2560],
}.items():
    case(f"shape {name}", UP)(header_of(lambda h, shape=shape: h[UP].update(shape=shape)))
for name, tensor in {
    "missing row": torch.zeros(79, 32),
    "additional row": torch.zeros(81, 32),
    "scalar": torch.zeros(()),
    "empty": torch.zeros(0, 32),
    "square": torch.zeros(32, 32),
}.items():
    case(f"tensor of another size: {name}", UP)(tensors_of(lambda t, tensor=tensor: t.update({UP: tensor})))
case("a norm of another size", NORM)(tensors_of(lambda t: t.update({NORM: torch.ones(33)})))
case("an embedding of another size", "model.embed_tokens.weight")(
    tensors_of(lambda t: t.update({"model.embed_tokens.weight": torch.ones(100, 32)}))
)
for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64):
    case(f"a weight of dtype {dtype}", UP)(tensors_of(lambda t, dtype=dtype: t.update({UP: t[UP].to(dtype)})))
case("all weights of dtype int8", "model.")(
    tensors_of(lambda t: t.update({name: tensor.to(torch.int8) for name, tensor in t.items()}))
)
for name in (NORM, UP, DOWN, f"{QUERY}.weight"):
    case(f"{name} missing", name)(tensors_of(lambda t, name=name: t.pop(name)))
    case(f"{name} under another name", name)(tensors_of(lambda t, name=name: t.update({f"{name}s": t.pop(name)})))
case("the embeddings missing", "lacks")(tensors_of(lambda t: t.pop("model.embed_tokens.weight")))
case("no tensor at all", "model")(tensors_of(lambda t: t.clear()))
for name, value in {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}.items():
    for place in (UP, NORM, f"{QUERY}.weight"):
        case(f"{name} in {place}", place)(
            tensors_of(lambda t, place=place, value=value: t[place].view(-1)[7:8].fill_(value))
        )
for bit in range(8):  # the lower bits leave a number that is finite, but far too large

    @case(f"exponent all ones but for bit {bit - 1} of it" if bit else "exponent all ones", "model.")
    @tensors_of
    def _(tensors: dict[str, torch.Tensor], bit: int = bit) -> None:
        exponent = 0x7F800000 & ~((1 << 22 + bit) if bit else 0)
        number = tensors[UP].view(-1)[3:4].view(torch.int32)
        number.copy_((number & ~0x7F800000) | exponent)


# --- Which files hold the weights


def index_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "model" / INDEX
        index = json.loads(path.read_text())
        changed = change(index)
        path.write_text(json.dumps(index if changed is None or isinstance(changed, str) else changed))

    return spoil


def text_of(text: str | bytes, file: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / "model" / file).write_bytes(text.encode() if isinstance(text, str) else text)

    return spoil


for shard in (
    "../other.safetensors",
    "../../other.safetensors",
    "sub/../../other.safetensors",
    "/etc/passwd",
    "/etc/passwd.safetensors",
    "sub/model.safetensors",
    "./model-00001.safetensors",
    "..",
    ".",
    "",
    "pytorch_model.bin",
    "model.pkl",
    "absent.safetensors",
    "a" * 300 + ".safetensors",
    "nul\0.safetensors",
    "line\nfeed.safetensors",
    5,
    None,
    ["model.safetensors"],
    {"a": 1},
    True,
):
    case(f"the index names the shard {str(shard)[:40]!r}", "model", base="shards")(
        index_of(lambda index, shard=shard: index["weight_map"].update({UP: shard}))
    )
for name, text in {
    "is empty": "",
    "is cut": '{"metadata": {}, "weight_map": {"a": "b',
    "is no JSON": "not json",
    "is a list": "[]",
    "is a number": "3",
    "is null": "null",
    "is no UTF-8": b'{"weight_map": "\xff"}',
    "is nested deeply": '{"weight_map": ' + "[" * 100_000,
    "has no weight map": '{"metadata": {}}',
    "has a huge number": '{"weight_map": ' + "1" * 5000 + "}",
}.items():
    case(f"the index {name}", INDEX, base="shards")(text_of(text, INDEX))
for name, value in {"empty": {}, "a list": ["a"], "words": "model.safetensors", "null": None, "a number": 3}.items():
    case(f"the weight map is {name}", INDEX, base="shards")(
        index_of(lambda index, value=value: index.update(weight_map=value))
    )


def shards(root: Path) -> list[Path]:
    return sorted((root / "model").glob("*.safetensors"))


@case("a shard is missing", "00002-of", base="shards")
def _(root: Path) -> None:
    shards(root)[1].unlink()


@case("all shards are missing", "00001-of", base="shards")
def _(root: Path) -> None:
    for path in shards(root):
        path.unlink()


@case("a shard is a folder", "00002-of", base="shards")
def _(root: Path) -> None:
    shards(root)[1].unlink()
    shards(root)[0].with_name(f"model-00002-of-{len(shards(root)) + 1:05d}.safetensors").mkdir()


@case("a shard is cut", "00002-of", base="shards")
def _(root: Path) -> None:
    shards(root)[1].write_bytes(shards(root)[1].read_bytes()[:-9])


@case("a shard is empty", "00003-of", base="shards")
def _(root: Path) -> None:
    shards(root)[2].write_bytes(b"")


@case("two shards are exchanged", "safetensors", base="shards")
def _(root: Path) -> None:
    first, second, *_ = shards(root)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@case("a shard is the copy of another", "safetensors", base="shards")
def _(root: Path) -> None:
    shards(root)[1].write_bytes(shards(root)[0].read_bytes())


@case("a tensor stands in two shards", UP, base="shards")
def _(root: Path) -> None:
    name = json.loads((root / "model" / INDEX).read_text())["weight_map"][UP]
    other = next(path for path in shards(root) if path.name != name)
    tensors = {name: tensor.clone() for name, tensor in load_file(other).items()}
    save_file({**tensors, UP: torch.ones(80, 32)}, other, {"format": "pt"})


case("the index names a tensor that no shard has", "model.made_up", base="shards")(
    index_of(lambda index: index["weight_map"].update({"model.made_up": index["weight_map"][UP]}))
)
case("the index leaves a tensor out", UP, base="shards")(index_of(lambda index: index["weight_map"].pop(UP) and None))
case("the index says the wrong shard", UP, base="shards")(
    index_of(lambda index: index["weight_map"].update({UP: min(set(index["weight_map"].values()))}))
)


def linked(target: str, base: str) -> Callable[[Path], None]:
    """A weight file is a link to a place outside of its folder."""

    def spoil(root: Path) -> None:
        path = shards(root)[0] if base == "shards" else root / "model" / WEIGHTS
        place = root / target if not target.startswith("/") else Path(target)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        path.unlink(missing_ok=True)
        path.symlink_to(place)

    return spoil


for base in ("dense", "shards"):
    case(f"a link out of the folder ({base})", "outside of its folder", base=base)(linked("private.safetensors", base))
    case(f"a link to a file of the system ({base})", "outside of its folder", base=base)(linked("/etc/passwd", base))


@case("a link to itself", WEIGHTS)
def _(root: Path) -> None:
    (root / "model" / WEIGHTS).unlink()
    (root / "model" / WEIGHTS).symlink_to(WEIGHTS)


@case("pickles only", "pickles, which can run code")
def _(root: Path) -> None:
    (root / "model" / WEIGHTS).rename(root / "model" / "pytorch_model.bin")


@case("a pickle that is called safetensors", WEIGHTS)
def _(root: Path) -> None:
    weights = load_file(root / "model" / WEIGHTS)
    torch.save(weights, root / "model" / "pickle")
    (root / "model" / "pickle").rename(root / "model" / WEIGHTS)


@case("a pickled shard in the index", "pytorch_model.bin", base="shards")
def _(root: Path) -> None:
    index = json.loads((root / "model" / INDEX).read_text())
    weights = {name: tensor for path in shards(root) for name, tensor in load_file(path).items()}
    torch.save(weights, root / "model" / "pytorch_model.bin")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model.bin")
    (root / "model" / INDEX).write_text(json.dumps(index))


for name, value in {
    "out of the folder": "../private.safetensors",
    "a pickle": "adapter_model.bin",
    "absent": "absent.safetensors",
    "no name": 7,
}.items():

    @case(f"the configuration names weights: {name}", "transformers_weights")
    def _(root: Path, value: Any = value) -> None:
        (root / "private.safetensors").write_bytes((root / "model" / WEIGHTS).read_bytes())
        torch.save({}, root / "model" / "adapter_model.bin")
        config_of(transformers_weights=value)(root)


for name, raw in {
    "empty": b"",
    "four bytes": b"GGUF",
    "words": b"not a GGUF file" * 9,
    "cut": b"GGUF" + struct.pack("<IQQ", 3, 4, 9),
    "of no version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "of a huge count": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
    "of nothing": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
}.items():
    case(f"GGUF: {name}", "model.gguf", command="gguf")(text_of(raw, "model.gguf"))


# --- config.json


def config_of(**settings: Any) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "model" / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return spoil


for name, text in {
    "is empty": "",
    "is blank": "  \n",
    "is cut": '{"model_type": "llama", "hidden_',
    "is a list": "[]",
    "is a number": "7",
    "is null": "null",
    "is words": '"llama"',
    "is no UTF-8": b'{"model_type": "\xff\xfe"}',
    "is zeros": b"\0" * 200,
    "is nested deeply": '{"a": ' * 100_000,
    "has no field": "{}",
    "has a huge number": '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
    "has half a pair": '{"model_type": "\\ud800"}',
}.items():
    case(f"config.json {name}", "model")(text_of(text, CONFIG))
for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
    for value in (-1, 0, 1, 7, 10**12, 10**30, "32", 0.5, float("nan"), float("inf"), True, None, [32], {"a": 1}):
        case(f"config.json: {field} {value}", "model")(config_of(**{field: value}))
for field, value in (
    ("num_key_value_heads", 3),
    ("num_key_value_heads", -2),
    ("num_key_value_heads", 10**9),
    ("num_key_value_heads", "two"),
    ("head_dim", -8),
    ("head_dim", 10**12),
    ("head_dim", 7),
    ("max_position_embeddings", -128),
    ("max_position_embeddings", "many"),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1e9),
    ("rope_parameters", {"rope_theta": "big", "rope_type": "default"}),
    ("rope_parameters", {"rope_theta": float("nan"), "rope_type": "default"}),
    ("rope_parameters", {"rope_type": "spiral"}),
    ("rope_parameters", 5),
    ("hidden_act", "tangle"),
    ("hidden_act", 5),
    ("model_type", "toaster"),
    ("model_type", 5),
    ("model_type", None),
    ("model_type", "../llama"),
    ("architectures", 5),
    ("architectures", ["PreTrainedModel"]),
    ("architectures", ["GPT2LMHeadModel"]),
    ("dtype", "int32"),
    ("dtype", "float33"),
    ("dtype", "load"),
    ("dtype", 5),
    ("dtype", "complex64"),
    ("quantization_config", 5),
    ("quantization_config", {"quant_method": "no-such-method"}),
    ("quantization_config", {"quant_method": 5}),
    ("quantization_config", {}),
    ("tie_word_embeddings", "perhaps"),
    ("tie_word_embeddings", False),
    ("layer_types", ["full_attention"] * 10**5),
    ("layer_types", ["no_attention", "no_attention"]),
    ("attention_bias", True),
):
    case(f"config.json: {field} {str(value)[:60]}", "model")(config_of(**{field: value}))
for field in ("model_type",):

    @case(f"config.json without {field}", "model")
    def _(root: Path, field: str = field) -> None:
        path = root / "model" / CONFIG
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps({key: value for key, value in config.items() if key not in (field, "architectures")})
        )


case("config.json of a model that fits no memory", "numbers, its weight files hold")(
    text_of(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32768, "n_head": 8, "n_layer": 20}',
        CONFIG,
    )
)


@case("config.json is a folder", CONFIG)
def _(root: Path) -> None:
    (root / "model" / CONFIG).unlink()
    (root / "model" / CONFIG).mkdir()


for kind, auto_map in {
    "AutoConfig": {"AutoConfig": "evil.EvilConfig"},
    "both": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    "of another repository": {"AutoConfig": "someone/evil--evil.EvilConfig"},
    "words": "evil.EvilConfig",
}.items():

    @case(f"config.json asks to run code: {kind}", "model")
    def _(root: Path, auto_map: Any = auto_map) -> None:
        (root / "model" / "evil.py").write_text(EVIL)
        config_of(model_type="evil", architectures=["EvilModel"], auto_map=auto_map)(root)


# --- Factored checkpoints


def modules_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what a factored checkpoint's configuration says of its layers."""

    def spoil(root: Path) -> None:
        path = root / "model" / CONFIG
        config = json.loads(path.read_text())
        modules = config["quantization_config"]["modules"]
        changed = change(modules)
        if changed is not None:
            config["quantization_config"]["modules"] = changed
        path.write_text(json.dumps(config))

    return spoil


def quantization_of(**settings: Any) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "model" / CONFIG
        config = json.loads(path.read_text())
        config["quantization_config"] |= settings
        path.write_text(json.dumps(config))

    return spoil


factored: dict[str, Any] = {"base": "factored", "command": "eval"}
for value in (-1, 0, 1, 31, 32, 10**12, 10**30, "3", "three", 3.5, None, [3], {"r": 3}, True):
    case(f"factored: rank {value}", QUERY, **factored)(
        modules_of(lambda m, value=value: m[QUERY].update(rank=value) and None)
    )
for value in ("diagonal", "", 5, None, ["rows"], "ROWS", "gauge"):
    case(f"factored: form {value}", QUERY, **factored)(
        modules_of(lambda m, value=value: m[QUERY].update(form=value) and None)
    )
for value in ("magic", "", "_basis", "twofold.nn.layers.factored", "sliced", "x" * 10**6, 5, None, ["factored"], {}):
    case(f"factored: kind {str(value)[:40]!r}", QUERY, **factored)(
        modules_of(lambda m, value=value: m[QUERY].update(kind=value) and None)
    )
case("factored: the other form", QUERY, **factored)(modules_of(lambda m: m[QUERY].update(form="plain") and None))
case("factored: no rank", QUERY, **factored)(modules_of(lambda m: m[QUERY].pop("rank") and None))
case("factored: an unknown setting", QUERY, **factored)(modules_of(lambda m: m[QUERY].update(code="evil") and None))
for value in (None, 5, "rows", []):
    case(f"factored: a module is {value}", QUERY, **factored)(
        modules_of(lambda m, value=value: m.update({QUERY: value}) and None)
    )
for value in (5, "all", [QUERY], {}):
    case(f"factored: the modules are {value}", "model", **factored)(modules_of(lambda m, value=value: value))
for name in (
    "../../etc/passwd",
    "../model.layers.0.mlp.up_proj",
    "/etc/passwd",
    "model.layers.7.mlp.up_proj",
    "model.layers.0.mlp.no_proj",
    "model..layers",
    "__class__",
    "model.layers.0.mlp.up_proj.reduce",
    "line\nfeed",
    "\x1b[31mred",
):
    case(f"factored: a module is called {name!r}", "factorizes", **factored)(
        modules_of(lambda m, name=name: m.update({name: {"rank": 3, "form": "rows"}}) and None)
    )
for name in ("model.layers.0.mlp", "model.embed_tokens", "model.norm", ""):
    case(f"factored: a module is called {name!r}", name or "LlamaForCausalLM", "is no linear layer", **factored)(
        modules_of(lambda m, name=name: m.update({name: {"rank": 3, "form": "rows"}}) and None)
    )
for value in (FORMAT_VERSION + 1, 99, -1, 0, "1", None, 1.5, [1], True):
    case(f"factored: format version {value}", "format version", **factored)(quantization_of(format_version=value))
case("factored: a module is left out", QUERY, **factored)(modules_of(lambda m: m.pop(QUERY) and None))
for name, change in {
    "reduce missing": lambda t: t.pop(f"{QUERY}.reduce.weight"),
    "expand missing": lambda t: t.pop(f"{QUERY}.expand.weight"),
    "order missing": lambda t: t.pop(f"{QUERY}.order"),
    "guard missing": lambda t: t.pop(f"{QUERY}.weight"),
    "reduce transposed": lambda t: t.update({f"{QUERY}.reduce.weight": t[f"{QUERY}.reduce.weight"].T}),
    "reduce of another rank": lambda t: t.update({f"{QUERY}.reduce.weight": torch.ones(3, 32)}),
    "guard of a dense weight": lambda t: t.update({f"{QUERY}.weight": torch.ones(32, 32)}),
    "order too short": lambda t: t.update({f"{QUERY}.order": t[f"{QUERY}.order"][:-1]}),
    "order out of range": lambda t: t[f"{QUERY}.order"][:1].fill_(32),
    "order far out of range": lambda t: t[f"{QUERY}.order"][:1].fill_(2**31 - 1),
    "order negative": lambda t: t[f"{QUERY}.order"][:1].fill_(-1),
    "order twice the same": lambda t: t[f"{QUERY}.order"][:1].copy_(t[f"{QUERY}.order"][1:2]),
    "order of floats": lambda t: t.update({f"{QUERY}.order": t[f"{QUERY}.order"].float()}),
    "expand of integers": lambda t: t.update({f"{QUERY}.expand.weight": t[f"{QUERY}.expand.weight"].int()}),
    "NaN in expand": lambda t: t[f"{QUERY}.expand.weight"].view(-1)[:1].fill_(float("nan")),
    "an embedding of another size": lambda t: t.update({"model.embed_tokens.weight": torch.ones(100, 32)}),
    "a norm of two dimensions": lambda t: t.update({NORM: torch.ones(32, 1)}),
}.items():
    key = {"an embedding of another size": "embed_tokens", "a norm of two dimensions": NORM}.get(name, QUERY)
    case(f"factored: {name}", key, **factored)(tensors_of(change))


# --- Recipes and plans


def recipe_of(text: str | bytes) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        given = text.encode() if isinstance(text, str) else text
        (root / "recipe.yaml").write_bytes(given)

    return spoil


for name, text, *says in (
    ("empty", "", "keep"),
    ("words", "keep", "recipe.yaml"),
    ("a list", "- keep: 0.5", "recipe.yaml"),
    ("cut", "keep: [0.5", "recipe.yaml"),
    ("a tab", "keep:\t0.5\n\twindow: 3", "recipe.yaml"),
    ("no UTF-8", b"keep: 0.5\nmodel: \xff\xfe", "recipe.yaml"),
    ("zeros", b"\0" * 50, "recipe.yaml"),
    ("an unknown anchor", "keep: *none", "recipe.yaml"),
    ("two documents", "keep: 0.5\n---\nkeep: 0.6", "recipe.yaml"),
    ("a key that is a list", "? [a, b]\n: 1", "recipe.yaml"),
    ("a date that is none", "keep: 0.5\ncalibration: 2001-99-99", "recipe.yaml"),
    ("an endless number", "keep: 0.5\ntokens: " + "9" * 5000, "recipe.yaml"),
    ("a number of a sign alone", "keep: 0.5\ntokens: 0b_", "recipe.yaml"),
    ("nested deeply", "keep: " + "[" * 20_000, "recipe.yaml"),
    ("nested flow", "keep: " + "{a: " * 5_000, "recipe.yaml"),
    ("bytes that are no base64", "keep: 0.5\ncalibration: !!binary a", "recipe.yaml"),
    ("a Python call", "keep: !!python/object/apply:os.system ['touch ran']", "recipe.yaml"),
    ("a Python object", "keep: !!python/object:twofold.plan.Plan {}", "recipe.yaml"),
    ("a Python name", "keep: !!python/name:os.system", "recipe.yaml"),
    ("a Python module", "keep: !!python/module:os", "recipe.yaml"),
    ("a Python tuple", "calibration: !!python/tuple [a, b]", "recipe.yaml"),
    ("an unknown tag", "keep: !evil 0.5", "recipe.yaml"),
    ("laughs as calibration", LAUGHS + "keep: 0.5\ncalibration: *a9", "--calibration"),
    ("laughs as the model", "keep: 0.5\n" + LAUGHS + "model: *a9", "--model"),
    ("laughs inside of overrides", "keep: 0.5\noverrides:\n  " + LAUGHS.replace("\n", "\n  ") + "\n", "--override"),
    ("laughs as keep", "overrides: {}\nkeep:\n  " + LAUGHS.replace("\n", "\n  ") + "\n", "--keep"),
    ("an alias to itself", "keep: &a [*a]", "--keep"),
    ("a mapping that holds itself", "keep: 0.5\noverrides: &a {q_proj: *a}", "overrides"),
    ("a number as a key", "keep: 0.5\n7: 8", "7"),
    ("null as a key", "keep: 0.5\n~: 8", "None"),
    ("an unknown setting", "keep: 0.5\nkepp: 0.6", "kepp"),
    ("an unknown setting with a line feed", 'keep: 0.5\n"a\\nb": 0.6', "setting"),
    ("remote code", "keep: 0.5\ntrust_remote_code: true", "recipe.yaml"),
    ("remote code as words", "keep: 0.5\ntrust_remote_code: 'yes'", "recipe.yaml"),
    ("keep and budget", "keep: 0.5\nbudget: 70%", "keep"),
    ("neither", "tokens: 64", "keep"),
    ("objective unknown", "keep: 0.5\nobjective: magic", "magic"),
    ("objective a path", "keep: 0.5\nobjective: ../../evil", "evil"),
    ("allocate unknown", "keep: 0.5\nallocate: magic", "magic"),
    ("device unknown", "keep: 0.5\ndevice: abacus", "abacus"),
    ("model a number", "keep: 0.5\nmodel: 7", "--model"),
    ("model with a zero byte", 'keep: 0.5\nmodel: "a\\0b"', "model"),
    ("model with a line feed", 'keep: 0.5\nmodel: "./a\\nb"', "folder"),
    ("model far too long", f"keep: 0.5\nmodel: {'a' * 5000}", "model"),
    ("model of an unknown user", "keep: 0.5\nmodel: ~no-such-user/model", "model"),
    ("calibration with a zero byte", 'keep: 0.5\ncalibration: "a\\0b.txt"', "a"),
    ("calibration far too long", f"keep: 0.5\ncalibration: {'a' * 5000}.txt", "aaa"),
    ("overrides a list", "keep: 0.5\noverrides: [a]", "--override"),
    ("override of two", "keep: 0.5\noverrides: {q_proj: {rank: 3, dense: true}}", "exactly one of"),
    ("override of none", "keep: 0.5\noverrides: {q_proj: {}}", "exactly one of"),
    ("override of an unknown kind", "keep: 0.5\noverrides: {q_proj: {rang: 3}}", "rang"),
    ("override of a huge rank", "keep: 0.5\noverrides: {q_proj: {rank: 1000000000000}}", "rank"),
    ("override that matches nothing", "keep: 0.5\noverrides: {'[': {dense: true}}", "["),
):  # fmt: skip
    case(f"recipe: {name}", *says, command="recipe")(recipe_of(text))

for setting, values in {
    "keep": ("-0.1", "0", "1.5", ".nan", ".inf", "-.inf", "[0.5]", "{a: 1}", "'half'", "1e300"),
    "budget": ("'-5M'", "lots", "0%", "900%", "[1]", "12", "'1e99'", "9999999999999999999999999999%", "'٣M'"),
    "tokens": ("0", "-5", "1.5", "many", ".inf", ".nan", "[]"),
    "window": ("1", "-5", "1e9", "999999999999999", ".nan"),
    "batch_size": ("0", "a"),
    "damping": ("-1", ".nan", "2"),
    "seed": ("-1", "1.5"),
    "rank_multiple": ("0",),
    "min_rank": ("0", "-3"),
    "eval_windows": ("-1",),
    "dtype": ("int8", "7"),
    "device": ("7",),
    "form": ("diagonal",),
    "objective": ("7",),
    "allocate": ("[global]",),
    "include": ("q_proj",),
    "exclude": ("{a: 1}",),
    "calibration": ("7", "[7]", "{a: 1}", "~"),
    "overrides": tuple(
        f"{{q_proj: {v}}}"
        for v in ("{rank: -1}", "{rank: 0}", "{rank: a}", "{keep: 2}", "{keep: .nan}", "7", "~", "[1]")
    ),
}.items():
    for value in values:
        size = "" if setting in ("keep", "budget") else "keep: 0.5\n"
        word = {"budget": "budget", "overrides": "--override q_proj"}.get(setting, "--" + setting.replace("_", "-"))
        case(f"recipe: {setting} {value}", word, command="recipe")(recipe_of(f"{size}{setting}: {value}"))

PLAN_FIELDS: dict[str, tuple[Any, ...]] = {
    "rank": (-1, 0, 10**12, "3", 3.5, [3]),
    "form": ("diagonal", 5),
    "out_features": (-1, 0, "x", None, 1e300),
    "numbers_before": (0, -5, "x"),
    "numbers_after": (-5, None),
    "predicted_loss": ("much", [1], -1.0),
    "name": (None, 5),
    "evil": (1,),
}


def plan_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        plan = json.loads((root / "plan.json").read_text())
        change(plan)
        (root / "plan.json").write_text(json.dumps(plan))

    return spoil


for field, values in PLAN_FIELDS.items():
    for value in values:
        case(f"plan: {field} {value}", "plan.json", field, command="plan")(
            plan_of(lambda plan, field=field, value=value: plan["entries"][0].update({field: value}))
        )
for name, change in {
    "unknown version": lambda plan: plan.update(version=99),
    "a version in words": lambda plan: plan.update(version="one"),
    "no entries": lambda plan: plan.pop("entries"),
    "entries that are no list": lambda plan: plan.update(entries={}),
    "an entry that is null": lambda plan: plan["entries"].append(None),
    "no width": lambda plan: plan.update(element_bytes=0),
    "a negative width": lambda plan: plan.update(element_bytes=-4),
    "a dense shape below zero": lambda plan: plan["dense"][0].update(shape=[-3]),
    "dense numbers below zero": lambda plan: plan["dense"][0].update(numbers=-3),
    "notes that are no list": lambda plan: plan.update(notes="none"),
    "an unknown field": lambda plan: plan.update(evil=1),
    "NaN": lambda plan: plan["entries"][0].update(total_loss=float("nan")),
    "infinity": lambda plan: plan["entries"][0].update(total_loss=float("inf")),
}.items():
    case(f"plan: {name}", "plan.json", command="plan")(plan_of(change))
for name, text in {
    "empty": "",
    "cut": '{"version": 1, "model": "tin',
    "a list": "[]",
    "null": "null",
    "words": "plan",
    "no UTF-8": b"\xff\xfe{}",
    "zeros": b"\0" * 99,
    "nested deeply": "[" * 100_000,
    "an endless number": '{"version": ' + "9" * 5000 + "}",
}.items():

    @case(f"plan: {name}", "plan.json", command="plan")
    def _(root: Path, text: str | bytes = text) -> None:
        (root / "plan.json").write_bytes(text.encode() if isinstance(text, str) else text)


@case("plan: a folder", "plan.json", command="plan")
def _(root: Path) -> None:
    (root / "plan.json").unlink()
    (root / "plan.json").mkdir()


@case("plan: missing", "plan.json", command="plan")
def _(root: Path) -> None:
    (root / "plan.json").unlink()


# --- Texts and tokenizers


def words_of(content: bytes, file: str = "texts.txt") -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / file).write_bytes(content)

    return spoil


for name, content in {
    "empty": b"",
    "blank": b" \n\t\n " * 99,
    "too short": b"short",
    "no UTF-8": TEXT.encode() + b"\xff",
    "Latin-1": "é".encode("latin-1") * 99,
    "UTF-16": TEXT.encode("utf-16"),
    "half a character at the end": TEXT.encode() + "é".encode()[:1],
    "half a pair": TEXT.encode() + b"\xed\xa0\x80",
    "random": hashlib.shake_128(b"noise").digest(4096),
    "an executable": b"\x7fELF\x02\x01\x01" + b"\xfe\xdc" * 999,
}.items():
    case(f"texts: {name}", "texts.txt")(words_of(content))


@case("texts: a folder", "texts.txt")
def _(root: Path) -> None:
    (root / "texts.txt").unlink()
    (root / "texts.txt").mkdir()


@case("texts: missing", "texts.txt")
def _(root: Path) -> None:
    (root / "texts.txt").unlink()


@case("texts: a link to nothing", "texts.txt")
def _(root: Path) -> None:
    (root / "texts.txt").unlink()
    (root / "texts.txt").symlink_to("nothing.txt")


for name, content in {
    "no JSON": b"not json",
    "cut": b'{"text": "fine"}\n{"text": "cu',
    "a list": b"[1, 2]",
    "a number": b"7",
    "words": b'"words"',
    "null": b"null",
    "no text": b'{"other": "x"}',
    "text a number": b'{"text": 7}',
    "text null": b'{"text": null}',
    "messages words": b'{"messages": "hello"}',
    "messages empty": b'{"messages": []}',
    "messages of numbers": b'{"messages": [1, 2]}',
    "prompt without an answer": b'{"prompt": "hello"}',
    "empty": b"",
    "blank lines": b"\n\n\n",
    "nested deeply": b"[" * 200_000,
    "an endless number": b'{"text": ' + b"1" * 5000 + b"}",
    "half a pair": b'{"text": "\\ud800 ' + b"words " * 99 + b'"}',
    "no UTF-8": b'{"text": "\xff"}',
    "one JSON on many lines": b'[\n{"text": "a"}\n]',
    "a huge line": b'{"text": 7, "pad": "' + b"x" * 5_000_000 + b'"}',
}.items():
    case(f"rows: {name}", "rows.jsonl", command="rows")(words_of(content, "rows.jsonl"))
for name, text in {
    "empty": "",
    "cut": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": ',
    "a list": "[]",
    "null": "null",
    "of no model": '{"version": "1.0"}',
    "of an unknown model": '{"version": "1.0", "model": {"type": "Evil"}}',
    "no UTF-8": b"\xff\xfe" * 9,
    "nested deeply": "[" * 100_000,
}.items():
    case(f"tokenizer.json {name}", "tokenizer")(text_of(text, "tokenizer.json"))
for name, text in {"empty": "", "cut": '{"tokenizer_class": ', "a list": "[]", "null": "null"}.items():
    case(f"tokenizer_config.json {name}", "tokenizer")(text_of(text, "tokenizer_config.json"))


@case("tokenizer.json: ids beyond the vocabulary", "tokenizer")
def _(root: Path) -> None:
    path = root / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: i + 1000 if i < 256 else i for word, i in vocabulary.items()}
    path.write_text(json.dumps(tokenizer))


@case("no tokenizer", "tokenizer")
def _(root: Path) -> None:
    for path in (root / "model").glob("tokenizer*"):
        path.unlink()


@case("the tokenizer asks to run code", "tokenizer")
def _(root: Path) -> None:
    (root / "model" / "evil.py").write_text(EVIL)
    (root / "model" / "tokenizer.json").unlink()
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(config))


# --- The tests


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound checkpoints, and a sound plan, of which each corruption gets a copy."""
    folder = tmp_path_factory.mktemp("bases")
    for name, size in (("dense", "5GB"), ("shards", "20KB"), ("factored", "5GB")):
        model = make_model()
        if name == "factored":
            model = twofold.factorize(
                model, make_tokenizer(), keep=0.6, allocate="uniform", texts=[TEXT], tokens=64, window=32, quiet=True
            )
            model.twofold_plan.save(folder / "plan.json")
        model.save_pretrained(folder / name, max_shard_size=size)
        make_tokenizer().save_pretrained(folder / name)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def spoiled(tmp_path: Path, bases: dict[str, Path]) -> Callable[[Case], Path]:
    def make(one: Case) -> Path:
        root = tmp_path / "work"
        root.mkdir()
        (root / "texts.txt").write_text(TEXT, encoding="utf-8")
        shutil.copy(bases["plan"], root / "plan.json")
        if one.command != "plan":
            shutil.copytree(bases[one.base], root / "model")
        one.spoil(root)
        return root

    return make


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if "cache" not in path.parts)


def arguments(one: Case, root: Path) -> list[str]:
    model, quick = str(root / "model"), ["--tokens", "96", "--window", "32", "--keep", "0.5", "--quiet"]
    out = ["--out", str(root / "out")]
    recipe = root / "recipe.yaml"
    named = [] if recipe.exists() and b"model:" in recipe.read_bytes() else [model]
    return {
        "compress": ["compress", model, "--calibration", str(root / "texts.txt"), *quick, *out],
        "rows": ["compress", model, "--calibration", str(root / "rows.jsonl"), *quick, *out],
        "gguf": ["compress", f"{model}/model.gguf", "--calibration", str(root / "texts.txt"), *quick, *out],
        "eval": ["eval", model, "--text", str(root / "texts.txt"), "--window", "32", "--quiet"],
        "recipe": ["compress", *named, "--recipe", str(root / "recipe.yaml"), "--quiet", *out],
    }[one.command]


@pytest.mark.long
def test_the_table_is_long_and_its_corruptions_are_distinct(bases, tmp_path):
    """Counted by what they leave on the disk, not by their names."""
    assert len({one.name for one in CASES}) == len(CASES)
    found = set()
    for i, one in enumerate(CASES):
        root = tmp_path / str(i)
        root.mkdir()
        (root / "texts.txt").write_text(TEXT, encoding="utf-8")
        shutil.copy(bases["plan"], root / "plan.json")
        shutil.copytree(bases[one.base], root / "model")
        one.spoil(root)
        digest = hashlib.sha256()
        for path in sorted(root.rglob("*")):
            digest.update(str(path.relative_to(root)).encode())
            linked_to = str(path.readlink()).removeprefix(str(root)).encode() if path.is_symlink() else b""
            digest.update(linked_to or (path.read_bytes() if path.is_file() else b""))
        found.add(digest.digest())
        shutil.rmtree(root)
    assert len(found) >= 550


@pytest.mark.long
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name.replace("\0", "0")[:70])
def test_corrupted_input_ends_in_one_sentence(one, spoiled, tmp_path, capsys, monkeypatch):
    root = spoiled(one)
    monkeypatch.chdir(root)
    before = everything(tmp_path)
    if one.command == "plan":
        with pytest.raises(twofold.TwofoldError) as refused:
            Plan.load(root / "plan.json")
        sentence = str(refused.value)
    else:
        monkeypatch.setattr(sys, "argv", ["twofold", *arguments(one, root)])
        with pytest.raises(SystemExit) as stopped:
            twofold.cli.main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2, captured.err
        assert captured.out == ""
        assert captured.err.startswith("twofold: ") and captured.err.endswith("\n")
        sentence = captured.err.removeprefix("twofold: ")[:-1]
    assert sentence.isprintable(), "one line, and nothing that a terminal obeys"
    assert len(sentence) < 1500
    assert "failure of ours" not in sentence and "Traceback" not in sentence
    for part in one.says:
        assert part in sentence
    assert everything(tmp_path) == before, "nothing is left half-written, and no foreign code was run"


# --- What looks odd and does no harm: it is taken, and gives the same model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("dense", tensors_of(lambda t: t.update({"model.made_up": torch.ones(3), "__class__": torch.ones(1)}))),
        ("dense", tensors_of(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))),
        ("dense", config_of(made_up={"a": [1]}, transformers_version="99.0")),
        ("dense", config_of(model_type="gpt2")),  # the class that is named counts
        ("dense", config_of(architectures=["MadeUpForCausalLM"])),  # the model type counts
        ("dense", config_of(architectures=[["LlamaForCausalLM"]])),
        ("dense", config_of(max_position_embeddings=10**12)),
        ("dense", config_of(auto_map={"AutoModelForCausalLM": "evil.EvilModel", "AutoConfig": "evil.EvilConfig"})),
        ("dense", text_of("not JSON", INDEX[:-5] + ".bak.json")),
        ("shards", index_of(lambda index: index.update(metadata={"total_size": -5}))),
    ],
)
def test_what_does_no_harm(base, change, bases, tmp_path):
    shutil.copytree(bases[base], tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(EVIL)
    change(tmp_path)
    loaded = load_model(str(tmp_path / "model"))
    assert torch.equal(logits(loaded.model), logits(make_model()))
    assert not (tmp_path / "model" / "ran").exists()


def test_a_snapshot_in_the_hub_cache_is_made_of_links(bases, tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(bases["dense"], snapshot)
    (repository / "blobs").mkdir()
    (snapshot / WEIGHTS).rename(repository / "blobs" / "123")
    (snapshot / WEIGHTS).symlink_to("../../blobs/123")
    assert torch.equal(logits(load_model(str(snapshot)).model), logits(make_model()))


@pytest.mark.long
def test_odd_texts_are_read(bases, tmp_path, capsys, monkeypatch):
    """One huge line, and every sign that a terminal obeys; no more is read than is asked for."""
    (tmp_path / "odd.txt").write_text("\ufeff\0\x1b[31m\u202e" + "word " * 4_000_000, encoding="utf-8")
    command = ["compress", bases["dense"], "--calibration", tmp_path / "odd.txt", "--tokens", "96", "--window", "32",
               "--keep", "0.5", "--out", tmp_path / "out", "--quiet", "--eval-windows", "0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["twofold", *map(str, command)])
    with pytest.raises(SystemExit) as stopped:
        twofold.cli.main()
    assert stopped.value.code in (0, None), capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (config_of(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, more than any model has"),
        (config_of(hidden_size=-32), "hidden_size must be a whole number above 0"),
        (config_of(text_config={"vocab_size": 0.5}), "vocab_size must be a whole number above 0"),
        (config_of(text_config={"inner": {"n_layer": 10**9}}), "n_layer is 1000000000"),
    ],
)
def test_inspect_refuses_impossible_sizes(change, says, bases, tmp_path):
    """No weight is read here, so nothing else could tell."""
    shutil.copytree(bases["dense"], tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    change(tmp_path)
    with pytest.raises(twofold.TwofoldError, match=says):
        inspect(str(tmp_path / "model"))


def test_inspect_of_a_broken_file_whose_dtype_must_be_read_from_it(bases, tmp_path):
    shutil.copytree(bases["dense"], tmp_path / "model")
    config_of(dtype=None)(tmp_path)
    (tmp_path / "model" / WEIGHTS).write_bytes(b"\0" * 99)
    with pytest.raises(twofold.TwofoldError, match="can't be read"):
        inspect(str(tmp_path / "model"))
