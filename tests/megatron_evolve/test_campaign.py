"""Campaign files: the shipped ones hold, a wrong one is one sentence."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_evolve.artefacts import CampaignFolder, save_yaml
from megatron_evolve.campaign import SHIPPED, Campaign, Training, find_campaign, load_campaign, plan_of
from megatron_evolve.candidate import candidate
from megatron_evolve.cli import app
from megatron_evolve.document import load_yaml
from megatron_evolve.jobs import Ground, Run
from megatron_evolve.placement import Placement
from megatron_evolve.prepare import PACKED, origin_ground
from megatron_evolve.schema import describe, json_schema
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.settings import Settings


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_campaigns_are_valid_and_survive_saving(path: Path, tmp_path: Path) -> None:
    campaign = Campaign.parse(load_yaml(path), where=str(path))
    digest = save_yaml(tmp_path / "campaign.yaml", campaign)
    again = Campaign.parse(load_yaml(tmp_path / "campaign.yaml"), where="copy")
    assert digest_of(again.model_dump(mode="json", by_alias=True)) == digest
    assert plan_of(campaign)["runs"] > 0


def test_an_operator_opens_the_sealed_half_unless_the_campaign_must_end_by_itself() -> None:
    shipped = {path.stem: Campaign.parse(load_yaml(path), where=str(path)) for path in SHIPPED.glob("*.yaml")}
    by_itself = {name for name, campaign in shipped.items() if campaign.open_final == "at-end"}
    assert by_itself == {"demo", "control", "challenge-cpu"}
    document = yaml.safe_load((SHIPPED / "demo.yaml").read_text())
    del document["open_final"]
    assert Campaign.parse(document, where="campaign.yaml").open_final == "by-operator"


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


LR = {"name": "lr", "operator": "lr"}


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([LR | {"name": "lr.fast"}], r"search.axes.0.name: .*match pattern .*, got 'lr.fast'"),
        ([LR, LR], "search.axes: axes need different names, got lr, lr; rename one"),
        ([LR, {"name": "stack", "operator": "steps"}], "the name stack is kept for .*, got one of operator steps"),
        ([LR, {"name": "selection", "operator": "lr"}], "the name selection is kept for"),
        ([], "needs an open axis beside stack and selection, .*, got no axis; add one"),
        ([{"name": "combine", "operator": "stack"}], "needs an open axis .*, got combine; add one"),
        ([{"name": "selection", "operator": "selection"}], "needs an open axis .*, got selection; add one"),
        ([LR | {"retired": "no"}, {"name": "stack", "operator": "stack"}], r"got lr \(retired\), stack; add one"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_axes_that_would_end_the_search_are_refused_before_anything_is_made(
    axes: list, says: str, more: tuple, tmp_path: Path
) -> None:
    document = yaml.safe_load((SHIPPED / "demo.yaml").read_text())
    document |= {"search": {"axes": axes}, "substrate": {"path": str(tmp_path / "none")}}
    file = tmp_path / "campaign.yaml"
    file.write_text(yaml.safe_dump(document))
    place = ["--dir", str(tmp_path / "run"), "--store", str(tmp_path / "store")]
    done = CliRunner().invoke(app, ["run", str(file), *place, *more])
    assert done.exit_code == 1 and re.search(says, done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["campaign.yaml"]


def test_axes_of_an_operators_own_names_are_taken() -> None:
    axes = [LR | {"name": "lr-fast_2"}, {"name": "stack", "operator": "stack"}]
    document = yaml.safe_load((SHIPPED / "demo.yaml").read_text()) | {"search": {"axes": axes}}
    assert [axis.name for axis in Campaign.parse(document, where="c").search.axes] == ["lr-fast_2", "stack"]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="pathlib leaves such a path as it is")
@pytest.mark.parametrize("option", ["--dir", "--store", "--external"])
def test_links_that_lead_round_in_a_circle_are_one_sentence(option: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    words = {"--dir": tmp_path / "run", "--store": tmp_path / "store", option: tmp_path / "loop"}
    name = "challenge-cpu" if option == "--external" else "demo"
    done = CliRunner().invoke(app, ["run", name, "--dry-run", *(str(part) for pair in words.items() for part in pair)])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.exception
    assert f"cannot follow {tmp_path / 'loop'}" in done.stderr


def test_a_folder_without_a_campaign_is_told_in_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 1 and done.stderr.startswith(f"megatron-evolve: {tmp_path} holds no campaign: expected")
    assert done.stderr.count("expected") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["delta", "policy", "constitution", "campaign", "site"])
def test_schemas_give_every_field_a_meaning(name: str) -> None:
    assert json_schema(name)["properties"]
    assert "recipe.lr  number" in describe("delta")
    for line in describe(name).splitlines()[2:]:
        assert "  (" in line or not line or line.startswith("paths"), line


def test_training_on_several_ranks_is_a_setting_of_the_place() -> None:
    spread = Training.parse({"ranks": 4, "layout": {"tp": 2}, "micro_rows": 8}, where="launch")
    assert spread.options == ("--layout", "tp=2", "--micro-rows", "8")
    assert Training().options == ()
    assert Training(experts="eager").options == ("--experts", "eager")
    assert Training(micro_rows=1, packed=True).options == ("--micro-rows", "1", "--packed")
    assert Training(packed=True, tensorboard=True).options == ("--packed", "--tensorboard")
    assert Training(recompute="full").options == ("--recompute", "full")
    assert Training(layers="transformer-engine").options == ("--layers", "transformer-engine")
    with pytest.raises(ValueError, match="layout tp=2 runs on a multiple of 2 ranks; got 3"):
        Training.parse({"ranks": 3, "layout": {"tp": 2}}, where="launch")
    with pytest.raises(ValueError, match="packed rows lie whole on a rank; got cp=2"):
        Training.parse({"ranks": 2, "layout": {"cp": 2}, "packed": True}, where="launch")


def test_an_origin_trained_on_packed_rows_is_kept_apart(tmp_path: Path) -> None:
    padded, packed = (
        origin_ground(tmp_path / "s" / "substrate", tmp_path / name / "judge", 60.0).folder.root
        for name in ("abc", f"abc{PACKED}")
    )
    assert (padded.name, packed.name) == ("origin", "origin-packed") and padded.parent == packed.parent


def test_a_job_of_several_ranks_is_torchrun_s_and_takes_as_many_cores(tmp_path: Path) -> None:
    settings = Settings.parse({"mix": {"weight": {"a": 1}, "style": {"a": "answer"}}, "recipe": {}}, where="settings")
    placement = Placement(Training(ranks=2, layout=Layout(ep=2)))
    ground = Ground(CampaignFolder(tmp_path), tmp_path, tmp_path, 60.0, placement=placement)
    run = Run(1, candidate("s" * 64, settings), seed=1)
    train, score = ground.job(run, "train"), ground.job(run, "dev")
    assert train.argv[1:6] == ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    assert train.argv[-2:] == ("--layout", "ep=2") and train.resources.cores == 2
    assert "torch.distributed.run" not in score.argv and score.resources.cores == 1
