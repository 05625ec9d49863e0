"""The anchor is asked by the engine that asks everybody else in its round; what another engine scored is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_evolve import doctor
from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import open_record
from megatron_evolve.candidate import Candidate
from megatron_evolve.comparisons import Weights
from megatron_evolve.facts import RunFacts
from megatron_evolve.jobs import Ground, Run
from megatron_evolve.review import round_items
from tests.megatron_evolve import tiny


def test_a_run_is_scored_by_the_grounds_judge_whoever_it_is(tmp_path: Path) -> None:
    """No candidate, role or seed reaches the choice of the engine: it stands in the judge, and a ground has one."""
    ground = Ground(CampaignFolder(tmp_path), tmp_path / "substrate", tmp_path / "judge", time_limit_s=60)
    anchor, explorer = (Candidate.model_construct(id=name) for name in ("anchor", "explorer"))
    for stage in ("dev", "external-a", "external-b", "final"):
        words = [ground.job(Run(3, one, seed), stage).argv for one, seed in ((anchor, 1), (anchor, 2), (explorer, 1))]
        judges = {argv[argv.index("--judge") + 1] for argv in words}
        assert judges == {str(tmp_path / "judge")}


def test_the_doctor_says_which_engines_are_usable() -> None:
    packages = dict.fromkeys(("torch", "megatron-core", "transformers", "openai"), "1.0")
    packages |= dict.fromkeys(("mamba-ssm", "causal-conv1d"))
    whole = doctor.engines(packages, vllm_on_path=True)
    assert [one["path"] for one in whole.values()] == ["greedy, in process", "greedy, in process", "streamed HTTP"]
    assert "vllm is there to be started" in whole["engine openai"]["why"]
    assert doctor.engines({**packages, "mamba-ssm": "2.2"}, False)["engine transformers"]["why"] == "with mamba-ssm"
    for lost, names in {
        "openai": ["engine openai"],
        "transformers": ["engine transformers"],
        "torch": ["engine megatron", "engine transformers"],
    }.items():
        found = doctor.engines({**packages, lost: None}, False)
        assert [name for name, one in found.items() if one["path"] == "none"] == names
    assert set(whole) <= set(doctor.examine()["operations"])


@pytest.mark.slow
def test_every_run_of_a_round_carries_one_comparison_key(ground: tiny.Ground) -> None:
    for number in (1, 2):
        facts = tiny.facts_of(ground.finished, number)
        scored = {name: facts.scored(name, "dev-b") for name in facts.runs}
        assert len(scored[facts.anchor]) == 2 and len(scored) > 1
        for split in ("dev-a", "dev-b", "external-a", "external-b"):
            keys = {run.comparison(split) for runs in scored.values() for run in runs if run.has(split)}
            assert len(keys) == 1
        assert len({run.comparison("dev-b") for run in scored[facts.anchor]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["anchor", "explorer"])
def test_scores_of_two_engines_in_one_round_are_an_error(
    ground: tiny.Ground, copy_of_finished: Path, whose: str
) -> None:
    record = open_record(copy_of_finished)
    weights = Weights(**record.suites["weights"])
    facts = tiny.facts_of(copy_of_finished, 1)
    round_items(facts, weights)
    name = facts.anchor if whose == "anchor" else facts.explorers[0]
    path = facts.runs[name][0].folder / "dev" / "scores.json"
    document = json.loads(path.read_text())
    document["splits"]["dev-b"]["comparison_key"] = "0" * 64
    path.unlink()  # a link to the shared campaign's file
    path.write_text(json.dumps(document))
    # As an engine would have left it: the ledger's digests, which any change breaks, apart.
    runs = {
        name: tuple(RunFacts(one.candidate, one.seed, one.folder, one.ends) for one in found)
        for name, found in facts.runs.items()
    }
    with pytest.raises(ValueError, match=r"to be scored alike, got the comparison keys .*0000.*: another engine"):
        round_items(replace(facts, runs=runs), weights)
