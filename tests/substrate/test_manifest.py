"""The frozen folder's checks: every byte at a campaign's start, and at a run's start what seconds can find."""

import functools
import json
import os
from pathlib import Path

import pytest

from megatron_evolve.substrate import digest, manifest
from megatron_evolve.substrate.digest import digest_of, digest_sample
from megatron_evolve.substrate.exchange import imported_default
from megatron_evolve.substrate.manifest import (
    Construction,
    Substrate,
    check_start,
    describe_file,
    read_manifest,
    samples_of,
    sealed,
    trainer_sources,
    verify,
    write_manifest,
)
from megatron_evolve.substrate.model.architecture import NANO_CPU
from megatron_evolve.substrate.train import run

CHUNK = 8  # bytes, in place of 1 MiB
SIZE = 100 * CHUNK + 7
SOURCES = functools.cache(trainer_sources)
WEIGHTS, SMALL = "weights.safetensors", "tokenizer.json"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of a real checkpoint, divided by 131,072."""
    monkeypatch.setattr(digest, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(manifest, "SAMPLED_FROM_BYTES", 4 * digest.SAMPLED_CHUNKS * CHUNK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / WEIGHTS).write_bytes(os.urandom(SIZE))
    (tmp_path / SMALL).write_bytes(os.urandom(3 * CHUNK))
    freeze(tmp_path)
    return tmp_path


def freeze(folder: Path, **changed: object) -> Substrate:
    """The files of `folder` as a substrate of nano's shapes."""
    files = {name: describe_file(folder / name) for name in (WEIGHTS, SMALL)}
    fields = {
        "name": "nano",
        "architecture": NANO_CPU.model_dump(mode="json"),
        "construction": Construction(families=("gravity",), difficulty="challenge", styles={}),
        "default": imported_default(NANO_CPU),
        "build": {},
        "trainer": SOURCES(),
        "files": files,
        "samples": samples_of(folder, files),
    }
    substrate = sealed(fields | changed)
    write_manifest(folder, substrate)
    return substrate


def put(path: Path, start: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


def test_a_sample_sees_its_chunks_and_any_longer_hole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(SIZE)
    path.write_bytes(content)
    whole = digest_sample(path)
    seen = []
    for at in range(SIZE):
        put(path, at, bytes([content[at] ^ 1]))
        seen.append(digest_sample(path) != whole)
        put(path, at, content[at : at + 1])
    assert sum(seen) == digest.SAMPLED_CHUNKS * CHUNK and seen[0] and seen[-1]
    assert digest_sample(path) == whole
    unseen = max(map(len, "".join(".x"[one] for one in seen).split("x")))
    assert unseen < SIZE / (digest.SAMPLED_CHUNKS - 1) - CHUNK + 1


def test_only_large_files_are_sampled_and_the_digest_covers_it(folder: Path) -> None:
    substrate = read_manifest(folder)
    assert substrate.samples == {WEIGHTS: digest_sample(folder / WEIGHTS)}
    assert check_start(folder) == verify(folder) == substrate
    document = json.loads((folder / manifest.MANIFEST).read_text())
    document["samples"][WEIGHTS] = "0" * 64
    (folder / manifest.MANIFEST).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="was changed after freezing"):
        check_start(folder)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "is missing: the substrate names it with 807 bytes"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 806 bytes"),
    "replaced": (lambda path: path.write_bytes(os.urandom(SIZE)), "was changed: expected sha256 of its sample"),
    "copied in part": (lambda path: put(path, SIZE // 2, bytes(SIZE // 15)), "was changed: expected sha256 of its"),
    "empty at its end": (lambda path: put(path, SIZE - 2, bytes(2)), "was changed: expected sha256 of its sample"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_start_finds_a_damaged_file(case: str, folder: Path) -> None:
    put(folder / WEIGHTS, SIZE - 2, b"\1\1")
    freeze(folder)
    damage, sentence = DAMAGE[case]
    damage(folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} {sentence}"):
        check_start(folder)
    assert check_start(folder, files=False) == read_manifest(folder)


def test_a_start_finds_any_byte_of_a_small_file(folder: Path) -> None:
    whole = (folder / SMALL).read_bytes()
    for at in range(len(whole)):
        put(folder / SMALL, at, bytes([whole[at] ^ 1]))
        with pytest.raises(ValueError, match=f"{SMALL} was changed: expected sha256 "):
            check_start(folder, trainer=False)
        put(folder / SMALL, at, whole[at : at + 1])


def test_a_byte_between_the_chunks_is_found_by_verify_alone(folder: Path) -> None:
    put(folder / WEIGHTS, CHUNK + 1, bytes([(folder / WEIGHTS).read_bytes()[CHUNK + 1] ^ 1]))
    assert check_start(folder) == read_manifest(folder)
    with pytest.raises(ValueError, match=f"{WEIGHTS} was changed: expected sha256 "):
        verify(folder)


def test_a_manifest_from_before_there_were_samples_keeps_its_digest(folder: Path) -> None:
    """Its large files are hashed whole."""
    old = freeze(folder, samples={})
    fields = old.model_dump(mode="json", exclude={"digest", "samples"})
    assert old.digest == digest_of(fields) != freeze(folder).digest
    (folder / manifest.MANIFEST).write_text(json.dumps(fields | {"digest": old.digest}))
    assert check_start(folder) == old
    put(folder / WEIGHTS, CHUNK + 1, bytes([(folder / WEIGHTS).read_bytes()[CHUNK + 1] ^ 1]))
    with pytest.raises(ValueError, match=f"{WEIGHTS} was changed: expected sha256 "):
        check_start(folder)


def argv_of(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    substrate = read_manifest(folder)
    candidate = {"id": "x", "substrate": substrate.digest, "settings": substrate.default.model_dump(mode="json")}
    (tmp_path / "candidate.json").write_text(json.dumps(candidate))
    paths = ["--substrate", str(folder), "--candidate", str(tmp_path / "candidate.json")]
    return [*paths, "--out", str(tmp_path / "out"), "--seed", "1", *more]


def test_a_refused_layout_costs_no_hash(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / WEIGHTS).unlink()
    assert run.main(argv_of(folder, tmp_path, "--layout", "tp=2")) == 1
    assert "tp=2" in capsys.readouterr().err
    assert run.main(argv_of(folder, tmp_path)) == 1
    assert f"{WEIGHTS} is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("local", "files"), [(0, True), (1, False)])
def test_one_rank_a_node_looks_at_its_files(
    local: int, files: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(path: Path, *, files: bool) -> Substrate:
        asked.append((path, files))
        raise ValueError("far enough")

    monkeypatch.setattr(run, "check_start", refuse)
    place = {"RANK": 8 + local, "WORLD_SIZE": 16, "LOCAL_RANK": local, "MASTER_ADDR": "here", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert run.main(argv_of(folder, tmp_path)) == 1
    assert asked == [(folder, files)]
