"""Headers of safetensors files: what is no whole file is told in one sentence that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve.substrate.model.tensor_file import read_header

WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return path


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": WHOLE})
    (entry,) = read_header(path).values()
    assert (entry.dtype, entry.shape, entry.stop - entry.start) == ("F32", (2,), 8)
    assert entry.stop == path.stat().st_size


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"data_offsets": [0]}, r"w of shape \[2\] at \[0\]"),
        ({"data_offsets": [0, 4, 8]}, r"w of shape \[2\] at \[0, 4, 8\]"),
        ({"data_offsets": [0, "8"]}, r"at \[0, '8'\]"),
        ({"data_offsets": [0.0, 8.0]}, r"at \[0\.0, 8\.0\]"),
        ({"data_offsets": "08"}, "at 08"),
        ({"data_offsets": None}, "a header that is not one"),
        ({"data_offsets": [4, 12]}, "tensors that do not follow one another"),
        ({"shape": 2}, "a header that is not one"),
        ({"shape": ["2"]}, r"w of shape \['2'\]"),
        ({"shape": [True, 2]}, r"w of shape \[True, 2\]"),
        ({"shape": [3]}, r"8 bytes for w of shape \(3,\)"),
        ({"dtype": []}, "a header that is not one"),
    ],
)
def test_a_damaged_entry_is_told_with_its_file(fields: dict[str, Any], found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": WHOLE | fields})
    with pytest.raises(ValueError, match=rf"x\.safetensors must be a whole safetensors file; got .*{found}") as refusal:
        read_header(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("header", [[], 5, {"w": 5}, {"w": []}])
def test_a_header_that_is_no_table_is_told(header: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a header that is not one"):
        read_header(write(tmp_path / "x.safetensors", header))
