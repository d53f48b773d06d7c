"""Small pictures as PNG and as data URIs."""

import base64
import struct
import zlib

import numpy as np

from graphcache.ir.errors import GraphCacheError


def encode(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 (height, width, 3)."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.tobytes() for line in pixels.astype(np.uint8))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def measure(data: bytes, name: str) -> tuple[str, int, int]:
    """A picture's media type, width and height.

    Raises:
        GraphCacheError: it is neither PNG nor GIF.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return "image/png", width, height
    if data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
        return "image/gif", width, height
    raise GraphCacheError(f"picture {name}: neither PNG nor GIF; give the bytes of a whole .png or .gif file")


def uri(data: bytes, kind: str = "image/png") -> str:
    """The bytes as an address that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
