"""Every writer of the loop leaves files whose bytes and names are on disk: what NFS and Lustre keep after a crash."""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.artefacts import CampaignFolder, save_json, save_yaml
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.launch.job import Job
from megatron_evolve.launch.rundir import make_folder, prepare_attempt, publish, write_json
from megatron_evolve.ledger import Ledger
from megatron_evolve.prune import prune
from tests.durability import recorded
from tests.megatron_evolve.campaign_folder import build_campaign
from tests.megatron_evolve.test_prune import give_weights

ROOT = Path(__file__).resolve().parents[2]


def artefacts(root: Path) -> None:
    save_json(root / "a" / "b" / "value.json", {"a": 1})
    save_yaml(root / "a" / "c" / "value.yaml", {"a": 1})


def attempt(root: Path) -> None:
    prepare_attempt(Job("key", (sys.executable,), root / "run", 1.0, "done"), 1)


def ledger(root: Path) -> None:
    opened = Ledger(root)
    for number in range(3):
        opened.append("kind", str(number), {})
    opened.close()


def looks(root: Path) -> None:
    fields = {"candidates": ("c",), "runs": ("r",), "purpose": "judge", "round": 1, "item_set": "i", "items": 3}
    Looks(root / "looks.jsonl", external_budget=3).pay(Look(split="dev-a", **fields))


def folder_put_in_place(root: Path) -> None:
    make_folder(root / ".new.tmp")
    write_json(root / ".new.tmp" / "inside.json", {})
    publish(root / ".new.tmp", root / "new")


WRITERS = (artefacts, attempt, ledger, looks, folder_put_in_place)


@pytest.mark.parametrize("write", WRITERS, ids=lambda one: one.__name__)
def test_what_is_written_is_on_disk(tmp_path: Path, monkeypatch, write: Callable[[Path], None]) -> None:
    with recorded(monkeypatch) as calls:
        write(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()]
    assert calls.broken(tmp_path) == []


def test_the_law_finds_what_is_not(tmp_path: Path, monkeypatch) -> None:
    """The oracle itself: a plain write, a rename without a sync, one across folders."""
    (tmp_path / "other").mkdir()
    with recorded(monkeypatch) as calls:
        (tmp_path / "plain").write_text("x")
        (tmp_path / ".new").write_text("x")
        os.rename(tmp_path / ".new", tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "other" / "new")
    said = " ".join(calls.broken(tmp_path))
    for words in ("bytes of", "before it was synced", "another folder", "not synced after"):
        assert words in said


def test_above_the_launcher_one_function_gives_files_their_names() -> None:
    """A rename elsewhere would be one that nobody synced."""
    for room in ("substrate", "eval", "megatron_evolve"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert called != "os.replace" and not called.endswith(".rename"), f"{path}: use rundir.publish"


def test_a_thing_is_entered_as_pruned_before_it_goes(tmp_path: Path, monkeypatch) -> None:
    root = build_campaign(tmp_path / "campaign", judged=1, closed=False)
    give_weights(CampaignFolder(root))
    entered, gone = root / "pruned.jsonl", []
    unlink = Path.unlink
    held = lambda path: entered.exists() and path.relative_to(root).as_posix() in entered.read_text()  # noqa: E731
    monkeypatch.setattr(Path, "unlink", lambda path, **more: (gone.append(held(path)), unlink(path, **more))[1])
    with recorded(monkeypatch) as calls:
        prune(root, keep="leading", dry_run=False)
    assert gone and all(gone)
    assert str(entered) in [path for what, path, _ in calls.calls if what == "fsync"]
