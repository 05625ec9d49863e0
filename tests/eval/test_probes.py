"""Probes: a sound judge gives each the score it must have, and every way of being unsound is caught by one."""

import json
import subprocess
import sys

import pytest

from megatron_evolve.eval import probes, score
from megatron_evolve.eval.judge import Engine, freeze_judge, load_judge
from megatron_evolve.eval.suite import GeneratedSuite, csv_suite

FAMILIES = ("numeral", "gravity", "unit_conversion", "cipher", "bit_manipulation", "equation")


def suite(difficulty: str, *splits: str) -> GeneratedSuite:
    families = {name: {"weight": place + 1} for place, name in enumerate(FAMILIES)}
    return GeneratedSuite(difficulty=difficulty, families=families, items_per_family=dict.fromkeys(splits, 30), seed=3)


def frozen(folder, difficulty="nano", external=None):
    engine = Engine(version="0.1.0", max_new_tokens=24, batch_size=8)
    dev = suite(difficulty, "dev-a", "dev-b")
    outside = external or suite(difficulty, "external-b", "final")
    freeze_judge(folder, dev=dev, external=outside, engine=engine, secret="a secret of tests")
    return folder


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return frozen(tmp_path_factory.mktemp("probes") / "judge")


@pytest.mark.parametrize("difficulty", ["nano", "challenge"])
def test_a_sound_judge_passes_every_probe(tmp_path, difficulty):
    found = probes.verify_eval(frozen(tmp_path / "judge", difficulty))
    assert found["ok"] and found["headroom"] is None and set(found["splits"]) == {"dev-b", "external-b"}
    for split in found["splits"].values():
        assert {name: one["ok"] for name, one in split["probes"].items()} == dict.fromkeys(split["probes"], True)
        assert len(split["probes"]) == 7
        assert set(split["probes"]["gold"]["families"].values()) == {1.0}
        assert 0 < split["probes"]["constant"]["score"] < 0.5


def accept_all(gold, prediction):
    return True


def accept_none(gold, prediction):
    return False


def accept_contained(gold, prediction):
    return gold in prediction


def first_box(text):
    return text.split("\\boxed{", 1)[1].split("}")[0] if "\\boxed{" in text else ""


@pytest.mark.parametrize(
    ("name", "broken", "caught"),
    [
        ("verify", accept_all, {"gold-leak", "planted-wrong", "shuffled-gold", "constant", "empty", "truncated"}),
        ("verify", accept_none, {"gold"}),
        ("extract", lambda text: text, {"gold"}),
        ("extract", first_box, {"gold-leak"}),
    ],
    ids=["accepts-all", "accepts-none", "no-extraction", "first-box"],
)
def test_an_unsound_metric_is_caught(nano, monkeypatch, name, broken, caught):
    monkeypatch.setattr(score, name, broken)
    found = probes.verify_eval(nano)
    failed = {name for name, one in found["splits"]["dev-b"]["probes"].items() if not one["ok"]}
    assert not found["ok"] and failed == caught


def test_a_metric_that_reads_the_answer_off_the_question_is_caught(tmp_path, monkeypatch):
    """Every question tells its answer; a metric that looks for it anywhere takes the cut-off repetition for right."""
    table = tmp_path / "target.csv"
    table.write_text("id,prompt,answer\n" + "".join(f"r{n},the answer is w{n}x,w{n}x\n" for n in range(40)))
    folder = frozen(tmp_path / "judge", external=csv_suite(table, {"external-b": 10}))
    assert probes.verify_eval(folder)["ok"]
    monkeypatch.setattr(score, "verify", accept_contained)
    monkeypatch.setattr(score, "extract", lambda text: text)
    found = probes.verify_eval(folder)["splits"]["external-b"]["probes"]
    assert not found["truncated"]["ok"] and not found["gold-leak"]["ok"] and found["gold"]["ok"]


def test_a_suite_that_one_answer_solves_is_caught(tmp_path):
    table = tmp_path / "target.csv"
    table.write_text("id,prompt,answer\n" + "".join(f"r{n},question {n},{'yes' if n % 4 else n}\n" for n in range(40)))
    found = probes.verify_eval(frozen(tmp_path / "judge", external=csv_suite(table, {"external-b": 20})))
    external = found["splits"]["external-b"]["probes"]
    assert not found["ok"] and not external["constant"]["ok"] and external["planted-wrong"]["ok"]
    assert external["shuffled-gold"]["ok"], "answers that are alike may be dealt to one another"


@pytest.mark.parametrize(("mean", "ok"), [(0.6, True), (0.99, False)])
def test_no_headroom_is_told(nano, mean, ok):
    means = {split: dict.fromkeys(FAMILIES, mean) for split in ("dev-b", "external-b")}
    (nano / "origin.json").write_text(json.dumps({"means": means}))
    judge = load_judge(nano).replace(origin={"file": "origin.json", "sha256": "0", "seeds": tuple(range(8))})
    found = probes.headroom(judge, nano)["dev-b"]
    assert found["ok"] == ok and found["left"] == pytest.approx(1 - mean)
    assert found["saturated"] == ([] if ok else sorted(FAMILIES))


def test_planted_answers_are_wrong_and_differ():
    judge_items = [*_items("7", "7.01", "7", "x"), *_items("same", "same")]
    assert probes.wrong_answers(judge_items)[:4] == ["x", "x", "x", "7"]
    assert probes.wrong_answers(judge_items[4:]) == ["not same at all"] * 2
    assert probes.dealt(judge_items)[:4] == ["7.01", "7", "x", "7"]


def _items(*answers):
    family = "+".join(answers)
    return [
        probes.Item(id=f"{family}{n}", prompt="?", answer=answer, family=family, subfamily=family)
        for n, answer in enumerate(answers)
    ]


def test_the_process_tells_scores_and_no_item(nano):
    argv = [sys.executable, "-m", "megatron_evolve.eval.probes", "--judge"]
    done = subprocess.run([*argv, str(nano)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    secrets = [item.prompt for item in load_judge(nano).items("external-b", probes.PROBE_ROUND)]
    assert not any(prompt in done.stdout for prompt in secrets)
    done = subprocess.run([*argv, str(nano / "none")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "expected a frozen judge" in done.stderr and done.stderr.count("\n") == 1
