"""Deltas: resolved against a base, refused with a reason, one canonical form for one change."""

import pytest

from megatron_evolve.candidate import candidate_id, run_seed
from megatron_evolve.delta import Delta, canonical_change, resolve
from megatron_evolve.document import load_yaml, parse_yaml
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings

FAMILIES = ("red", "green", "blue")
BASE = Settings(mix=Mix(weight=dict.fromkeys(FAMILIES, 1), style=dict.fromkeys(FAMILIES, "answer")), recipe=Recipe())


def delta(**change: dict) -> Delta:
    changes = {path.replace("__", "."): value for path, value in change.items()}
    return Delta.parse({"hypothesis": "because", "change": changes}, where="delta")


def test_scale_and_set_resolve_against_the_base() -> None:
    change = delta(mix__weight__red={"scale": 2.0}, recipe__lr={"scale": 0.5}, recipe__steps={"set": 90})
    resolved = resolve(BASE, change)
    assert resolved.mix.weight == pytest.approx({"red": 0.5, "green": 0.25, "blue": 0.25})
    assert resolved.recipe.lr == BASE.recipe.lr / 2
    assert resolved.recipe.steps == 90


def test_an_integer_is_a_number_for_a_float_and_a_whole_float_for_an_integer() -> None:
    change = delta(recipe__lr={"set": 1}, recipe__steps={"set": 90.0}, recipe__adapter={"set": {"rank": 4, "alpha": 8}})
    resolved = resolve(BASE, change).recipe
    assert (resolved.lr, resolved.steps, resolved.adapter.alpha) == (1.0, 90, 8.0)


def test_scaling_back_gives_the_same_candidate() -> None:
    there = resolve(BASE, delta(mix__weight__red={"scale": 2.0}))
    back = resolve(there, delta(mix__weight__red={"scale": 0.5}))
    assert canonical_change(BASE, back) == {}
    assert canonical_change(BASE, there)["mix.weight.red"]["to"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe.lr": {"set": 0.003}}, "the delta changes nothing"),
        ({"mix.weight.red": {"scale": 1.0}}, "the delta changes nothing"),
        ({"recipe.lrr": {"set": 1}}, "did you mean recipe.lr"),
        ({"mix.weight.rde": {"set": 1}}, "did you mean mix.weight.red"),
        ({"recipe.lr": {"set": 7}}, "less than or equal to 1"),
        ({"recipe.schedule": {"scale": 2}}, "can't be scaled"),
        ({"recipe.adapter.rank": {"set": 4}}, "unknown setting 'recipe.adapter.rank'"),
        ({"mix.difficulty": {"set": "challenge"}}, "outside the mutation space"),
        ({f"mix.weight.{name}": {"set": 0} for name in FAMILIES}, "nothing to train on"),
        ({"recipe.lr": {"set": True}}, "recipe.lr: expected a number, got True; write"),
        ({"recipe.steps": {"set": "90"}}, "recipe.steps: expected a number, got '90'"),
        ({"mix.weight.red": {"set": "0.001"}}, "mix.weight.red: expected a number, got '0.001'"),
        ({"recipe.adapter": {"set": {"rank": True, "alpha": 8}}}, "recipe.adapter.rank: expected a number, got True"),
    ],
)
def test_refusals_say_why(change: dict, says: str) -> None:
    parsed = Delta.parse({"hypothesis": "because", "change": change}, where="delta")
    with pytest.raises(ValueError, match=says):
        resolve(BASE, parsed, ("mix.weight.*", "mix.style.*", "recipe.*"))


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"hypothesis": "x"}, "change is missing"),
        ({"hypothesis": "x", "change": {}}, "at least 1 item"),
        ({"hypothesis": "x", "change": {"recipe.lr": {"set": 1, "scale": 2}}}, "exactly one of `set` and `scale`"),
        (
            {"hypothesis": "x", "change": {"recipe.lr": {"set": 1e-3}}, "predict": {"dev": [0.05, 0.01]}},
            "predict: dev is an interval",
        ),
        (
            {"hypothesis": "x", "change": {"recipe.lr": {"set": 1e-3}}, "predict": {"external": [0, -0.1]}},
            "write the lower number first",
        ),
        ({"hypothesis": "x", "chnage": {}}, "unknown key 'chnage'; did you mean change"),
        ({"hypothesis": "x", "change": {"recipe.lr": {"scale": -1}}}, "greater than 0"),
    ],
)
def test_malformed_documents(document: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        Delta.parse(document, where="delta.yaml")
    assert str(refusal.value).count("got") <= 1, "a sentence that is whole gets no other behind it"


def test_yaml_reads_a_learning_rate_as_people_write_it(tmp_path) -> None:
    assert parse_yaml("lr: 1e-5\nx: -2E+3", where="t") == {"lr": 1e-5, "x": -2000.0}
    path = tmp_path / "delta.yaml"
    path.write_text("hypothesis: slower\nchange:\n  recipe.lr: {set: 1e-5}\n")
    assert resolve(BASE, Delta.parse(load_yaml(path), where="t")).recipe.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "not valid YAML in line"),
        ("a: 1\na: 2", "stands twice"),
        ("- 1", "keys and values"),
        ("", "empty"),
        ("? {a: 1}\n: 2", "line 1: expected a single value as key"),
        ("a: {[b]: 2}", "line 1: expected a single value as key"),
        ("a: " + "[" * 5000 + "]" * 5000, "nest them less"),
        ("schema: 2024-99-99", "month must be in 1..12; fix or quote the value"),
        ("a: " + "9" * 6000, "6000 digits; fix or quote the value"),
        ('a: 1\nb: "x\\ud800y"', "line 2: expected whole characters, got half of a surrogate pair"),
        ("a: !!bool x", "a value that its tag has none of; fix or quote the value"),
    ],
)
def test_malformed_yaml(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        parse_yaml(text, where="t.yaml")
    assert str(refusal.value).startswith("t.yaml: ") and len(str(refusal.value)) < 200


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.system ['true']", where="t")


def test_missing_file_is_one_sentence(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")


def test_the_seed_is_not_in_a_candidates_name_and_runs_differ() -> None:
    name = candidate_id("s" * 64, BASE)
    assert name == candidate_id("s" * 64, BASE)
    assert name != candidate_id("t" * 64, BASE)
    seeds = {run_seed(1, number, name, index) for number in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)
