"""One canonical form of a value, and its sha256.

Every name in the campaign that stands for content (substrate, judge, candidate, delta, policy) is a digest made here,
so two programs that agree on the value agree on its name. In: JSON-able values or files. Out: hexadecimal sha256.

A large file also has a sample: bytes at fixed places, which a process can hash at each start where all of them would
take minutes.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
# 16 MiB of a 5 GB shard are 1/300 of its time (sha256: 1.2 GB/s a core), and no hole of 340 MB fits between two.
SAMPLED_CHUNKS = 16
SAMPLED_FROM_BYTES = 4 * SAMPLED_CHUNKS * CHUNK_BYTES  # a smaller file is hashed whole: 64 MiB take 50 ms
_AS_THEY_ARE = frozenset({str, int, bool, type(None)})


def canonical(value: Any) -> bytes:
    """The one JSON spelling of `value`: sorted keys, no spaces, UTF-8, shortest floats.

    An integral float is written as its integer (`2.0` and `2` name the same setting). Raises ValueError for NaN and
    infinities, which have no JSON form and no place in a setting, and TypeError for what JSON cannot hold.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _plain(value: Any) -> Any:
    """What JSON is to spell. Most of a policy is text in mappings: it is passed on without a call of its own."""
    if isinstance(value, dict):
        return {str(key): item if type(item) in _AS_THEY_ARE else _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) in _AS_THEY_ARE else _plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a digest needs finite numbers, got {value!r}: remove the field or give it a value")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return _plain(value.model_dump(mode="json")) if hasattr(value, "model_dump") else value


def digest_of(value: Any) -> str:
    """sha256 of the canonical form, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_bytes(data: bytes) -> str:
    """sha256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path | str) -> str:
    """sha256 of a file's bytes, read in chunks. Raises OSError as the file system does."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def digest_sample(path: Path | str) -> str:
    """sha256 of SAMPLED_CHUNKS chunks of a file, evenly spaced from its first byte to its last.

    Finds another file of the same size and a copy that lacks a part; a byte changed between the chunks it does not.
    Raises OSError as the file system does.
    """
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - CHUNK_BYTES)
        for number in range(SAMPLED_CHUNKS):
            file.seek(last * number // (SAMPLED_CHUNKS - 1))
            sha.update(file.read(CHUNK_BYTES))
    return sha.hexdigest()


def short(digest: str) -> str:
    """The first eight digits, for people. Never compared by programs."""
    return digest[:8]
