"""Files written whole, locks with one holder, and sentences instead of error numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import JobOutcome, OutcomeKind

HOLD = (
    "import sys; from pathlib import Path; from megatron_evolve.launch.rundir import Lock; "
    "Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
)


def test_a_file_is_replaced_and_nothing_else_remains(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "a.json", {"b": 1})
    rundir.write_json(tmp_path / "a.json", {"b": [2, "é"]})
    assert rundir.read_json(tmp_path / "a.json") == {"b": [2, "é"]}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b'{"a": 1, "b', "truncated"),
        (b"nonsense\n", "not JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "brackets in brackets"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(rundir.DamagedFile, match=words) as caught:
        rundir.read_json(tmp_path / "a.json")
    assert "a.json" in str(caught.value) and "restore" in str(caught.value)


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """A pipe stands for a device: the rename would take either away from whoever has it open."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "kept").write_text("old")
    for name, target in (("to-pipe", "pipe"), ("to-file", "kept"), ("to-none", "none")):
        (tmp_path / name).symlink_to(target)
    before = sorted(os.listdir(tmp_path))
    for path in (tmp_path / "pipe", tmp_path / "to-pipe", tmp_path, Path(""), Path("/")):
        with pytest.raises(rundir.RunDirError, match=r"write a file at .*, found something else there: name"):
            rundir.write_whole(path, "new")
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == before
    for name in ("kept", "to-file", "to-none"):
        rundir.write_whole(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"


def test_links_that_lead_round_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert rundir.resolved(tmp_path / "here" / "none") == tmp_path.resolve() / "none"
    if sys.version_info < (3, 13):
        with pytest.raises(rundir.RunDirError, match=r"cannot follow .*loop/x: its links lead round in a circle"):
            rundir.resolved(tmp_path / "loop" / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(rundir.RunDirError, match="missing"):
        rundir.read_json(tmp_path / "a.json")
    with pytest.raises(rundir.RunDirError, match="create the folder"):
        rundir.write_whole(tmp_path / "none" / "a", "")


def test_a_second_holder_is_told_the_first(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(rundir.LockHeld, match=rf"process {first.pid} on {os.uname().nodename}: wait for it or stop it"):
        rundir.Lock(tmp_path / "lock").acquire()
    first.kill()
    first.communicate()
    with rundir.Lock(tmp_path / "lock"), pytest.raises(rundir.LockHeld, match=str(os.getpid())):
        rundir.Lock(tmp_path / "lock").acquire()


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(small_disk: Path) -> None:
    rundir.write_whole(small_disk / "a", "old")
    with pytest.raises(rundir.RunDirError, match="no space left on device; free space on that disk"):
        rundir.write_whole(small_disk / "a", b"x" * 1_000_000)
    assert (small_disk / "a").read_text() == "old"
    assert os.listdir(small_disk) == ["a"]


def test_a_read_only_folder_is_one_sentence(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if os.geteuid() == 0:  # root writes in spite of permissions
        folder = request.getfixturevalue("small_disk")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
    for act in (
        lambda: rundir.write_whole(folder / "a", "x"),
        lambda: rundir.Lock(folder / "lock").acquire(),
        lambda: rundir.make_folder(folder / "b"),
    ):
        with pytest.raises(
            rundir.RunDirError, match=r"(read-only file system|permission denied); (mount|make) it writable"
        ):
            act()


def test_a_job_tells_how_far_it_is_at_most_every_two_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir.Pulse("train").tell(1, 3)  # started by hand: there is nobody to tell
    assert os.listdir(tmp_path) == [] and rundir.read_progress(tmp_path) is None
    monkeypatch.setenv(rundir.ATTEMPT_VARIABLE, str(tmp_path))
    pulse = rundir.Pulse("train")
    told = []
    for step in (1, 2, 3):
        pulse.tell(step, 3)
        told.append(rundir.read_progress(tmp_path).step)
    assert told == [1, 1, 3] and os.listdir(tmp_path) == ["progress.json"]
    assert rundir.read_json(tmp_path / "progress.json").keys() == {"step", "steps", "at", "rank", "stage"}
    (tmp_path / "progress.json").write_text('{"step": 1}\n')
    with pytest.raises(rundir.DamagedFile, match=r"progress\.json"):
        rundir.read_progress(tmp_path)


def test_an_outcome_that_says_nothing_is_put_aside_and_told(tmp_path: Path) -> None:
    assert rundir.take_outcome(tmp_path) == (None, "")
    path = tmp_path / rundir.OUTCOME_FILE
    path.write_text('{"key": "a", "kind": "fini')
    outcome, damage = rundir.take_outcome(tmp_path)
    assert outcome is None and damage.startswith(
        f"its outcome was damaged and is kept beside it (expected JSON in {path}"
    )
    assert [one.name for one in tmp_path.iterdir()] == ["outcome.json.damaged"]
    assert rundir.take_outcome(tmp_path) == (None, "")
    whole = JobOutcome.unmeasured("a", 1, OutcomeKind.LOST, "here", "its node is gone")
    rundir.write_json(path, whole.to_json())
    assert rundir.take_outcome(tmp_path) == (whole, "")
