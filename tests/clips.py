"""Clips and images made on the fly, and folders of them."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RATE = 16_000


def tone(samples: int = 800, hertz: float = 440.0, rate: int = RATE) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a tone with a little noise, in multiples of 2⁻¹⁵, so that 16 bits hold it as it is."""
    noise = np.random.default_rng(0).normal(0, 0.01, samples)
    sound = 0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate) + noise
    return (np.round(sound * 2**15) / 2**15).astype(np.float32)


def wave_bytes(sound: np.ndarray[Any, Any] | None = None, *, rate: int = RATE, width: int = 2) -> bytes:
    """Return a .wav file of whole numbers; (samples,) or (samples, channels)."""
    sound = tone() if sound is None else sound
    whole = np.round(sound.astype(np.float64) * 2 ** (8 * width - 1))
    raw = (
        (whole + 128).astype(np.uint8)
        if width == 1
        else whole.astype("<i4")[..., None].view(np.uint8).reshape(*whole.shape, 4)[..., :width]
    )
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw.tobytes())
    return file.getvalue()


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Return a picture of large dots."""
    dots = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return Image.fromarray(dots.repeat(4, 0).repeat(4, 1)[:height, :width])


def image_bytes(kind: str = "PNG", image: Image.Image | None = None, **how: Any) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    (image or picture()).save(file, kind, **how)
    return file.getvalue()


def put(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files into a folder."""
    for name, held in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held.encode() if isinstance(held, str) else held)
    return folder


def lines(rows: Iterable[Any]) -> str:
    """Return rows as a file of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)
