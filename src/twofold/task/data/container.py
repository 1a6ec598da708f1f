"""Whether a file of audio is whole, by its container: decoders read what is left of one that was cut, and say nothing."""

from __future__ import annotations

import struct

UNTOLD = (0, 2**32 - 1)  # sizes that a writer leaves that can't go back to its beginning
XING = 4096  # bytes behind the tags, in which an MP3 file has its own table of contents, if any


def missing_bytes(data: bytes) -> str:
    """Say what is missing at the end of a .wav, .aiff, .au, .ogg or .mp3 file; empty if nothing is, or that can't be told."""
    kind = data[:4]
    try:
        if kind in (b"RIFF", b"RF64", b"FORM"):
            return _of_chunks(data, "<" if kind != b"FORM" else ">")
        if kind == b".snd":
            begin, size = struct.unpack_from(">II", data, 4)
            return _fewer(len(data), begin + (size if size not in UNTOLD else 0))
        if kind == b"OggS":
            return _of_pages(data)
        return _of_frames(data)
    except struct.error:
        return "it ends within its header"


def _fewer(there: int, told: int) -> str:
    return f"it has {there:,} of {told:,} bytes" if there < told else ""


def _of_chunks(data: bytes, order: str) -> str:
    """Follow the chunks of RIFF and AIFF up to that of the samples."""
    place, large = 12, 0
    while True:
        name, size = struct.unpack_from(f"{order}4sI", data, place)
        if name == b"ds64":  # the sizes of RF64, in 64 bits
            large = struct.unpack_from("<8xQ", data, place + 8)[0]
        if name in (b"data", b"SSND"):
            size = large if size == UNTOLD[1] and large else size
            return _fewer(len(data), place + 8 + (size if size not in UNTOLD else 0))
        place += 8 + size + size % 2


def _of_pages(data: bytes) -> str:
    """Look at the last page of an Ogg stream: it must be whole, and marked as the last."""
    last = data.rfind(b"OggS")
    flags, segments = struct.unpack_from("<5xB20xB", data, last)
    end = last + 27 + segments + sum(data[last + 27 : last + 27 + segments])
    return _fewer(len(data), end) or ("" if flags & 4 else "its last page is missing")


def _of_frames(data: bytes) -> str:
    """Compare an MP3 file with the size that its first frame tells, if it does."""
    begin = 0
    if data[:3] == b"ID3" and len(data) >= 10:  # tags, with a size of seven bits a byte
        begin = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    frame = data[begin : begin + XING]
    if frame[:1] != b"\xff":
        return ""
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return ""
    (flags,) = struct.unpack_from(">I", frame, place + 4)
    if not flags & 2:
        return ""
    (size,) = struct.unpack_from(">I", frame, place + 8 + (4 if flags & 1 else 0))
    return _fewer(len(data), begin + size)
