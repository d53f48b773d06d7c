"""The file of a package: a zip archive whose members are known by their checksums."""

import hashlib
import mmap
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.extras import require
from graphcache.packaging.manifest import Manifest, decode, encode

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
_ALIGNED = 64
_PADDING = 0xD935
"""The number of a zip field that only pads."""
_HEADER, _ZIP64 = 30, 20
"""Bytes of a member's header, without name and padding."""
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a zip archive raises where bits of it are wrong."""


def write(
    path: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor], files: Mapping[str, Path]
) -> None:
    """Write a package: the file is replaced whole or not at all.

    Args:
        path: of the package.
        manifest: all but the checksums.
        weights: by the names under which they are stored.
        files: the compiled code, by name.

    Raises:
        GraphCacheError: the file cannot be written.
    """
    library = require("safetensors.torch", "package", "writing a package")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    stored = temporary.with_name(f"{temporary.name}.weights")
    try:
        try:
            library.save_file(dict(weights), stored)
            with zipfile.ZipFile(temporary, "x") as archive:
                sums = {WEIGHTS: _add(archive, WEIGHTS, stored, zipfile.ZIP_STORED)}
                for name, file in files.items():
                    sums[name] = _add(archive, name, file, zipfile.ZIP_DEFLATED)
                manifest.files = sums
                archive.writestr(MANIFEST, encode(manifest))
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            stored.unlink(missing_ok=True)
    except (OSError, require("safetensors", "package", "writing a package").SafetensorError) as error:
        raise GraphCacheError(f"{path}: cannot be written: {getattr(error, 'strerror', error)}") from error


def _add(archive: zipfile.ZipFile, name: str, file: Path, compression: int) -> str:
    """Add a file and return its checksum; what is stored as it is begins where tensors may begin."""
    info = zipfile.ZipInfo(name)
    info.compress_type = compression
    info.external_attr = 0o600 << 16
    begins = archive.start_dir + _HEADER + _ZIP64 + len(name) + 4
    info.extra = struct.pack("<HH", _PADDING, -begins % _ALIGNED) + bytes(-begins % _ALIGNED)
    digest = hashlib.sha256()
    with open(file, "rb") as source, archive.open(info, "w", force_zip64=True) as target:
        while part := source.read(2**20):
            digest.update(part)
            target.write(part)
    return digest.hexdigest()


class Archive:
    """A package opened to be read; what is changed in it is refused when it is read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                # what is written to the tensors is this process's own
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._zip = zipfile.ZipFile(self.path)
            data = self._zip.read(MANIFEST)
        except _UNREADABLE as error:
            raise GraphCacheError(f"{self.path}: cannot be read as a package: {error}") from error
        self.manifest = decode(data, str(self.path))

    def read(self, name: str) -> bytes:
        """A member whose checksum is right."""
        try:
            data = self._zip.read(name)
        except _UNREADABLE as error:
            raise self._changed(name) from error
        self._verify(name, data)
        return data

    def weights(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """The stored tensors of these names, on the file's own memory."""
        try:
            place = self._zip.getinfo(WEIGHTS).header_offset
        except KeyError as error:
            raise self._changed(WEIGHTS) from error
        name, extra = struct.unpack_from("<HH", self._memory, place + 26)
        begins, size = place + _HEADER + name + extra, self._zip.getinfo(WEIGHTS).file_size
        whole = memoryview(self._memory)[begins : begins + size]
        self._verify(WEIGHTS, whole)
        (length,) = struct.unpack_from("<Q", whole)
        entries = msgspec.json.decode(whole[8 : 8 + length])
        begins += 8 + length
        return {name: self._tensor(entries[name], dtype, begins) for name, dtype in dtypes.items()}

    def _tensor(self, entry: Mapping[str, Any], dtype: torch.dtype, begins: int) -> torch.Tensor:
        first, last = entry["data_offsets"]
        if first == last:
            return torch.empty(entry["shape"], dtype=dtype)
        count, offset = (last - first) // dtype.itemsize, begins + first
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(entry["shape"])

    def _verify(self, name: str, data: Any) -> None:
        if hashlib.sha256(data).hexdigest() != self.manifest.files.get(name):
            raise self._changed(name)

    def _changed(self, name: str) -> GraphCacheError:
        return GraphCacheError(
            f"{self.path}: {name} is not what was packaged: the file was changed or cut off; copy it again, "
            "or package the model again"
        )
