"""Pruning: frees weights that no later step reads, writes down what went, and verify still passes and says so."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import verify_campaign
from megatron_evolve.cli import app
from megatron_evolve.jobs import MANIFEST_FILE
from megatron_evolve.launch.rundir import Lock, LockHeld
from megatron_evolve.ledger import read_ledger
from megatron_evolve.prune import LEFT_S, prune, pruned_weights
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.train.checkpoint import load_checkpoint
from tests.megatron_evolve.campaign_folder import build_campaign
from tests.megatron_evolve.tiny import Ground

KILO = 1000


def trainings(folder: CampaignFolder) -> Iterator[tuple[int, str, Path]]:
    """Round, candidate and folder of each training that ended."""
    for event in read_ledger(folder.ledger):
        if event.kind == "ended" and event.key.endswith("/train"):
            number, name, seed, _ = event.key.split("/")
            yield int(number), name, folder.run(int(number), name, int(seed)) / "train"


def give_weights(folder: CampaignFolder) -> None:
    """Puts what a training leaves into the folders of an invented campaign: a checkpoint, one to go on from, a log."""
    for _, _, run_dir in trainings(folder):
        for name in ("checkpoint", "resume/step-000000050"):
            (run_dir / name).mkdir(parents=True)
            (run_dir / name / "manifest.json").write_text("{}")
            (run_dir / name / "weights.safetensors").write_bytes(bytes(KILO))
        (run_dir / "result.json").write_text("{}")
        for name, age_s in ((".half.tmp", 2 * LEFT_S), (".being-written.tmp", 0)):
            (run_dir / name).write_bytes(bytes(KILO))
            os.utime(run_dir / name, (time.time() - age_s,) * 2)
    (folder.root / "warm.log").write_text("loaded\n")


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    found = {path.relative_to(root).as_posix(): path.stat() for path in root.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_campaign(tmp_path_factory.mktemp("prune") / "campaign", judged=2, closed=False)
    give_weights(CampaignFolder(root))
    return root


@pytest.fixture
def campaign(invented: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(invented, tmp_path / "campaign"))


def kept(root: Path) -> set[tuple[int, str]]:
    """Rounds and candidates whose weights are there."""
    found = trainings(CampaignFolder(root))
    return {(number, name) for number, name, path in found if (path / "checkpoint/weights.safetensors").exists()}


def test_a_dry_run_says_what_a_real_one_does_and_touches_nothing(campaign: Path) -> None:
    before = files(campaign)
    told = prune(campaign, keep="leading", dry_run=True)
    assert files(campaign) == before
    done = prune(campaign, keep="leading", dry_run=False)
    assert {**told, "dry_run": False} == done
    gone = set(before) - set(files(campaign))
    paths = [path for one in done["pruned"] for path in one["paths"]]
    assert all(any(name == path or name.startswith(f"{path}/") for path in paths) for name in gone)
    assert done["bytes"] == sum(before[name][0] for name in gone)


@pytest.mark.parametrize("keep", ["leading", "standing", "all"])
def test_what_stays(campaign: Path, keep: str) -> None:
    folder = CampaignFolder(campaign)
    everything = kept(campaign)
    before = files(campaign)
    prune(campaign, keep=keep, dry_run=False)
    open_round = {one for one in everything if one[0] == 3}
    assert open_round and open_round <= kept(campaign), "an open round keeps its weights"
    leading = set()
    for number in (1, 2):
        found = json.loads(folder.evidence(number).read_bytes())
        leading |= {(number, found["anchor"]), (number, found["selected"])}
    if keep == "leading":
        assert leading <= kept(campaign) < everything
    elif keep == "standing":
        assert len({name for _, name in kept(campaign) - open_round}) == 1
    else:
        assert kept(campaign) == everything
    assert not list(campaign.rglob("resume")) and not list(campaign.rglob(".half.tmp"))
    assert list(campaign.rglob(".being-written.tmp"))
    assert not (campaign / "warm.log").exists()
    never = ("jsonl", "yaml", "manifest.json", "result.json", "evidence.json", "edits.json")
    stays = {name: what for name, what in before.items() if name.endswith(never) and "/resume/" not in name}
    assert stays.items() <= files(campaign).items()


def test_it_goes_on_after_a_kill_and_then_has_nothing_to_do(campaign: Path, monkeypatch) -> None:
    unlink, calls = Path.unlink, []

    def killed(path: Path, **more) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        unlink(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(campaign, keep="leading", dry_run=False)
    with open(campaign / "pruned.jsonl", "ab") as file:
        file.write(b'{"time": "torn')
    assert prune(campaign, keep="leading", dry_run=False)["pruned"]
    assert prune(campaign, keep="leading", dry_run=False)["pruned"] == []
    entered = pruned_weights(CampaignFolder(campaign))
    missing = {path for _, _, path in trainings(CampaignFolder(campaign)) if not list(path.rglob("*.safetensors"))}
    assert {campaign / one for one in entered} == {path / "checkpoint" for path in missing}


def test_a_live_controller_keeps_its_warm_parent_s_log(campaign: Path) -> None:
    with Lock(campaign / "controller.lock"):
        prune(campaign, keep="all", dry_run=False)
    assert (campaign / "warm.log").exists()


def test_two_at_once_are_refused(campaign: Path) -> None:
    with Lock(campaign / "prune.lock"), pytest.raises(LockHeld, match="in use by process"):
        prune(campaign, keep="leading", dry_run=False)


def test_bad_input_is_one_sentence(campaign: Path, tmp_path: Path) -> None:
    with open(campaign / "pruned.jsonl", "w") as file:
        file.write("nonsense\n")
    with pytest.raises(ValueError, match=r"pruned.jsonl is damaged at .*: restore it"):
        pruned_weights(CampaignFolder(campaign))
    for words, said in (
        (["prune", str(campaign), "--keep", "everything"], "--keep takes leading, standing, all; got 'everything'"),
        (["prune", str(tmp_path)], "holds no campaign"),
    ):
        ended = CliRunner().invoke(app, words)
        assert ended.exit_code == 1 and said in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "prune.lock").exists(), "a folder that is no campaign is left alone"


# --- a real campaign --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_file_of_a_campaign_is_a_copy_of_the_substrate(ground: Ground) -> None:
    """Forking copies nothing: a candidate's own bytes are its delta, its weights, logs and scores."""
    sizes = {path.stat().st_size for path in ground.substrate.iterdir() if path.is_file()}
    ours = {digest_file(path) for path in ground.substrate.iterdir() if path.is_file()}
    for path in ground.finished.rglob("*"):
        if path.is_file() and path.stat().st_size in sizes:
            assert digest_file(path) not in ours, path
    weights = (ground.substrate / "weights.safetensors").stat().st_size
    for run_dir in ground.finished.glob("rounds/*/*/runs/*"):
        own = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
        assert own < 1.2 * weights, "the weights that it trained, once, and a little beside them"


@pytest.mark.slow
def test_verify_passes_after_pruning_and_says_what_went(copy_of_finished: Path) -> None:
    folder = CampaignFolder(copy_of_finished)
    whole = verify_campaign(copy_of_finished)
    for event in read_ledger(folder.ledger):
        if event.kind == "ended" and event.key.endswith("/train"):
            assert MANIFEST_FILE in event.data["files"], "the weights are pinned when their training ends"
    done = prune(copy_of_finished, keep="standing", dry_run=False)
    weights = [one for one in done["pruned"] if one["what"] == "weights"]
    assert weights
    found = verify_campaign(copy_of_finished)
    assert (found["ok"], found["first_broken"]) == (True, None)
    assert found["replayed_decisions"] == whole["replayed_decisions"]
    assert found["notes"] == [f"the weights of {len(weights)} runs were pruned, as pruned.jsonl says"]
    gone = (copy_of_finished / weights[0]["paths"][0]).parent
    with pytest.raises(ValueError, match=r"missing, or was pruned to free its space: train the run again"):
        load_checkpoint(gone)

    # What is not entered is missing, and what is there is checked byte by byte.
    there = next(path for _, _, path in trainings(folder) if list((path / "checkpoint").glob("*.safetensors")))
    (file,) = (there / "checkpoint").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()  # a link to the shared campaign's: replaced, never written into
    assert "is missing" in verify_campaign(copy_of_finished)["first_broken"]["got"]
    file.write_bytes(data)
    assert "sha256" in verify_campaign(copy_of_finished)["first_broken"]["got"]
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify_campaign(copy_of_finished)["ok"]
    entered = folder.pruned.read_text()
    folder.pruned.write_text(entered.replace(json.loads(entered.splitlines()[0])["manifest"], "0" * 64))
    assert verify_campaign(copy_of_finished)["first_broken"]["where"].startswith(str(folder.pruned))
