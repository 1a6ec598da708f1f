"""Exported graphs, in the runtime that they are for. A model that is no export is exported for the time of the bench."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig

from twofold.errors import TwofoldError
from twofold.exports.export import Exported
from twofold.exports.formats import FORMATS, Format
from twofold.exports.graph import need_exporters
from twofold.exports.layers import check_plain
from twofold.host.faults import errors_in_words
from twofold.host.folders import EXPORTED
from twofold.host.progress import say
from twofold.host.quiet import first_line
from twofold.model.load import load_skeleton, window_limit
from twofold.model.source import choose_device
from twofold.model.work import TokenWork
from twofold.speed.exports import export_all
from twofold.speed.runtimes import Runtime, Settings, State, greedy
from twofold.task.causal_lm import writes_text


@dataclass(frozen=True)
class Opened:
    """A graph that its runtime has read."""

    folder: Path
    decoder: Any


@dataclass
class GraphState:
    """Sequences; what was read of them is kept by the decoder, which keeps one batch at a time."""

    token: Tensor  # (batch, 1)


class GraphSession:
    """An exported graph.

    Raises:
        TwofoldError: if it does not read any number of sequences and tokens, or has no readable config.json.
    """

    def __init__(self, opened: Opened, runtime: str, settings: Settings) -> None:
        self._decoder, self._runtime = opened.decoder, runtime
        record = _record(opened.folder)
        self.name = f"the graph of {record.model}" if record is not None else f"the graph in {opened.folder}"
        if any(size is not None for size in self._decoder.sizes):
            sequences, tokens = ("any number of" if size is None else size for size in self._decoder.sizes)
            raise TwofoldError(
                f"{self.name} reads {sequences} sequences of {tokens} tokens at once and nothing else, so it can't be timed; "
                f"export the model with twofold export --to {runtime}, whose graphs read any number"
            )
        try:
            config: Any = AutoConfig.from_pretrained(opened.folder, trust_remote_code=settings.trust_remote_code)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError
            raise TwofoldError(
                f"{opened.folder} has no config.json that says what its graph reads ({first_line(error)}); "
                f"make it with twofold export --to {runtime}"
            ) from error
        longest = getattr(config, "max_position_embeddings", None)
        self.positions: int | None = longest if isinstance(longest, int) else None
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.dtype = "float32"
        self.work: TokenWork | None = None if record is None else record.work
        self.weight_bytes = graph_bytes(opened.folder, FORMATS.get(runtime)) if record is None else record.weight_bytes
        self.notes: list[str] = []
        if choose_device(settings.device).type != "cpu":
            self.notes.append(f"{runtime} runs on the processor, whatever the other runtimes use")
        self._state: GraphState | None = None

    def begin(self, ids: Tensor, room: int) -> GraphState:
        self._decoder.start()
        self._state = GraphState(self._read(ids))
        return self._state

    def step(self, state: State) -> None:
        if state is not self._state:
            raise RuntimeError("a graph keeps one batch of sequences, and this is an earlier one")
        state.token = self._read(state.token)

    def _read(self, ids: Tensor) -> Tensor:  # (batch, 1)
        with errors_in_words(lambda error: f"{self.name} can't be run in {self._runtime}: {first_line(error)}"):
            return greedy(self._decoder.read(ids))


class Graphs(Runtime):
    """A runtime of exported graphs, on the processor and in float32."""

    extra: ClassVar[str] = "export"

    def why_not(self, model: str, settings: Settings) -> str | None:
        folder = Path(model).expanduser()
        if self._is_export(model) or model.endswith(".gguf"):  # loaded whole; the export refuses what it can't take
            return None
        others = [other.name for other in FORMATS.all() if other.graph and (folder / other.graph).is_file()]
        if others and not any(folder.glob("*.safetensors")):
            return f"a folder exported to {others[0]}"
        skeleton = load_skeleton(model, trust_remote_code=settings.trust_remote_code).model
        if not writes_text(skeleton):
            return f"it does not write text token by token, and {self.name} runs exports of models that do"
        try:
            check_plain(skeleton, model)
        except TwofoldError:
            return f"its factors are quantized, and {self.name} runs exports, which hold numbers; it takes one without `bits`"
        return None

    def check(self, models: list[str], settings: Settings) -> None:
        for flag, able in (("dtype", "float32"), ("device", "cpu")):
            given = getattr(settings, flag)
            if given not in ("auto", able):
                raise TwofoldError(
                    f"the runtime {self.name} runs in float32 on the processor, got `{flag}={given}`; leave `{flag}` out, or "
                    f"{self.name} out of `runtime`"
                )
        if not all(self._is_export(model) for model in models):
            self.format.check()
            need_exporters(self.name)

    def context(self, model: str, settings: Settings) -> int | None:
        if self._is_export(model) or model.endswith(".gguf"):
            return None
        return window_limit(load_skeleton(model, trust_remote_code=settings.trust_remote_code).model)

    def places(self, models: list[str], settings: Settings, folder: Path) -> dict[str, str]:
        wanted = [model for model in models if not self._is_export(model)]
        exports = {model: folder / str(number) for number, model in enumerate(wanted)}
        if exports:
            if not settings.quiet:
                say(
                    f"Exporting {', '.join(exports)} to {self.name} into {folder}, which is removed after the bench; it takes "
                    "longer with more layers. To keep one: twofold export"
                )
            export_all(exports, self.name, settings.trust_remote_code, settings.quiet)
        return {model: str(exports.get(model, model)) for model in models}

    def load(self, model: str, settings: Settings) -> Opened:
        folder = Path(model).expanduser()
        graph, decoder = folder / self.format.graph, self.format.decoder
        assert decoder is not None
        with errors_in_words(
            lambda error: f"{self.name} can't open {graph}: {first_line(error)}; export the model again"
        ):
            return Opened(folder, decoder(graph, torch.get_num_threads()))

    def session(self, loaded: Opened, settings: Settings) -> GraphSession:
        return GraphSession(loaded, self.name, settings)

    def disk_bytes(self, loaded: Opened) -> int | None:
        return graph_bytes(loaded.folder, self.format)

    @property
    def format(self) -> Format:
        """Return the export format that it runs."""
        return FORMATS.get(self.name)

    def _is_export(self, model: str) -> bool:
        return (Path(model).expanduser() / self.format.graph).is_file()


def graph_bytes(folder: Path, kind: Format) -> int:
    """Return the bytes of a graph and of the files beside it that hold its weights."""
    stem = Path(kind.graph).stem  # model.onnx and model.onnx.data; openvino_model.xml and .bin
    return sum(path.stat().st_size for path in folder.glob(f"{stem}.*") if path.name.endswith(kind.weights))


def _record(folder: Path) -> Exported | None:
    """Return what twofold export says of a folder, if it wrote it."""
    with suppress(OSError, ValueError):
        return Exported.model_validate_json((folder / EXPORTED).read_text(encoding="utf-8"))
    return None
