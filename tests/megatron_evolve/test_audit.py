"""One changed byte anywhere is found and named; on changed ground nothing starts, goes on or is lost."""

import json
import os
from pathlib import Path

import pytest

from megatron_evolve.artefacts import save_json
from megatron_evolve.audit import verify_campaign
from megatron_evolve.ledger import LEDGER, Ledger, read_ledger
from tests.megatron_evolve.tiny import Ground, command, events

pytestmark = pytest.mark.slow

STARTUP = str(Path(__file__).parent / "startup")


def change_byte(path: Path, place: int) -> bytes:
    """Replaces the file by one that differs in a byte, and returns what it was."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[place] ^= 1
    path.unlink()  # the file may be a link to the shared campaign's
    path.write_bytes(changed)
    return before


def after(path: Path, text: bytes, nth: int = 0) -> int:
    """Where the byte right after the nth occurrence of `text` lies."""
    place = -1
    for _ in range(nth + 1):
        place = path.read_bytes().index(text, place + 1)
    return place + len(text)


def one_of(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


# File, the text before the changed byte, and what the finding must name if not the file.
CHANGES = {
    "ledger line": ("ledger.jsonl", b'"reason": "', "line"),
    "campaign": ("campaign.yaml", b"secret: ", None),
    "constitution": ("constitution.yaml", b"max_rows: ", None),
    "policy": ("rounds/1/policy.yaml", b"replicates:\n  explorer: ", None),
    "last policy": ("rounds/3/policy.yaml", b"replicates:\n  explorer: ", None),
    "edits": ("rounds/2/edits.json", b'"reason":"', None),
    "evidence": ("rounds/1/evidence.json", b'"mean":', None),
    "reply of a worker": ("rounds/1/workers/1/0/proposal.json", b'"hypothesis": "', None),
    "training result": ("rounds/1/*/runs/*/train/result.json", b'"seconds":', None),
    "dev scores": ("rounds/1/*/runs/*/dev/scores.parquet", b"PAR1", None),
    "external scores": ("rounds/2/*/runs/*/external-b/scores.parquet", b"PAR1", None),
    "sealed scores": ("rounds/3/*/runs/*/final/scores.parquet", b"PAR1", None),
    "the origin's sealed scores": ("closing/*/*/final/scores.parquet", b"PAR1", None),
    "account of looks": ("looks.jsonl", b'"candidates":["', "looks.jsonl"),
    "items of a look": ("looks.jsonl", b'"item_set":"', "looks.jsonl"),
    "purpose of a look": ("looks.jsonl", b'"purpose":"', "looks.jsonl"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_byte_is_found_and_named(what: str, copy_of_finished: Path) -> None:
    pattern, text, named = CHANGES[what]
    if not list(copy_of_finished.glob(pattern)):
        pytest.skip("the standing settings are the origin's: nothing was compared at the end")
    path = one_of(copy_of_finished, pattern)
    change_byte(path, after(path, text))
    found = verify_campaign(copy_of_finished)
    assert not found["ok"]
    broken = found["first_broken"]
    assert (named or str(path)) in f"{broken['where']} {broken['got']}"


def test_the_command_says_it_in_one_line_and_fails(copy_of_finished: Path) -> None:
    path = copy_of_finished / "rounds/1/policy.yaml"
    change_byte(path, after(path, b"replicates:\n  explorer: "))
    verified = command("verify", copy_of_finished)
    assert verified.returncode == 1
    assert str(path) in verified.stderr
    assert verified.stderr.count("\n") == 1
    path = copy_of_finished / "ledger.jsonl"
    change_byte(path, len(path.read_bytes()) // 2)
    verified = command("verify", copy_of_finished)
    assert verified.returncode == 1
    assert "line " in verified.stderr
    assert "Traceback" not in verified.stderr


def test_removed_and_reordered_lines_are_found(copy_of_finished: Path) -> None:
    path = copy_of_finished / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for changed, line in (((*lines[:5], *lines[6:]), 6), ((*lines[:5], lines[6], lines[5], *lines[7:]), 6)):
        path.unlink()
        path.write_bytes(b"".join(changed))
        broken = verify_campaign(copy_of_finished)["first_broken"]
        assert f"line {line}" in broken["got"]


def test_a_ledger_that_was_cut_back_is_found(copy_of_finished: Path) -> None:
    """After its opening, after the first round, and after the second was begun: what is left is whole in itself."""
    path = copy_of_finished / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kinds = [event["kind"] for event in events(copy_of_finished)]
    judged = kinds.index("evidence")
    for last, number in ((kinds.index("campaign-opened"), 1), (judged, 2), (kinds.index("round-opened", judged), 2)):
        path.unlink()
        path.write_bytes(b"".join(lines[: last + 1]))
        broken = verify_campaign(copy_of_finished)["first_broken"]
        assert broken["where"] == str(path) and broken["expected"].startswith(f"the events of round {number}"), broken


def forged(folder: Path, place: Path, said: dict[tuple[str, str], dict]) -> Path:
    """The campaign in `folder` with what some events (kind, key) say replaced, chained anew by way of `place`."""
    ledger = Ledger(place)
    for event in read_ledger(folder / LEDGER):
        ledger.append(event.kind, event.key, event.data | said.get((event.kind, event.key), {}))
    ledger.close()
    (place / LEDGER).replace(folder / LEDGER)
    return folder


def test_edits_of_another_version_are_held_against_the_evidence_too(copy_of_finished: Path, tmp_path: Path) -> None:
    """Whether other code decided as this one does is a note; that what it wrote points at evidence is not."""
    path = copy_of_finished / "rounds/2/edits.json"
    edits = json.loads(path.read_bytes())
    said = {("campaign-opened", ""): {"decisions": "of another version"}}
    assert verify_campaign(forged(copy_of_finished, tmp_path, said))["ok"]
    edits[0]["evidence"] = [""]
    path.unlink()
    said["policy", "2"] = {"edits": save_json(path, edits)}
    broken = verify_campaign(forged(copy_of_finished, tmp_path, said))["first_broken"]
    assert broken["where"] == str(path) and "cites the evidence as a whole" in broken["got"]


def test_a_missing_file_is_found(copy_of_finished: Path) -> None:
    for pattern in ("rounds/1/evidence.json", "rounds/1/*/runs/*/dev/scores.parquet", "rounds/2/policy.yaml"):
        path = one_of(copy_of_finished, pattern)
        kept = path.read_bytes()
        path.unlink()
        found = verify_campaign(copy_of_finished)
        assert str(path) in str(found["first_broken"])
        path.write_bytes(kept)
    assert verify_campaign(copy_of_finished)["ok"]


@pytest.fixture
def halfway(own_ground: Ground, variant) -> tuple[Ground, Path, Path]:
    """A campaign of one round, killed just before its evidence, on a ground of its own."""
    file = variant(
        own_ground.settings(), constitution__rounds=1, constitution__workers=2, constitution__external_looks=0
    )
    folder = own_ground.root / "campaign"
    ended = own_ground.run(folder, file=file, first=STARTUP, TEST_KILL_AT="os.rename */rounds/1/evidence.json")
    assert ended.returncode < 0, ended.stderr
    return own_ground, file, folder


def test_on_changed_ground_nothing_goes_on_and_nothing_is_lost(halfway: tuple[Ground, Path, Path]) -> None:
    ground, file, folder = halfway
    weights = ground.substrate / "weights.safetensors"
    manifest = ground.judge / "judge" / "manifest.json"
    origin = manifest.with_name("origin.json")
    known = events(folder)
    for path, place, named in (
        (weights, -1, "weights.safetensors"),
        (ground.substrate / "manifest.json", after(ground.substrate / "manifest.json", b'"families":["'), "manifest"),
        (manifest, after(manifest, b'"secret":"'), "secret"),
        (origin, after(origin, b'"candidate":"'), "origin.json"),
    ):
        before = change_byte(path, place)
        refused = ground.run(folder, file=file)
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        assert named in refused.stderr
        assert refused.stderr.count("\n") == 1
        elsewhere = ground.run(ground.root / "elsewhere", file=file)
        assert elsewhere.returncode == 1, f"a new campaign must not start on a changed {path.name}"
        assert named in elsewhere.stderr
        broken = verify_campaign(folder)["first_broken"]
        assert named in broken["got"]
        path.write_bytes(before)
    assert events(folder) == known
    ended = ground.run(folder, file=file)
    assert ended.returncode == 0, ended.stderr
    assert events(folder)[: len(known)] == known
    assert verify_campaign(folder)["ok"]
    os.truncate(weights, weights.stat().st_size - 1)
    assert ground.run(folder, file=file).returncode == 1, "not even a closed campaign is opened on it"


def test_a_look_that_was_added_or_taken_out_is_found(copy_of_finished: Path) -> None:
    """Also one that no score hangs on: the ledger keeps the digest of the account as every round left it."""
    path = copy_of_finished / "looks.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"split":"dev-a"' in lines[0]
    added = lines[0].replace(b'"round":1', b'"round":99')
    for changed in ([added, *lines], [*lines[1:-1], lines[-1], lines[0]]):
        path.unlink()
        path.write_bytes(b"".join(changed))
        broken = verify_campaign(copy_of_finished)["first_broken"]
        assert (broken["where"], broken["got"]) == (str(path), "others")
    path.write_bytes(b"".join([*lines, added]))
    assert verify_campaign(copy_of_finished)["ok"], "a look that was paid after the last digest"


def test_a_campaign_whose_ledger_keeps_no_digest_of_the_looks_is_read(copy_of_finished: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for event in read_ledger(copy_of_finished / LEDGER):
        ledger.append(event.kind, event.key, {name: value for name, value in event.data.items() if name != "looks"})
    ledger.close()
    (tmp_path / LEDGER).replace(copy_of_finished / LEDGER)
    found = verify_campaign(copy_of_finished)
    assert found["ok"] and any("no digest" in note for note in found["notes"])
    path = copy_of_finished / "looks.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(place for place, line in enumerate(lines) if b'"split":"dev-b"' in line)
    look = json.loads(lines[place])
    lines[place] = json.dumps({**look, "runs": look["runs"][1:]}).encode() + b"\n"
    path.unlink()
    path.write_bytes(b"".join(lines))
    broken = verify_campaign(copy_of_finished)["first_broken"]
    assert broken["where"] == str(path) and look["runs"][0] in broken["got"], "a look that does not name the run"
