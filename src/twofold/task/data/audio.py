"""A clip of audio: read, made mono, resampled, and refused where it is damaged or holds nothing."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from twofold.errors import TwofoldError
from twofold.task.data.container import missing_bytes
from twofold.task.data.files import encoded
from twofold.task.text.row import BadRowError

EXTRA = "pip install 'twofold[speech]'"
RATES = range(1_000, 1_000_001)  # hertz that a clip may have
WIDEST = 64  # channels of an array
Sound: TypeAlias = "npt.NDArray[np.float32]"


def load_audio(value: Any, rate: int) -> Sound:  # (samples,)
    """Return a clip as mono float32 in [−1, 1] at a sample rate, the mean of its channels.

    Args:
        value: a path, the bytes of a file, {"bytes", "path"} or {"array", "sampling_rate"} as ``datasets`` gives them, or
            an array that is at the rate already; (samples,), (samples, channels) or (channels, samples).
        rate: samples a second.

    Raises:
        BadRowError: if it is no audio, damaged, cut short, empty or silent, holds NaN, or has no sample rate.
        TwofoldError: if a package that it needs is not installed.
    """
    data = encoded(value)
    sound, own = _of_array(value, rate) if data is None else _decoded(data, rate)
    if own not in RATES:
        raise BadRowError(f"its sample rate is {own} Hz; give it the rate that it was recorded at")
    if not sound.size:
        raise BadRowError("the clip is empty")
    if not np.isfinite(sound).all():
        raise BadRowError("the clip holds NaN or infinite samples")
    sound = sound.mean(axis=1, dtype=np.float32) if sound.ndim == 2 else sound
    if not sound.any():
        raise BadRowError("the clip is silent: all its samples are zero")
    sound = sound if own == rate else _resampled(sound, own, rate)
    if not sound.size:
        raise BadRowError(f"the clip is too short to be resampled from {own} to {rate} Hz")
    return np.ascontiguousarray(sound, dtype=np.float32)


def _decoded(data: bytes, rate: int) -> tuple[Sound, int]:  # (samples, channels)
    """Decode a file.

    Args:
        rate: that is asked for, for a sentence about what must be installed.
    """
    missing = missing_bytes(data)
    if missing:
        raise BadRowError(f"the file is cut short: {missing}")
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without libsndfile
        plain = _plain_wave(data)
        if plain is None:
            raise TwofoldError(
                f"to read audio other than plain .wav files, install the package soundfile: {EXTRA}"
            ) from error
        return plain
    try:
        with soundfile.SoundFile(_Seekable(data)) as file:
            told, own = file.frames, file.samplerate
            sound = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        why = getattr(error, "error_string", "") or str(error) or type(error).__name__
        raise BadRowError(f"it is no audio that can be read ({why.strip().rstrip('.')})") from error
    if len(sound) < told:
        raise BadRowError(f"the file is cut short or damaged: {len(sound)} of its {told} samples can be read")
    return sound, own


class _Seekable(io.BytesIO):
    """Bytes that decoders may seek in before their beginning, which a callback of theirs could only tell on the screen."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return super().seek(0)


def _plain_wave(data: bytes) -> tuple[Sound, int] | None:
    """Decode a .wav file of whole numbers by the standard library; None if it is another."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError, RuntimeError, ValueError):
        return None
    if width not in (1, 2, 3, 4) or not channels:
        return None
    parts = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, channels, width)
    whole = np.zeros((*parts.shape[:2], 4), np.uint8)
    whole[..., 4 - width :] = parts if width > 1 else parts ^ 128  # the only width without a sign
    sound: Sound = whole.view("<i4")[..., 0].astype(np.float32) / np.float32(2**31)
    return sound, own


def _of_array(value: Any, rate: int) -> tuple[Sound, int]:  # (samples,) or (samples, channels)
    """Return the numbers of an array, and their rate."""
    own: Any = rate
    try:
        if isinstance(value, Mapping) or hasattr(value, "get_all_samples"):  # the second is a decoder of ``datasets``
            value, own = value["array"], value["sampling_rate"]
        array = np.asarray(value)
        own = int(own)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadRowError(
            'its audio is neither a path, nor the bytes of a file, nor an "array" with its "sampling_rate"'
        ) from error
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
        raise BadRowError(f"its audio is an array of {array.dtype} {array.shape}, not of samples (samples, channels)")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    if array.ndim == 2 and array.shape[1] > WIDEST:
        raise BadRowError(f"its audio has {array.shape[1]} channels; give one or a few")
    if array.dtype.kind != "f":
        span = np.iinfo(array.dtype)
        middle = 0 if span.min else span.max // 2 + 1
        array = (array.astype(np.float64) - middle) / (span.max - middle + 1)
    with np.errstate(over="ignore"):
        return array.astype(np.float32), own


def _resampled(sound: Sound, own: int, rate: int) -> Sound:
    try:
        import soxr
    except ImportError as error:
        raise TwofoldError(
            f"a clip of {own} Hz must be resampled to the {rate} Hz of the model; install the package soxr: {EXTRA}"
        ) from error
    resampled: Sound = soxr.resample(sound, own, rate)
    return resampled
