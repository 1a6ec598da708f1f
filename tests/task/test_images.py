"""Images are read whole, upright and in RGB, or refused in words."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clips import image_bytes, picture, put
from twofold.errors import TwofoldError
from twofold.task.data import images
from twofold.task.data.images import load_image
from twofold.task.text.row import BadRowError

FORMATS = {
    "png": ("PNG", {}), "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "webp": ("WEBP", {}),
    "gif": ("GIF", {}), "bmp": ("BMP", {}), "tiff": ("TIFF", {}), "ppm": ("PPM", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_form_of_an_image_is_the_same_image(kind, tmp_path):
    name, how = FORMATS[kind]
    data = image_bytes(name, **how)
    path = put(tmp_path, {"a.bin": data}) / "a.bin"
    read = np.asarray(load_image(path))
    assert read.shape == (16, 24, 3) and read.dtype == np.uint8
    for value in (
        str(path),
        data,
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": str(path)},
        Image.open(path),
        read,
    ):
        picture_read = load_image(value)
        assert picture_read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture_read), read)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_an_image_that_is_cut_is_refused_or_whole(kind, share):
    name, how = FORMATS[kind]
    data = image_bytes(name, **how)
    try:
        read = load_image(data[: int(share * len(data))])
    except BadRowError:
        return
    np.testing.assert_array_equal(np.asarray(read), np.asarray(load_image(data)))


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_an_image_with_other_bytes_is_read_or_refused(kind, data):
    held = bytearray(image_bytes(FORMATS[kind][0], **FORMATS[kind][1]))
    for _ in range(3):
        held[data.draw(st.integers(0, min(len(held) - 1, 200)))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(held)).mode == "RGB"
    except BadRowError as error:
        assert len(str(error).splitlines()) == 1


def test_the_orientation_of_a_camera_is_applied():
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° to the right
    read = load_image(image_bytes("PNG", exif=turned))
    np.testing.assert_array_equal(np.asarray(read), np.rot90(np.asarray(picture()), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    deep = Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)
    image = deep if mode == "I;16" else picture().convert(mode)
    read = load_image(image)
    assert read.mode == "RGB" and read.size == (24, 16)
    if mode in ("L", "LA", "I;16"):
        gray = np.asarray(picture().convert("L")).astype(int)
        assert np.abs(np.asarray(read)[..., 0].astype(int) - gray).max() <= 1


def test_what_is_no_image_is_refused(monkeypatch):
    bad = {
        "the file is empty": b"", "it is no image": b"<html>", "there is no file gone.png": "gone.png",
        "no pixels": np.zeros((0, 4, 3), np.uint8), "neither a path": np.zeros((4, 4, 3)), "neither": 3,
    }  # fmt: skip
    for words, value in bad.items():
        with pytest.raises(BadRowError, match=words):
            load_image(value)
    monkeypatch.setattr(images, "PIXELS", 100)
    with pytest.raises(BadRowError, match=r"24 × 16 pixels, more than 100"):
        load_image(image_bytes())


def test_a_picture_that_unpacks_to_more_than_memory_is_not_unpacked():
    data = bytearray(image_bytes())
    data[16:24] = struct.pack(">II", 30_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(BadRowError, match=r"30000 × 20000 pixels|decompression bomb"):
        load_image(bytes(data))


def test_pillow_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(TwofoldError, match=r"pillow: pip install 'twofold\[vision\]'"):
        load_image(b"x")
