"""Campaign files: the shipped ones hold, a wrong one is one sentence."""

from pathlib import Path

import pytest
import yaml

from megatron_evolve.artefacts import save_yaml
from megatron_evolve.campaign import SHIPPED, Campaign, find_campaign, load_campaign, plan_of
from megatron_evolve.document import load_yaml
from megatron_evolve.schema import describe, json_schema
from megatron_evolve.substrate.digest import digest_of


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_campaigns_are_valid_and_survive_saving(path: Path, tmp_path: Path) -> None:
    campaign = Campaign.parse(load_yaml(path), where=str(path))
    digest = save_yaml(tmp_path / "campaign.yaml", campaign)
    again = Campaign.parse(load_yaml(tmp_path / "campaign.yaml"), where="copy")
    assert digest_of(again.model_dump(mode="json", by_alias=True)) == digest
    assert plan_of(campaign)["runs"] > 0


def test_names_and_paths(tmp_path: Path) -> None:
    assert find_campaign("demo") == SHIPPED / "demo.yaml"
    with pytest.raises(ValueError, match="did you mean demo"):
        find_campaign("dmeo")


def test_external_csv_is_asked_for_and_only_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs its external target: add --external"):
        load_campaign(SHIPPED / "challenge-cpu.yaml")
    with pytest.raises(ValueError, match="leave --external out"):
        load_campaign(SHIPPED / "demo.yaml", external=tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"claim": "performance", "comparator": None}, "a performance claim needs a comparator"),
        ({"roundz": 3}, "unknown key 'roundz'"),
        ({"name": "a b"}, "name"),
        ({"constitution": {"anchor_seeds": 0}}, "greater than or equal to 1"),
        ({"constitution": {"anchr_seeds": 3}}, "did you mean anchor_seeds"),
    ],
)
def test_wrong_campaigns(change: dict, says: str) -> None:
    document = yaml.safe_load((SHIPPED / "demo.yaml").read_text()) | change
    with pytest.raises(ValueError, match=says):
        Campaign.parse(document, where="campaign.yaml")


@pytest.mark.parametrize("name", ["delta", "policy", "constitution", "campaign"])
def test_schemas_give_every_field_a_meaning(name: str) -> None:
    assert json_schema(name)["properties"]
    assert "recipe.lr  number" in describe("delta")
    for line in describe(name).splitlines()[2:]:
        assert "  (" in line or not line or line.startswith("paths"), line
