"""Bad input: one sentence on stderr that says what came and what to do, a status that is not zero, and nothing lost."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_evolve.audit import verify_campaign
from megatron_evolve.launch.rundir import Lock
from tests.megatron_evolve.tiny import Ground, command, events

pytestmark = pytest.mark.slow

STARTUP = str(Path(__file__).parent / "startup")


def refused(ended: subprocess.CompletedProcess, *named: str) -> str:
    """The one sentence of a command that refused."""
    assert ended.returncode not in (0, 75), ended.stdout
    assert ended.returncode > 0, "ended by a signal"
    assert "Traceback" not in ended.stderr + ended.stdout
    said = ended.stderr.strip().splitlines()
    assert len(said) == 1, ended.stderr
    for name in named:
        assert name in said[0], said[0]
    return said[0]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("schema: campaign/1\n  name: [", ("not valid YAML", "line 2")),
        ("- a list\n", ("expected keys and values",)),
        ("schema: campaign/1\nname: twice\nname: twice\n", ("name", "twice")),
        ("", ("empty",)),
    ],
)
def test_yaml_that_is_none(text: str, named: tuple[str, ...], ground: Ground, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    refused(ground.run(tmp_path / "campaign", file=file), "bad.yaml", *named)
    assert not (tmp_path / "campaign" / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"constitution__rounnds": 2}, ("rounnds", "rounds")),
        ({"constitution__rounds": 0}, ("constitution.rounds",)),
        ({"judge__origin_seeds": 2}, ("origin_seeds", "8")),
        ({"claim": "miracle"}, ("claim", "performance")),
        ({"comparator": None}, ("comparator",)),
        ({"judge__dev__families__numeral__weight": -1}, ("weight",)),
        ({"substrate__path": "/nowhere"}, ("/nowhere", "substrate build")),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict, named: tuple[str, ...], ground: Ground, variant: Callable[..., Path], tmp_path: Path
) -> None:
    refused(ground.run(tmp_path / "campaign", file=variant(**changes)), *named)
    assert not list((tmp_path / "campaign").glob("rounds"))


def test_a_file_that_is_not_there(ground: Ground, tmp_path: Path) -> None:
    refused(ground.run(tmp_path / "campaign", file=tmp_path / "no.yaml"), "no.yaml")
    refused(command("status", tmp_path), "holds no campaign")
    refused(command("try", tmp_path / "no.yaml", "--dir", ground.finished), "no.yaml")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe.steps": {"scale": 1.0}}, "changes nothing"),
        ({"recipe.lr": {"set": 3e-3}}, "changes nothing"),
        ({}, "chang"),
        ({"mix.weight.*": {"set": 0}}, "mix.weight"),
        ({"recipe.lrr": {"set": 0.1}}, "recipe.lr"),
        ({"recipe.lr": {"set": 1e9}}, "recipe.lr"),
        ({"mix.style.cipher": {"set": "foo"}}, "mix.style.cipher: expected one of"),
        ({"judge.secret": {"set": "mine"}}, "judge.secret"),
    ],
)
def test_deltas_that_do_not_fit(change: dict, named: str, ground: Ground, tmp_path: Path) -> None:
    delta = tmp_path / "delta.yaml"
    delta.write_text(yaml.safe_dump({"schema": "delta/1", "hypothesis": "None.", "change": change}))
    refused(command("try", delta, "--dir", ground.finished), named)
    refused(command("mix", "show", delta, "--dir", ground.finished), named)
    assert not (ground.finished / "try").exists()


def test_a_mix_that_sums_to_zero(ground: Ground, tmp_path: Path) -> None:
    families = ground.settings()["judge"]["dev"]["families"]
    delta = tmp_path / "delta.yaml"
    change = {f"mix.weight.{name}": {"set": 0} for name in families}
    delta.write_text(yaml.safe_dump({"schema": "delta/1", "hypothesis": "Nothing.", "change": change}))
    refused(command("try", delta, "--dir", ground.finished), "weight")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("id,prompt\n1,what\n", ("answer",)),
        ("id,prompt,answer\n1,a,b\n1,c,d\n", ("every id once", "'1'")),
        ("id,prompt,answer\n", ("at least one row",)),
        ("", ("columns",)),
        ("id,prompt,answer\n1,a\n", ("fields",)),
    ],
)
def test_csvs_that_do_not_fit(
    text: str, named: tuple[str, ...], ground: Ground, variant: Callable[..., Path], tmp_path: Path
) -> None:
    target = tmp_path / "target.csv"
    target.write_text(text)
    file = variant(judge__external={"kind": "csv", "items": {"external-a": 1, "external-b": 1}})
    run = [*ground.arguments(tmp_path / "campaign", "--external", str(target), file=file)]
    run[run.index("--store") + 1] = str(tmp_path / "store")
    refused(command(*run[3:]), "target.csv", *named)


def test_a_csv_that_is_missing_or_not_wanted(ground: Ground, variant: Callable[..., Path], tmp_path: Path) -> None:
    file = variant(judge__external={"kind": "csv", "items": {"external-a": 1, "external-b": 1}})
    refused(ground.run(tmp_path / "campaign", file=file), "--external")
    refused(ground.run(tmp_path / "campaign", "--external", str(tmp_path / "no.csv"), file=file), "no.csv")
    refused(ground.run(tmp_path / "campaign", "--external", str(tmp_path / "no.csv")), "--external")


def test_a_second_controller_and_another_campaign(
    ground: Ground, copy_of_finished: Path, variant: Callable[..., Path]
) -> None:
    before = (copy_of_finished / "ledger.jsonl").read_bytes()
    with Lock(copy_of_finished / "controller.lock"):
        refused(ground.run(copy_of_finished), f"process {os.getpid()}")
    refused(ground.run(copy_of_finished, file=variant(seed=1)), "other settings", "--dir")
    (copy_of_finished / "campaign.yaml").unlink()
    refused(ground.run(copy_of_finished, file=variant(seed=1)), "other settings")
    assert (copy_of_finished / "ledger.jsonl").read_bytes() == before


def test_a_folder_that_is_a_file(ground: Ground, tmp_path: Path) -> None:
    path = tmp_path / "campaign"
    path.write_text("mine")
    refused(ground.run(path), str(path), "file exists")
    refused(ground.run(path / "below"), str(path))
    assert path.read_text() == "mine"


def test_a_corrupt_ledger_stops_it_and_a_restored_one_goes_on(ground: Ground, copy_of_finished: Path) -> None:
    path = copy_of_finished / "ledger.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    halfway = b"".join(lines[:20])
    path.unlink()
    for corrupt in (b"not json\n", lines[3][:-20] + b"\n", lines[19].replace(b'"number": 19', b'"number": 18')):
        path.write_bytes(halfway[: -len(lines[19])] + corrupt)
        refused(ground.run(copy_of_finished), "ledger.jsonl line 20", "restore")
        assert path.read_bytes().endswith(corrupt), "a refusal changes nothing"
    path.write_bytes(halfway + lines[20][: len(lines[20]) // 2])  # torn by a crash: not corrupt
    (copy_of_finished / "looks.jsonl").unlink()
    ended = ground.run(copy_of_finished)
    assert ended.returncode == 0, ended.stderr
    assert path.read_bytes().startswith(halfway)
    assert verify_campaign(copy_of_finished)["ok"]


def test_a_damaged_checkpoint_becomes_a_kind_and_no_score(own_ground: Ground, variant: Callable[..., Path]) -> None:
    small = {"constitution__rounds": 1, "constitution__workers": 3, "constitution__external_looks": 0}
    file = variant(own_ground.settings(), **small, launch__cores=1)  # all are trained before the first is scored
    folder = own_ground.root / "campaign"
    ended = own_ground.run(folder, file=file, first=STARTUP, TEST_KILL_AT="os.rename */rounds/1/*/dev/*/job.json")
    assert ended.returncode < 0, ended.stderr
    explorers = [event["data"]["candidate"] for event in events(folder) if event["kind"] == "proposed"]
    missing, truncated = (one_of(folder, f"rounds/1/{name}/runs/*/train/checkpoint") for name in explorers)
    shutil.rmtree(missing)
    weights = one_of(truncated, "*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    ended = own_ground.run(folder, "--json", file=file)
    assert ended.returncode == 0, ended.stderr
    found = {event["key"]: event["data"]["end"] for event in events(folder) if event["kind"] == "ended"}
    failed = {key.split("/")[1]: end for key, end in found.items() if end["outcome"] != "finished"}
    assert {name: end["outcome"] for name, end in failed.items()} == dict.fromkeys(explorers, "crashed")
    assert all("train again" in end["reason"] for end in failed.values())
    shown = {one["id"]: one for one in json.loads(ended.stdout)["rounds"][0]["candidates"]}
    assert all(shown[name]["dev"] is None for name in explorers)
    broken = verify_campaign(folder)["first_broken"]
    assert "checkpoint" in broken["where"], "what a run was to hand on is not there any more"


def one_of(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_pauses_it(ground: Ground, disk: Path) -> None:
    folder = disk / "campaign"
    filler = disk / "filler"
    filler.write_bytes(bytes(11_400_000))
    said = refused(ground.run(folder), "free space", "same command again")
    assert "no space left" in said
    known = events(folder)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    ended = ground.run(folder)
    assert ended.returncode == 0, ended.stderr
    assert events(folder)[: len(known)] == known
    assert {event["data"]["end"]["outcome"] for event in events(folder) if event["kind"] == "ended"} == {"finished"}
    assert verify_campaign(folder)["ok"]
    for number in (1, 2, 3):
        mine, expected = (one / "rounds" / str(number) / "policy.yaml" for one in (folder, ground.finished))
        assert mine.read_bytes() == expected.read_bytes()


def test_a_read_only_disk_refuses(ground: Ground, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    refused(ground.run(disk / "campaign"), "read-only", "writable")
