"""Clips are read alike from every form; one that is damaged, cut or empty is refused in words, and never in another way."""

from __future__ import annotations

import io
import sys
from functools import cache

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from clips import RATE, put, tone, wave_bytes
from twofold.errors import TwofoldError
from twofold.task.data.audio import load_audio
from twofold.task.data.container import missing_bytes
from twofold.task.text.row import BadRowError

FORMATS = {
    "wav": ("WAV", "PCM_16"), "float": ("WAV", "FLOAT"), "extensible": ("WAVEX", "PCM_24"), "rf64": ("RF64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III"),
}  # fmt: skip
LOSSY = ("ogg", "opus", "mp3")


@cache
def whole(kind: str) -> bytes:
    return encoded(kind)


def encoded(kind: str, sound: np.ndarray | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    name, part = FORMATS[kind]
    soundfile.write(file, tone(3000) if sound is None else sound, rate, format=name, subtype=part)
    return file.getvalue()


@pytest.fixture
def without(monkeypatch):
    def block(name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)

    return block


@pytest.mark.parametrize("kind", FORMATS)
def test_every_form_of_a_clip_is_the_same_clip(kind, tmp_path):
    data = encoded(kind)
    path = put(tmp_path, {"a.bin": data}) / "a.bin"
    read = load_audio(path, RATE)
    assert read.dtype == np.float32 and read.ndim == 1
    if kind not in LOSSY:
        np.testing.assert_array_equal(read, tone(3000))
    else:
        assert abs(len(read) - 3000) < 1500 and np.abs(read).max() > 0.2
    for value in (str(path), data, {"bytes": data, "path": "gone.wav"}, {"bytes": None, "path": str(path)},
                  read, read.tolist(), {"array": read.astype(np.float64), "sampling_rate": RATE}):  # fmt: skip
        np.testing.assert_array_equal(load_audio(value, RATE), read)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_is_refused(kind, share):
    data = whole(kind)
    with pytest.raises(BadRowError):
        load_audio(data[: int(share * len(data))], RATE)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_file_with_other_bytes_is_read_or_refused(kind, data):
    held = bytearray(whole(kind))
    for _ in range(3):
        held[data.draw(st.integers(0, min(len(held) - 1, 200)))] = data.draw(st.integers(0, 255))
    try:
        assert np.isfinite(load_audio(bytes(held), RATE)).all()
    except BadRowError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([b"", b"RIFF", b"RF64", b"FORM", b".snd", b"OggS", b"ID3", b"\xff\xfb", b"fLaC"]),
    st.binary(max_size=200),
)
def test_any_bytes_are_refused_in_words(magic, rest):
    with pytest.raises(BadRowError):
        load_audio(magic + rest, RATE)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_plain_wave_files_need_no_package(width, without):
    sound = np.stack([tone(), 0.5 * tone()], 1)
    data = wave_bytes(sound, width=width)
    expected = load_audio(data, RATE)
    without("soundfile")
    np.testing.assert_array_equal(load_audio(data, RATE), expected)
    assert np.abs(expected - sound.mean(1)).max() < 2 ** (1 - 8 * width) + 1e-6


def test_missing_packages_are_named(without):
    without("soundfile")
    with pytest.raises(TwofoldError, match=r"soundfile: pip install 'twofold\[speech\]'"):
        load_audio(encoded("flac"), RATE)
    without("soxr")
    with pytest.raises(TwofoldError, match=r"8000 Hz .* 16000 Hz .* soxr: pip install 'twofold\[speech\]'"):
        load_audio(wave_bytes(rate=8000), RATE)


@pytest.mark.parametrize("own", [8000, 11025, 44100, 48000])
def test_a_resampled_clip_is_the_same_tone(own):
    read = load_audio({"array": tone(own, rate=own), "sampling_rate": own}, RATE)
    assert len(read) == RATE
    spectrum = np.abs(np.fft.rfft(read))
    assert spectrum.argmax() == 440


def test_channels_are_averaged_whichever_side_they_stand_on():
    both = np.stack([tone(), -0.5 * tone()], 1)
    mean = both.mean(1)
    for value in (wave_bytes(both), both, both.T, both.T.astype(np.float64)):
        np.testing.assert_allclose(load_audio(value, RATE), mean, atol=2**-15)
    np.testing.assert_array_equal(load_audio((tone() * 2**15).astype(np.int16), RATE), tone())
    np.testing.assert_array_equal(load_audio((tone() * 2**15 + 2**15).astype(np.uint16), RATE), tone())


BAD = {
    "is empty": b"",
    "the clip is empty": wave_bytes(np.zeros(0, np.float32)),
    "is silent": wave_bytes(np.zeros(100, np.float32)),
    "NaN": {"array": np.array([0.1, np.nan], np.float32), "sampling_rate": RATE},
    "infinite": encoded("float", np.array([0.1, np.inf], np.float32)),
    "sample rate is 0 Hz": {"array": tone(), "sampling_rate": 0},
    "sample rate is -1 Hz": {"array": tone(), "sampling_rate": -1},
    "no audio that can be read": b"<html>not found</html>",
    "there is no file gone.wav": "gone.wav",
    "is not on this machine": "https://example.org/a.wav",
    'neither a path, nor .* "sampling_rate"': {"array": [0.1]},
    "too short to be resampled": {"array": [0.1], "sampling_rate": 48000},
    "an array of": {"array": ["a"], "sampling_rate": RATE},
    "128 channels": np.ones((256, 128), np.float32),
    r"\(1, 1, 4\)": np.ones((1, 1, 4), np.float32),
    "neither a path": {"array": [[0.1], [0.1, 0.2]], "sampling_rate": RATE},
    "can't be read: File name too long": "a" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_what_is_no_clip_is_refused(words):
    with pytest.raises(BadRowError, match=words):
        load_audio(BAD[words], RATE)


def test_a_wave_file_without_a_rate_is_refused():
    data = bytearray(wave_bytes())
    data[24:28] = bytes(4)
    with pytest.raises(BadRowError, match=r"rate|no audio"):
        load_audio(bytes(data), RATE)


def test_a_writer_that_could_not_go_back_leaves_no_size():
    for size in (b"\xff\xff\xff\xff", bytes(4)):
        data = bytearray(wave_bytes())
        data[40:44] = size
        assert missing_bytes(bytes(data)) == ""
    np.testing.assert_array_equal(load_audio(bytes(data[:40]) + b"\xff\xff\xff\xff" + bytes(data[44:]), RATE), tone())
