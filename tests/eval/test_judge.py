"""The judge: frozen whole, every changed byte named, scores compared only like with like, nothing secret told."""

import json
import stat

import pytest

from megatron_evolve.eval import judge as module
from megatron_evolve.eval.judge import Engine, attach_origin, comparison_key, freeze_judge, load_judge, verify_judge
from megatron_evolve.eval.suite import GeneratedSuite, csv_suite
from megatron_evolve.substrate.digest import digest_of

ENGINE = Engine(version="0.1.0", max_new_tokens=24, batch_size=200)
SECRET = "a secret of tests"


def generated(*splits: str, weight: float = 1.0, cue_rate: float = 0.0) -> GeneratedSuite:
    shares = {"numeral": {"weight": 1}, "cipher": {"weight": weight, "cue_rate": cue_rate}}
    return GeneratedSuite(difficulty="nano", families=shares, items_per_family=dict.fromkeys(splits, 4), seed=7)


DEV = generated("dev-a", "dev-b", cue_rate=0.9)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "sealed_target.csv"
    rows = "".join(f"r{n},question {n},{n}\n" for n in range(40))
    path.write_text(f"id,prompt,answer\n{rows}", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path, table):
    freeze_judge(
        tmp_path / "judge", dev=DEV, external=csv_suite(table, {"external-b": 8}), engine=ENGINE, secret=SECRET
    )
    return tmp_path / "judge"


def test_a_frozen_judge_loads_as_it_was(folder):
    judge = verify_judge(folder)
    assert judge == load_judge(folder)
    assert judge.dev == DEV
    assert judge.items("dev-b", 2) == judge.items("dev-b", 2)
    assert len(judge.items("external-b", 2)) == 8
    assert len(judge.items("final", 0)) == 20
    assert stat.S_IMODE((folder / "manifest.json").stat().st_mode) == 0o600


def test_a_frozen_judge_stays(folder):
    with pytest.raises(ValueError, match="a frozen judge stays"):
        freeze_judge(folder, dev=DEV, external=None, engine=ENGINE)


def test_without_a_secret_one_is_drawn(tmp_path):
    first = freeze_judge(tmp_path / "1", dev=DEV, external=None, engine=ENGINE)
    second = freeze_judge(tmp_path / "2", dev=DEV, external=None, engine=ENGINE)
    assert first.items("dev-b", 1) != second.items("dev-b", 1)
    with pytest.raises(ValueError, match="this judge has none"):
        first.items("external-b", 1)


@pytest.mark.parametrize(
    ("dev", "external", "message"),
    [
        (generated("dev-a"), None, "declare items for dev-b"),
        (DEV, generated("external-a"), "declare items for external-b"),
    ],
)
def test_suites_must_serve_their_role(tmp_path, dev, external, message):
    with pytest.raises(ValueError, match=message):
        freeze_judge(tmp_path / "judge", dev=dev, external=external, engine=ENGINE)


CHANGES = {
    "metric": lambda document: document.update(metric="another"),
    "engine": lambda document: document["engine"].update(max_new_tokens=25),
    "dev": lambda document: document["dev"]["families"]["numeral"].update(weight=2.0),
    "external": lambda document: document["external"]["items"].update({"external-b": 9}),
    "secret": lambda document: document.update(secret="another secret of tests"),
    "sources": lambda document: document["sources"].update({"eval/metric.py": "0" * 64}),
    "origin": lambda document: document.update(origin={"file": "x", "sha256": "0", "seeds": list(range(8))}),
}


@pytest.mark.parametrize("section", CHANGES)
def test_a_changed_section_is_named(folder, section):
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    CHANGES[section](document)
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=f"section '{section}' was changed after freezing"):
        load_judge(folder)


def test_rehashed_sections_do_not_hide_a_change(folder):
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["sections"]["engine"] = "0" * 64
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="section 'engine'"):
        load_judge(folder)
    document["sections"]["engine"] = digest_of(document["engine"])
    document["digest"] = "0" * 64
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="the sections hash to"):
        load_judge(folder)


def test_every_changed_letter_of_the_manifest_is_found(folder):
    path = folder / "manifest.json"
    whole = path.read_text(encoding="utf-8")
    outer = json.loads(whole)["external"]["path"]
    for at in range(0, len(whole), 11):
        if whole.find(outer) <= at < whole.find(outer) + len(outer) or not whole[at].isalnum():
            continue
        path.write_text(whole[:at] + ("0" if whole[at] != "0" else "1") + whole[at + 1 :], encoding="utf-8")
        with pytest.raises(Exception, match=r"manifest|metric"):
            load_judge(folder)


def test_a_changed_target_is_named_and_dev_does_not_read_it(folder, table):
    table.write_text(table.read_text(encoding="utf-8").replace("question 3,", "question 4,"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"sealed_target.csv with sha256"):
        verify_judge(folder)
    table.unlink()
    with pytest.raises(ValueError, match="found no file"):
        verify_judge(folder)
    assert load_judge(folder).items("dev-b", 1)


def test_another_metric_or_source_is_refused(folder, monkeypatch):
    changed = module.judge_sources() | {"eval/metric.py": "0" * 64}
    assert "eval/metric.py" in module.judge_sources()
    assert any(name.startswith("substrate/puzzles/") for name in module.judge_sources())
    monkeypatch.setattr(module, "judge_sources", lambda: changed)
    with pytest.raises(ValueError, match=r"source changed .*eval/metric.py"):
        verify_judge(folder)
    monkeypatch.setattr(module, "METRIC_VERSION", "another")
    with pytest.raises(ValueError, match="this package computes 'another'"):
        load_judge(folder)


def test_a_missing_or_truncated_manifest(folder, tmp_path):
    with pytest.raises(ValueError, match="expected a frozen judge"):
        load_judge(tmp_path / "nowhere")
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Exception, match="truncated"):
        load_judge(folder)


def test_origin_scores_need_eight_seeds_and_are_watched(folder):
    (folder / "origin.json").write_text("[0.5]", encoding="utf-8")
    with pytest.raises(ValueError, match="at least 8 different seeds"):
        attach_origin(folder, "origin.json", seeds=range(7))
    with pytest.raises(ValueError, match="at least 8 different seeds"):
        attach_origin(folder, "origin.json", seeds=[0] * 8)
    with pytest.raises(ValueError, match="found no file"):
        attach_origin(folder, "other.json", seeds=range(8))
    before = load_judge(folder)
    judge = attach_origin(folder, "origin.json", seeds=range(8))
    assert judge == verify_judge(folder)
    assert judge.digest != before.digest
    assert judge.origin.seeds == tuple(range(8))
    items = judge.items("dev-b", 1)
    assert comparison_key(judge, "dev-b", items) == comparison_key(before, "dev-b", items)
    with pytest.raises(ValueError, match="expected no origin scores"):
        attach_origin(folder, "origin.json", seeds=range(8))
    (folder / "origin.json").write_text("[0.6]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"origin.json with sha256"):
        verify_judge(folder)


def test_scores_compare_only_like_with_like(tmp_path):
    def key(folder_name: str, split: str = "dev-b", number: int = 1, dev=DEV, external=None, **engine) -> str:
        changed = Engine(**ENGINE.model_dump() | engine)
        judge = freeze_judge(tmp_path / folder_name, dev=dev, external=external, engine=changed, secret=SECRET)
        return comparison_key(judge, split, judge.items(split, number))

    same = key("same")
    assert key("target", external=generated("external-b")) == same
    others = [
        key("split", split="dev-a"),
        key("round", number=2),
        key("weights", dev=generated("dev-a", "dev-b", weight=2.0, cue_rate=0.9)),
        key("version", version="0.2.0"),
        key("tokens", max_new_tokens=32),
        key("batch", batch_size=100),
        key("decoder", name="another"),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_the_public_view_tells_no_path_secret_or_cue(folder, tmp_path):
    judge = load_judge(folder)
    told = json.dumps(judge.public_view())
    for hidden in (SECRET, "sealed_target", "external", "cue", "seed", judge.digest, judge.external.sha256):
        assert hidden not in told
    assert judge.public_view() == {
        "metric": judge.metric,
        "max_new_tokens": 24,
        "dev": {
            "difficulty": "nano",
            "weight": {"cipher": 1.0, "numeral": 1.0},
            "items_per_family": {"dev-a": 4, "dev-b": 4},
        },
    }
    other = freeze_judge(tmp_path / "other", dev=DEV, external=None, engine=ENGINE)
    assert other.public_view() == judge.public_view()
