"""The ledger: chained, append-only, forgiving only of a torn last line."""

import itertools
import json
from contextlib import closing

import pytest

from megatron_evolve.ledger import GENESIS, History, Ledger, read_ledger
from megatron_evolve.status import paused, state_of
from megatron_evolve.tally import Tally


def filled(folder, count: int = 4):
    ledger = Ledger(folder)
    for number in range(count):
        ledger.append("kind", str(number), {"value": number, "text": "ü"})
    ledger.close()
    return folder / "ledger.jsonl"


def test_round_trip_and_chain(tmp_path) -> None:
    events = read_ledger(filled(tmp_path))
    assert [event.data["value"] for event in events] == [0, 1, 2, 3]
    assert events[0].previous == GENESIS
    assert all(later.previous == earlier.hash for earlier, later in itertools.pairwise(events))


def test_once_happens_once_and_survives_reopening(tmp_path) -> None:
    calls = []
    ledger = Ledger(tmp_path)
    for _ in range(2):
        assert ledger.once("a", "k", lambda: calls.append(1) or {"x": 1}) == {"x": 1}
    ledger.close()
    again = Ledger(tmp_path)
    assert again.once("a", "k", lambda: calls.append(1) or {"x": 2}) == {"x": 1}
    assert calls == [1]
    assert again.find("a", "other") is None


def test_a_torn_last_line_is_cut_off(tmp_path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 4, "ti')
    assert len(read_ledger(path)) == 4
    ledger = Ledger(tmp_path)
    ledger.append("kind", "4", {})
    ledger.close()
    assert len(read_ledger(path)) == 5
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], b"garbage", *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:1], lines[1].replace(b'"value": 1', b'"value": 7'), *lines[2:]],
        lambda lines: [lines[0], b"[" * 100_000, *lines[2:]],
        lambda lines: [lines[0], lines[1].replace(b"1", b"[" * 1400 + b"]" * 1400, 1), *lines[2:]],
        lambda lines: [lines[0], lines[1].replace(b'": 1', b'": ' + b"[" * 1400 + b"]" * 1400), *lines[2:]],
        lambda lines: [lines[0], lines[1].replace(b'"value": 1', rb'"value": "\ud800"'), *lines[2:]],
    ],
    ids=["garbage", "removed", "swapped", "changed", "deep", "deep-number", "deep-value", "surrogate"],
)
def test_damage_is_found_and_located(tmp_path, damage) -> None:
    path = filled(tmp_path)
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(ValueError, match=r"ledger.jsonl line [12]"):
        read_ledger(path)
    with pytest.raises(ValueError, match=r"ledger.jsonl line [12]"):
        Ledger(tmp_path)


def test_an_event_is_checked_whenever_it_is_read(tmp_path) -> None:
    path = filled(tmp_path)
    with closing(Ledger(tmp_path)) as ledger:
        assert [event.key for event in ledger] == ["0", "1", "2", "3"]
        assert ledger.find("kind", "1").data["value"] == 1
        path.write_bytes(path.read_bytes().replace(b'"value": 1', b'"value": 7'))
        with pytest.raises(ValueError, match=r"line 2 breaks the chain"):
            ledger.find("kind", "1")


def test_events_are_found_by_kind_key_and_round(tmp_path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        for kind, key in (("ended", "1/a/5/train"), ("ended", "12/a/5/train"), ("policy", "1"), ("ended", "1/b/5/dev")):
            ledger.append(kind, key, {})
        for history in (ledger, History(tmp_path / "ledger.jsonl")):
            assert [event.key for event in history.of_round("ended", 1)] == ["1/a/5/train", "1/b/5/dev"]
            assert [event.number for event in history.of_round("policy", 1)] == [2]
            assert history.keys("policy") == ["1"]
            assert history.has("ended", "12/a/5/train") and not history.has("ended", "2/a/5/train")
            assert len(history) == 4


def test_an_empty_folder_holds_no_campaign(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no campaign"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_lines_are_plain_json(tmp_path) -> None:
    first = json.loads(filled(tmp_path).read_text().splitlines()[0])
    assert set(first) == {"number", "time", "kind", "key", "data", "previous", "hash"}


def test_a_campaign_is_paused_until_it_goes_on_whatever_an_operator_enters(tmp_path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("paused", "1", {"why": "disk full", "attempts": {}})
    ledger.append("external-submitted", "1/c/7", {"digest": "d"})
    ledger.append("external-again", "1/c/7/1", {"run": "1/c/7", "reason": "down"})
    assert state_of(ledger) == "paused" and paused(ledger).data["why"] == "disk full"
    tally = Tally()
    for event in ledger:
        tally.add(event)
    assert tally.pause == "disk full"
    ledger.append("resumed", "1", {})
    assert paused(ledger) is None
