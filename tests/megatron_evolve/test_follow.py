"""Following a ledger while it is written: at every moment what a reader knows is what the whole file says."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve import follow
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.follow import Follower, LooksCount
from megatron_evolve.ledger import Event, Ledger, read_ledger


def written(folder: Path, count: int, note: str = "") -> bytes:
    """The bytes of a ledger of some events."""
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder)
    for number in range(count):
        ledger.append("kind", str(number), {"note": note, "ü": number})
    ledger.close()
    return (folder / "ledger.jsonl").read_bytes()


class Reader:
    """A follower with all that it took since the ledger last began."""

    def __init__(self, path: Path) -> None:
        self.begun = 0
        self.follower = Follower(path, self.begin)

    def begin(self) -> Callable[[Event], None]:
        self.begun += 1
        self.events: list[Event] = []
        return self.events.append

    def look(self) -> list[Event]:
        self.follower.read()
        return self.events


def test_at_every_byte_it_knows_the_whole_lines(tmp_path: Path) -> None:
    data, rng = written(tmp_path / "source", 12), random.Random(3)
    path = tmp_path / "ledger.jsonl"
    reader, place = Reader(path), 0
    path.touch()
    while place < len(data):
        place = min(len(data), place + rng.randrange(1, 300))
        path.write_bytes(data[:place]) if rng.random() < 0.2 else _extend(path, data, place)
        assert reader.look() == read_ledger(path)
    assert len(reader.look()) == 12


def _extend(path: Path, data: bytes, place: int) -> None:
    with open(path, "ab") as file:
        file.write(data[file.tell() : place])


def test_a_line_taken_back_and_another_in_its_place(tmp_path: Path) -> None:
    """A writer whose disk did not keep a line truncates it; the next event stands where it stood."""
    data = written(tmp_path, 4)
    path, lines = tmp_path / "ledger.jsonl", data.splitlines(keepends=True)
    reader = Reader(path)
    assert len(reader.look()) == 4
    os.truncate(path, len(data) - len(lines[-1]))
    ledger = Ledger(tmp_path)
    for number in range(5):
        ledger.append("another", str(number), {"longer": "than what stood there before"})
    ledger.close()
    assert [event.kind for event in reader.look()] == ["kind"] * 3 + ["another"] * 5
    assert reader.begun == 2


def test_a_file_put_in_its_place_or_shorter_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    other = written(tmp_path / "other", 6, "of another campaign")
    short = written(tmp_path / "short", 1)
    written(tmp_path, 3)
    reader = Reader(path)
    reader.look()
    (tmp_path / "new").write_bytes(other)
    os.rename(tmp_path / "new", path)
    assert [event.data["note"] for event in reader.look()] == ["of another campaign"] * 6
    path.write_bytes(short)
    assert len(reader.look()) == 1


def test_a_stale_handle_is_no_end(tmp_path: Path, monkeypatch) -> None:
    """What NFS says of a file that was replaced between opening and reading it."""
    written(tmp_path, 2)
    reader = Reader(tmp_path / "ledger.jsonl")
    with monkeypatch.context() as patch:
        stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        patch.setattr(os, "fstat", lambda fd: (_ for _ in ()).throw(stale))
        assert reader.look() == []
    assert len(reader.look()) == 2


def test_each_line_is_checked_once(tmp_path: Path, monkeypatch) -> None:
    seen, parsed = [], follow.parsed_event
    monkeypatch.setattr(
        follow, "parsed_event", lambda path, line, number: seen.append(number) or parsed(path, line, number)
    )
    ledger = Ledger(tmp_path)
    reader = Reader(tmp_path / "ledger.jsonl")
    for number in range(20):
        ledger.append("kind", str(number), {})
        reader.look()
        reader.look()
    ledger.close()
    assert seen == list(range(20))


def test_damage_is_named_and_no_ledger_is_no_campaign(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no campaign"):
        Reader(tmp_path / "ledger.jsonl").look()
    lines = written(tmp_path, 4).splitlines(keepends=True)
    changed = json.dumps({**json.loads(lines[2]), "key": "x"}).encode() + b"\n"
    path = tmp_path / "ledger.jsonl"
    reader = Reader(path)
    reader.look()
    path.write_bytes(b"".join([*lines[:2], changed, lines[3]]))
    with pytest.raises(ValueError, match=r"ledger.jsonl line 3 breaks the chain"):
        reader.look()


def test_looks_are_counted_as_their_account_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "looks.jsonl"
    counted, account = LooksCount(path), Looks(path, external_budget=9)
    counted.read()
    for number, split in enumerate(("dev-a", "external-a", "dev-b", "external-b", "open", "final")):
        fields = {"candidates": ("c",), "runs": ("r",), "purpose": "judge", "item_set": "i", "items": 3}
        account.pay(Look(split=split, round=number, **fields))
        counted.read()
        told = account.summary()
        assert (counted.dev, counted.external) == (told["dev"], told["external"])
    with open(path, "ab") as file:
        file.write(b'{"split": "dev-a')
    counted.read()
    assert counted.dev == 2
    with open(path, "ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match="expected a look in JSON"):
        counted.read()
    for line in (b'{"split": 1}', b"[" * 100_000):
        path.write_bytes(line + b"\n")
        with pytest.raises(ValueError, match="expected a look in JSON"):
            LooksCount(path).read()
    path.unlink()
    counted.read()
    assert (counted.dev, counted.external) == (0, 0)
