"""Leakage of a campaign: the rows drawn again are the trainer's, and one of them among the items is found and told."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatron_evolve import leaks, probing
from megatron_evolve.artefacts import CampaignFolder, save_json
from megatron_evolve.candidate import candidate, run_seed
from megatron_evolve.cli import app
from megatron_evolve.eval.freeze import freeze
from megatron_evolve.eval.leakage import NANO_EXEMPT, withheld
from megatron_evolve.eval.suite import Item
from megatron_evolve.launch.rundir import write_json
from megatron_evolve.ledger import Ledger
from megatron_evolve.substrate.build import CHALLENGE, NANO
from megatron_evolve.substrate.digest import canonical, digest_of
from megatron_evolve.substrate.manifest import read_manifest, sealed, write_manifest
from megatron_evolve.substrate.packing import Packer, Tally, read_excluded
from megatron_evolve.substrate.puzzles.row import prompt_text
from megatron_evolve.substrate.settings import Settings

SECRET = "a secret of tests"
SEED = run_seed(1, 1, "a", 0)
RECIPE = CHALLENGE.tuning.replace(steps=3, batch_size=12, warmup_steps=0)
BUILD = replace(CHALLENGE, pretraining=RECIPE, tuning=RECIPE)
# As a trainer reads it from its candidate's file: names in alphabetical order, in which it draws.
SHORT = Settings.parse(json.loads(canonical(BUILD.default())), where="a candidate's file")


def planted(rows):
    """A CSV target: three rows that were trained on, and ten that a generator never writes."""
    lines = [(f"seen-{n}", row.prompt, row.answer) for n, row in enumerate(rows)]
    lines += [(f"other-{n}", f"question {n}", f"answer {n}") for n in range(10)]
    quoted = (",".join('"' + field.replace('"', '""') + '"' for field in line) for line in lines)
    return "id,prompt,answer\n" + "\n".join(quoted) + "\n"


def campaign(root: Path, rows=(), *, withhold=True, preset=BUILD, target=True) -> Path:
    """A campaign's record: real manifests of substrate and judge, one run that its trainer wrote of, no training."""
    settings = Settings(mix=preset.mix(preset.exposure), recipe=preset.pretraining)
    build = {"preset": preset.name, "seed": 0, "trace_share": preset.trace_share}
    build["settings"] = settings.model_dump(mode="json")
    substrate = sealed(
        {
            "name": preset.name,
            "architecture": {},
            "construction": preset.construction({}),
            "default": preset.default(),
            "build": build,
            "trainer": {},
            "files": {},
        }
    )
    (root / "substrate").mkdir(parents=True)
    write_manifest(root / "substrate", substrate)
    (root / "target.csv").write_text(planted(rows))
    dev = {"kind": "generated", "difficulty": preset.difficulty, "families": {"equation": {"weight": 1}}, "seed": 1}
    spec = {
        "dev": {**dev, "items_per_family": {"dev-a": 4, "dev-b": 4}},
        "external": {"kind": "csv", "path": str(root / "target.csv"), "items": {"external-b": 2}, "sealed": 0.5}
        if target
        else None,
        "engine": {"kind": "megatron", "version": "0.1.0"},
        "secret": SECRET,
    }
    freeze(spec, root / "judge")
    folder, one = CampaignFolder(root / "campaign"), candidate(substrate.digest, preset.default())
    save_json(folder.candidate(1, one.id) / "candidate.json", one)
    held = sorted(read_excluded(root / "judge" / "withheld.txt")) if target else []
    told = {"excluded": digest_of(held) if withhold and target else None}
    (folder.run(1, one.id, SEED) / "train").mkdir(parents=True)
    write_json(folder.run(1, one.id, SEED) / "train" / "result.json", told)
    ledger = Ledger(folder.root)
    opened = {"substrate_folder": str(root / "substrate"), "judge_folder": str(root / "judge")}
    ledger.append("campaign-opened", "", opened)
    for stage in ("train", "dev"):
        ledger.append("ended", f"1/{one.id}/{SEED}/{stage}", {})
    ledger.close()
    return folder.root


def drawn(**how):
    return list(leaks.Trained(SHORT, SEED, **how).rows(BUILD.construction({})))


def agree(rows, packer: Packer, tally: Tally) -> None:
    """Whether these rows are those that a trainer's packer hands over, prompt by prompt."""
    tokens = [line.tolist() for batch in packer.batches(tally) for line in batch.tokens_BT]
    for row, its in zip(rows, tokens, strict=True):
        prompt = packer.tokenizer.encode(prompt_text(row))
        assert its[: len(prompt)] == prompt


def test_rows_drawn_again_are_those_that_the_trainer_packed():
    excluded, tally = withheld([as_item(row) for row in drawn()[:5]]), Tally()
    packer = Packer(SHORT.mix, BUILD.construction({}), BUILD.tokenizer(), RECIPE, SEED, excluded)
    agree(drawn(excluded=excluded), packer, tally)
    assert sum(tally.dropped.values()) == 5 and sum(tally.rows.values()) == 3 * 12


def as_item(row) -> Item:
    return Item(id="1", prompt=row.prompt, answer=row.answer, family=row.family, subfamily=row.subfamily)


def test_a_run_that_trained_on_the_target_is_found_and_one_that_left_it_out_is_not(tmp_path):
    rows = drawn()[3:6]
    found = leaks.leaks(campaign(tmp_path / "leaky", rows, withhold=False))
    assert not found["ok"] and found["items"] == 3 + 10 + 4 + 2 * 4
    assert found["trained"]["campaign"]["leaked_items"] == [f"external row seen-{n}" for n in range(3)]
    assert found["trained"]["campaign"]["leaked_rows"] == 3 and not found["trained"]["substrate"]["leaked_rows"]
    assert "WRONG leakage campaign: 3 of 36 training rows are among 25 items" in "\n".join(leaks.words(found))
    found = leaks.leaks(campaign(tmp_path / "sound", rows))
    assert found["ok"] and found["trained"]["campaign"]["rows"] == 36
    told = leaks.words(found)
    assert "ok    leakage campaign: 0 of 36 training rows are among 25 items of dev and the target" in told
    assert "leakage origin: unknown, its judge was frozen without the origin's runs" in told
    assert not any("0 of 0" in line or line.startswith("leakage target") for line in told)


def test_a_target_that_shows_no_item_is_not_said_to_have_been_compared(tmp_path):
    found = leaks.leaks(campaign(tmp_path / "told", target=False))
    assert found["ok"] and found["compared"] == ["dev"] and found["items"] == 3 * 4
    told = leaks.words(found)
    assert "ok    leakage campaign: 0 of 36 training rows are among 12 items of dev" in told
    assert told[-1].startswith("leakage target: unknown, this judge holds none of its items")


@pytest.mark.parametrize("leaky", [True, False])
def test_verify_eval_fails_where_an_item_was_trained_on(tmp_path, monkeypatch, leaky):
    """The command over the judge's own processes; of the campaign's record it only needs where the judge lies."""
    root = campaign(tmp_path / "asked", drawn()[:3], withhold=not leaky)
    record = SimpleNamespace(opened={"judge_folder": str(tmp_path / "asked" / "judge")})
    monkeypatch.setattr(probing, "open_record", lambda folder: record)
    done = CliRunner().invoke(app, ["verify-eval", str(root)])
    assert "ok    gold           1.000, must be 1.000" in done.stdout, done.stderr
    assert done.exit_code == leaky
    assert ("items of the judge were trained on" in done.stdout) == leaky
    assert ("WRONG leakage campaign: 3 of 36 training rows" in done.stdout) == leaky


def test_what_the_weights_were_built_on_counts_too(tmp_path):
    pool = BUILD.construction({})
    campaign(tmp_path / "built")
    [trained] = leaks.built_by(read_manifest(tmp_path / "built" / "substrate"))
    rows = list(trained.rows(pool))
    own = {"trace_share": BUILD.trace_share}
    agree(rows, Packer(BUILD.mix(BUILD.exposure), pool, BUILD.tokenizer(), RECIPE, 0, **own), Tally())
    found = leaks.leaks(campaign(tmp_path / "leaky", rows[:1]))
    assert not found["ok"] and found["trained"]["substrate"]["leaked_items"] == ["external row seen-0"]


def test_a_run_without_another_list_is_refused(tmp_path):
    root = campaign(tmp_path / "other", drawn()[:1])
    [result] = root.rglob("result.json")
    result.write_text(json.dumps({"excluded": "0" * 64}))
    with pytest.raises(ValueError, match="without another list"):
        leaks.leaks(root)


def test_nano_is_exempt_and_says_why(tmp_path):
    found = leaks.leaks(campaign(tmp_path / "nano", preset=NANO))
    assert found["ok"] and leaks.words(found) == [f"leakage not checked: {NANO_EXEMPT}"]
    assert "name the folder of a campaign" in leaks.words(None)[0]


def test_the_process_tells_counts_and_no_item(tmp_path):
    rows = drawn()[:3]
    root = campaign(tmp_path / "told", rows, withhold=False)
    told = probing._told("megatron_evolve.leaks", str(root))
    assert told == json.loads(json.dumps(leaks.leaks(root))) and not told["ok"]
    assert not any(row.prompt in json.dumps(told) or f'"{row.answer}"' in json.dumps(told) for row in rows)


def test_without_a_campaign_it_says_how_it_is_called(capsys):
    with pytest.raises(SystemExit):
        leaks.main([])
    assert "usage: megatron_evolve.leaks" in capsys.readouterr().err
