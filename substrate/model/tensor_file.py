"""safetensors files as byte ranges: headers read and checked without torch, tensors written without being held.

A file is eight bytes of header length, a JSON header (name to dtype, shape and byte range) and the bytes of the tensors
one after another (https://github.com/huggingface/safetensors, "Format"). Converting a checkpoint only moves rows, so it
copies byte ranges: memory is one buffer, whatever the size of the model, and no bit can change.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_evolve.launch.rundir import publish
from megatron_evolve.substrate.manifest import SourceFile

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # what a checkpoint of this model may hold
HEADER_LIMIT = 100_000_000  # the format's own; 49,000 tensors of the largest model take 6 MB
BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor within a file: `start` and `stop` count from the file's first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def rows(self, first: int, last: int) -> "Range":
        """Rows [first, last) of the first axis."""
        row = (self.stop - self.start) // self.shape[0]
        return Range(self.path, self.start + first * row, self.start + last * row)


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int

    def read(self) -> Iterator[bytes]:
        """The bytes, a buffer at a time. Raises ValueError if the file became shorter."""
        with open(self.path, "rb", buffering=0) as file:
            at = self.start
            while at < self.stop:
                data = os.pread(file.fileno(), min(BUFFER_BYTES, self.stop - at), at)
                if not data:
                    raise ValueError(f"{self.path} became shorter while it was read: copy it again")
                at += len(data)
                yield data


@dataclass(frozen=True)
class Outgoing:
    """A tensor about to be written. `chunks` gives its bytes when they are asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises ValueError in one sentence for a missing, truncated or foreign file, or a
    dtype that is not float."""
    if not path.is_file():
        raise ValueError(f"expected the weights file {path}; it is missing: download or copy it again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise _damaged(path, f"a header that is not one ({type(error).__name__})") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start != end:
            raise _damaged(path, f"tensors that do not follow one another at byte {end}")
        end = entry.stop
    if end != size:
        raise _damaged(path, f"{size} bytes where its header names {end}")
    return entries


def _entry(path: Path, name: str, fields: dict[str, Any], base: int) -> Entry:
    dtype, shape, offsets = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(
            f"{path}: expected tensors of dtype {', '.join(ITEM_BYTES)}; {name} has {dtype}: give the unquantised "
            "checkpoint"
        )
    if len(offsets) != 2 or not all(type(number) is int for number in (*shape, *offsets)):
        raise _damaged(path, f"{name} of shape {fields['shape']} at {offsets}")
    start, stop = offsets
    if stop - start != ITEM_BYTES[dtype] * math.prod(shape):
        raise _damaged(path, f"{stop - start} bytes for {name} of shape {shape}")
    return Entry(path, dtype, shape, base + start, base + stop)


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"{path} must be a whole safetensors file; got {found}: copy or write it again")


def write_tensors(path: Path, tensors: Sequence[Outgoing], *, marked: bool = True) -> SourceFile:
    """Write one file whole or not at all; gives its size and digest, taken while writing.

    Wider items stand first, so that every tensor is aligned to its own. `marked` says in the header that the file is
    PyTorch's, as the hub's files do. Raises OSError as the file system does.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if marked else {}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.tmp")  # one name: what a killed attempt left is written over
    digest = sha256()
    try:
        with open(partial, "wb") as file:
            for data in _stream(text, ordered):
                digest.update(data)
                file.write(data)
            written = file.tell()
        if written != 8 + len(text) + end:
            raise ValueError(f"{path} came out with {written} bytes, its header names {8 + len(text) + end}")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return SourceFile(sha256=digest.hexdigest(), bytes=written)


def _stream(text: bytes, tensors: Sequence[Outgoing]) -> Iterator[bytes]:
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors:
        yield from tensor.chunks()


def write_shards(
    folder: Path, stem: str, tensors: Iterable[Outgoing], limit_bytes: int
) -> dict[str, tuple[SourceFile, list[Outgoing]]]:
    """Write `tensors` in their order into files of at most `limit_bytes` of tensors each (one tensor may be larger).

    One file is `stem.safetensors`, several are `stem-00001-of-00002.safetensors`, as the hub names them.
    """
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > limit_bytes:
            shards.append([])
        shards[-1].append(tensor)
    many = len(shards) > 1
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}" if many else stem for n in range(1, len(shards) + 1)]
    return {
        f"{name}.safetensors": (write_tensors(folder / f"{name}.safetensors", shard), shard)
        for name, shard in zip(names, shards, strict=True)
    }
