"""An image: read as a whole, turned upright, in RGB, and refused where it is damaged."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line
from twofold.task.data.files import encoded
from twofold.task.text.row import BadRowError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'twofold[vision]'"
PIXELS = 2**27  # of the largest image that is read


def load_image(value: Any) -> Image:
    """Return an image in RGB, as its EXIF orientation turns it; of one that moves the first picture.

    Args:
        value: a path, the bytes of a file, {"bytes", "path"} as ``datasets`` gives it, a picture of Pillow, or an array of
            bytes (height, width), (height, width, channels).

    Raises:
        BadRowError: if it is no image, damaged, cut short, without any pixel, or too large.
        TwofoldError: if Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise TwofoldError(f"to read images, install the package pillow: {EXTRA}") from error
    data = encoded(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd tags: what matters is looked at here
            picture = _opened(value) if data is None else Image.open(io.BytesIO(data))
            width, height = picture.size
            if not width or not height:
                raise BadRowError("the image has no pixels")
            if width * height > PIXELS:
                raise BadRowError(
                    f"the image has {width} × {height} pixels, more than {PIXELS:,}; make it smaller first"
                )
            picture.load()
            return _in_range(ImageOps.exif_transpose(picture)).convert("RGB")
    except (BadRowError, MemoryError):
        raise
    except Exception as error:  # each format of Pillow fails in its own ways
        words = first_line(error)
        why = "" if "cannot identify" in words else f" ({words})"
        raise BadRowError(f"it is no image that can be read as a whole{why}") from error


def _opened(value: Any) -> Image:
    """Return a picture, or that of an array."""
    import numpy as np
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise BadRowError(
            "its image is neither a path, nor the bytes of a file, nor a picture, nor an array of bytes (height, width, 3)"
        )
    if not array.size:
        raise BadRowError("the image has no pixels")
    return Image.fromarray(array)


def _in_range(picture: Image) -> Image:
    """Return a picture of 16 bits a pixel in 8: Pillow would make all that is above 255 white."""
    return picture.point(lambda value: value / 256).convert("L") if picture.mode.startswith("I;16") else picture
