"""Real campaigns before they run: every script and figure, without torch, weights or a byte written; or one sentence.

The figures are held against a second way to them: counts written out here, and the plan's operations by hand.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve import preflight as preflight_module
from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import SHIPPED, Campaign, load_campaign
from megatron_evolve.candidate import candidate, run_seed
from megatron_evolve.desk import Stopped
from megatron_evolve.doctor import gpu_names
from megatron_evolve.document import load_yaml
from megatron_evolve.dry_run import dry_run
from megatron_evolve.launch.job import Job, Resources
from megatron_evolve.loop import Session, launcher_of, run_campaign
from megatron_evolve.placement import Placement
from megatron_evolve.preflight import check_campaign, preflight
from megatron_evolve.site import Site, chosen_site, find_site, load_site
from megatron_evolve.substrate.exchange import imported_default
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.manifest import Construction, sealed, write_manifest
from megatron_evolve.substrate.model.architecture import PRESETS
from megatron_evolve.substrate.operations import Machine
from tests.megatron_evolve import tiny

BOTH = {"mamba_ssm": "2.3", "causal_conv1d": "1.6"}
REAL = ("nemotron3-nano-lora", "nemotron3-super-lora", "nemotron3-ultra-infrastructure")
NODE, CLUSTER = load_site(find_site("h100-node")), load_site(find_site("h100-slurm"))

# GPUs of a run; training runs of origin, rounds (anchors + explorers + confirmations) and end; scoring jobs; looks
COUNTS = {
    "nemotron3-nano-lora": (8, (8, 4 * (3 + 7 + 2), 3), (8 * 3, 4 * 12 * 3, 3 + 8 + 3), (16, 71)),
    "nemotron3-super-lora": (16, (8, 4 * (3 + 7 + 2), 3), (8 * 3, 4 * 12 * 3, 3 + 8 + 3), (16, 71)),
    "nemotron3-ultra-infrastructure": (32, (8, 2 * (2 + 3 + 1), 2), (8 * 3, 2 * 6 * 3, 2 + 8), (8, 16)),
}


def real(name: str, **training: Any) -> Campaign:
    campaign = Campaign.parse(load_yaml(SHIPPED / f"{name}.yaml"), where=name)
    spread = campaign.launch.training.replace(**training)
    return campaign.replace(launch=campaign.launch.replace(training=spread))


def step(told: dict[str, Any], start: str) -> dict[str, Any]:
    return next(one for one in told["steps"] if one["what"].startswith(start))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the command says of each shipped campaign, in a process that cannot import torch, from an empty folder."""
    place = tmp_path_factory.mktemp("nothing")
    program = (
        "import sys, contextlib, io, json\n"
        "for name in ('torch', 'megatron', 'transformers', 'triton'): sys.modules[name] = None\n"
        "from typer.testing import CliRunner\n"
        "from megatron_evolve.cli import app\n"
        f"for name in {REAL!r}:\n"
        "    done = CliRunner().invoke(app, ['run', name, '--dry-run', '--store', 'store', '--json'])\n"
        "    assert done.exit_code == 0, done.output\n"
        "    print(json.dumps(json.loads(done.stdout)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=place, env=tiny.environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(place.iterdir()) == []
    return dict(zip(REAL, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", REAL)
def test_counts_hours_and_looks(name: str, told: dict[str, dict[str, Any]]) -> None:
    gpus, training, scoring, looks = COUNTS[name]
    use = told[name]["use"]
    assert [phase["training_runs"] for phase in use["phases"]] == list(training)
    assert [phase["scoring_jobs"] for phase in use["phases"]] == list(scoring)
    assert use["total"]["training_runs"] == sum(training)
    assert (use["looks_a_round"], use["external_looks"]) == looks
    run = use["run"]
    assert (run["gpus"], run["tokens"]) == (gpus, 240 * 32 * 8192)
    seconds = run["tokens"] * run["gflop_a_token"] * 1e9 / (0.05 * 989e12)
    assert run["gpu_hours_assumed"] == pytest.approx(seconds / 3600)
    assert use["total"]["training_gpu_hours_assumed"] == pytest.approx(sum(training) * seconds / 3600)
    assert run["hours_assumed"] < run["hours_limit"]
    limit = run["hours_limit"] * (sum(training) * gpus + sum(scoring) * use["scoring"]["gpus"])
    assert use["total"]["gpu_hours_limit"] == pytest.approx(limit)
    assert told[name]["layout"]["fits"] and told[name]["layout"]["gpus"] == gpus


def test_one_node_starts_its_ranks_with_torchrun(told: dict[str, dict[str, Any]]) -> None:
    found = told["nemotron3-nano-lora"]
    train, score = step(found, "train"), step(found, "score on dev")
    assert train["argv"][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8"]
    assert train["argv"][train["argv"].index("--layout") + 1] == "ep=8" and "--exclude" in train["argv"]
    assert "64 cores, 8 GPUs" in train["script"] and shlex.join(train["argv"]) in train["script"]
    assert "16 cores, 2 GPUs" in score["script"] and "torch.distributed.run" not in score["argv"]
    assert [one["times"] for one in found["steps"] if one["what"].startswith("score")] == [56, 56, 56, 11, 3]
    vllm = step(found, "the judge's engine")["argv"]
    assert vllm[:3] == ["vllm", "serve", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]
    assert vllm[vllm.index("--lora-modules") + 1] == "{run}={adapter}" and "{port}" in vllm
    imported = step(found, "import the substrate")
    assert imported["argv"][:4] == ["megatron-evolve", "substrate", "import-hf", "DIR"]
    assert imported["argv"][-1] == found["substrate"]["folder"] and found["substrate"]["digest"] is None
    assert any("--external" in note for note in found["notes"])


def test_the_script_for_a_run_by_hand_starts_the_same_ranks(told: dict[str, dict[str, Any]]) -> None:
    argv = step(told["nemotron3-nano-lora"], "train")["argv"]
    own = argv[argv.index("--substrate") :]
    own = own[: own.index("--layout")] + own[own.index("--layout") + 2 :]
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    env = tiny.environment(PYTHON="echo")  # it says the words that it would start Python with
    said = subprocess.run(["sh", script, "8", "ep=8", *own], env=env, capture_output=True, text=True, check=True)
    check, start = said.stdout.splitlines()
    assert sorted(start.split()) == sorted(argv[1:])
    assert check.endswith(" --check 8")


def test_several_nodes_start_their_ranks_with_srun(told: dict[str, dict[str, Any]]) -> None:
    for name, nodes, minutes in (("nemotron3-super-lora", 2, 360), ("nemotron3-ultra-infrastructure", 4, 600)):
        train = step(told[name], "train")
        for line in (f"--nodes={nodes}", "--ntasks-per-node=8", "--gpus-per-node=8", f"--time={minutes + 2}"):
            assert f"#SBATCH {line}\n" in train["script"]
        assert (" --recompute selective" in train["script"]) == ("ultra" in name)
        assert "\n    srun --kill-on-bad-exit=1 " in train["script"] and "torch.distributed.run" not in train["argv"]
        assert shlex.join(train["argv"]) in train["script"]
    served = step(told["nemotron3-super-lora"], "score on dev")["script"]
    assert "--gpus-per-node=8\n" in served and "srun" not in served
    asked = told["nemotron3-ultra-infrastructure"]
    assert "--gpus-per-node" not in step(asked, "score on dev")["script"]
    assert not any(one["what"].startswith("the judge's engine") for one in asked["steps"])


def test_a_site_places_the_engine_and_the_queue(tmp_path: Path) -> None:
    hub = "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"
    site = CLUSTER.replace(models={hub: "/models/super"}, vllm="/opt/vllm", slurm={"account": "me", "qos": "long"})
    found = dry_run(real("nemotron3-super-lora"), tmp_path / "run", site, tmp_path / "store")
    assert step(found, "the judge's engine")["argv"][:3] == ("/opt/vllm", "serve", "/models/super")
    assert "#SBATCH --account=me\n#SBATCH --qos=long\n" in step(found, "train")["script"]


def imported(store: Path, **shapes: Any) -> str:
    """A manifest as import-hf writes it, of nano's shapes; no weights beside it. Its digest."""
    size = PRESETS["nemotron3-nano"].model_copy(update={"max_sequence_length": 1 << 20, **shapes})
    fields = {"name": "nemotron3-nano", "architecture": size.model_dump(mode="json"), "build": {}, "trainer": {}}
    pool = Construction(families=("numeral",), difficulty="challenge", styles={})
    frozen = sealed({**fields, "construction": pool, "default": imported_default(size), "files": {}})
    folder = store / "imported" / "nemotron3-nano"
    folder.mkdir(parents=True)
    write_manifest(folder, frozen)
    return frozen.digest


def test_a_job_is_told_of_threads_by_where_it_runs(told: dict[str, dict[str, Any]]) -> None:
    """On GPUs Megatron may compile, and a rank has its site's cores; what only asks a server has one, as on cores."""
    alone = "# It runs: OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "
    for name in REAL:
        for what in ("train", "score on dev"):
            script = step(told[name], what)["script"]
            on_gpus = what == "train" or "ultra" not in name
            assert ("OMP_NUM_THREADS=8" in script, "TORCHDYNAMO_DISABLE" in script) == (on_gpus, not on_gpus)
    assert alone in step(told["nemotron3-ultra-infrastructure"], "score on dev")["script"]
    demo = Campaign.parse(load_yaml(SHIPPED / "demo.yaml"), where="demo")
    assert Placement.of(demo, Site()).environment(trains=True) == {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    assert Placement.of(demo, NODE.replace(cores_per_gpu=4)).environment(trains=True) == {"OMP_NUM_THREADS": "4"}


def test_an_imported_substrate_gives_the_real_names(tmp_path: Path) -> None:
    digest = imported(tmp_path / "store")
    campaign = real("nemotron3-nano-lora")
    found = dry_run(campaign, tmp_path / "run", NODE, tmp_path / "store")
    anchor = candidate(digest, imported_default(PRESETS["nemotron3-nano"]))
    train = step(found, "train")["argv"]
    assert found["substrate"]["digest"] == digest
    assert train[train.index("--seed") + 1] == str(run_seed(campaign.seed, 1, anchor.id, 0))
    assert train[train.index("--candidate") + 1] == str(tmp_path / "run" / "rounds/1" / anchor.id / "candidate.json")
    assert not any(one["what"].startswith("import") for one in found["steps"])


def test_what_is_no_preset_or_not_its_own_is_refused(tmp_path: Path) -> None:
    campaign = real("nemotron3-nano-lora")
    for spec, says in (
        ({"preset": "nemotron3-nono"}, "no preset 'nemotron3-nono'; did you mean nemotron3-nano"),
        ({"preset": "nemotron3-nano", "cue_rate": {"equation": 0.9}}, "cue_rate is for a preset that is built"),
        ({"path": str(tmp_path)}, "is no frozen substrate"),
    ):
        with pytest.raises(ValueError, match=says):
            preflight(campaign.replace(substrate=spec), NODE, tmp_path)


def test_another_size_under_the_name_is_refused(tmp_path: Path) -> None:
    imported(tmp_path, num_experts=64)
    with pytest.raises(ValueError, match="is no nemotron3-nano: it has num_experts 64 instead of 128"):
        preflight(real("nemotron3-nano-lora"), NODE, tmp_path)


def test_a_clamp_that_the_judge_would_leave_out_is_refused(tmp_path: Path) -> None:
    imported(tmp_path, dt_min=1e-3)
    with pytest.raises(
        ValueError, match=r"training clamps the Mamba step at 0\.001, and the servers .* --dt-min 0, or"
    ):
        preflight(real("nemotron3-nano-lora"), NODE, tmp_path)


@pytest.mark.parametrize(
    ("name", "training", "says"),
    [
        ("nemotron3-nano-lora", {"layout": Layout()}, "does not fit 8 GPUs of 80GB .* needs 95.8 GB of 80"),
        ("nemotron3-nano-lora", {"layout": Layout(ep=8, etp=2), "ranks": 16}, "this one machine has 8"),
        ("nemotron3-super-lora", {"layout": Layout(ep=8), "ranks": 24}, "must be a multiple of the 24 data-parallel"),
        ("nemotron3-super-lora", {"layout": Layout(ep=4), "ranks": 12}, "must fill whole nodes of 8 GPUs; .* has 12"),
        # Ultra in a layout that needs its recompute, without it; and on half of its GPUs, which no layout fits.
        (
            "nemotron3-ultra-infrastructure",
            {"layout": Layout(tp=8, pp=2, ep=16), "recompute": "none"},
            r"needs 8\d\.\d GB of 80",
        ),
        (
            "nemotron3-ultra-infrastructure",
            {"layout": Layout(tp=8, pp=2, ep=8), "ranks": 16},
            r"needs 91\.\d GB of 80",
        ),
    ],
)
def test_layouts_that_do_not_fit(name: str, training: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        preflight(real(name, **training), NODE if "nano" in name else CLUSTER, tmp_path)


def test_a_site_without_mamba_ssm_is_planned_with_what_its_scan_keeps(tmp_path: Path) -> None:
    bare = NODE.replace(mamba_scan="pytorch")
    with pytest.raises(ValueError, match=r"needs 9\d\.\d GB of 80: activations"):
        preflight(real("nemotron3-nano-lora"), bare, tmp_path)
    again = preflight(real("nemotron3-nano-lora", recompute="full"), bare, tmp_path)
    assert again.plan.fits and again.job.scan == "pytorch" and again.job.recompute == "full"


@pytest.mark.parametrize("name", REAL)
def test_the_same_layout_on_half_the_gpus_is_refused_as_it_is_read(name: str) -> None:
    with pytest.raises(ValueError, match="runs on a multiple of"):
        real(name, ranks=COUNTS[name][0] // 2)


def test_half_the_gpus_are_enough_in_another_layout_where_the_plan_says_so(tmp_path: Path) -> None:
    """Nano's LoRA fits four GPUs and Super's one node: LoRA keeps no optimizer state of the frozen weights."""
    four = preflight(real("nemotron3-nano-lora", ranks=4, layout=Layout(ep=4)), NODE, tmp_path)
    eight = preflight(real("nemotron3-super-lora", ranks=8, layout=Layout(tp=8, ep=8)), NODE, tmp_path)
    assert four.plan.fits and four.placement.training_gpus == 4 and eight.plan.fits


def with_rules(name: str, **rules: Any) -> Campaign:
    campaign = real(name)
    return campaign.replace(constitution=campaign.constitution.replace(**rules))


def test_what_would_outgrow_its_gpus_or_its_time_is_refused(tmp_path: Path) -> None:
    reaching = with_rules("nemotron3-nano-lora", mutation_space=("mix.*", "recipe.seq*"))
    with pytest.raises(ValueError, match=r"lets a delta change recipe.sequence_length \(recipe.seq\* in"):
        preflight(reaching, NODE, tmp_path)
    hurried = with_rules("nemotron3-nano-lora", limits={"max_steps": 480, "max_rows": 15360, "run_seconds": 3600})
    with pytest.raises(ValueError, match=r"kills a run after 1 h, and one of 15360 full rows takes 1\.\d h on 8 GPUs"):
        preflight(hurried, NODE, tmp_path)
    with pytest.raises(ValueError, match="lets a job run for 4 h, its site for 2"):
        preflight(real("nemotron3-nano-lora"), NODE.replace(longest_job_hours=2.0), tmp_path)
    tight = with_rules("nemotron3-nano-lora", budgets={"wall_hours": 4.05})  # a run, and 3 min
    preflight(tight, NODE.replace(grace_seconds=120.0), tmp_path)
    with pytest.raises(ValueError, match=r"a budget of 4.05 hours, and one training job may take 4.083 until"):
        preflight(tight, NODE.replace(grace_seconds=300.0), tmp_path)
    preflight(real("nemotron3-super-lora"), CLUSTER.replace(longest_job_hours=2.0), tmp_path)  # in several allocations
    with pytest.raises(ValueError, match="takes GPUs, and its site has none: name one that has with --site"):
        preflight(real("nemotron3-nano-lora"), Site(), tmp_path)
    with pytest.raises(ValueError, match="asks for 8 GPUs, a node has 4"):
        preflight(real("nemotron3-super-lora"), CLUSTER.replace(gpus_per_node=4), tmp_path)


def test_weights_that_outgrow_the_judges_gpus_are_refused(tmp_path: Path) -> None:
    campaign = real("nemotron3-super-lora")
    for engine, says in (
        ({"kind": "megatron", "max_new_tokens": 100}, "on 100% of 1 GPUs of 80GB, and the weights alone take 225 GB"),
        ({"kind": "openai", "server": {"kind": "vllm", "tensor_parallel": 2}}, "on 90% of 2 GPUs of 80GB"),
    ):
        judge = campaign.judge.replace(engine=engine)
        with pytest.raises(ValueError, match=says):
            preflight(campaign.replace(judge=judge), CLUSTER, tmp_path)


def test_the_run_itself_refuses_what_cannot_work_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, site: Site) -> str:
        session = Session(tmp_path / "run", tmp_path / "store", lambda what, facts: None, lambda: False, site)
        with pytest.raises(ValueError) as error:
            run_campaign(session, real(name))
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "expected Slurm's sbatch on this machine's PATH, found none" in refused("nemotron3-super-lora", CLUSTER)
    session = Session(tmp_path / "run", tmp_path / "store", lambda what, facts: None, lambda: False)
    demo = Campaign.parse(load_yaml(SHIPPED / "demo.yaml"), where="demo")
    wide = demo.replace(launch={"cores": 2, "training": {"ranks": 4}})
    with pytest.raises(ValueError, match="takes 4 cores, of 2 that it may fill here"):
        run_campaign(session, wide)
    assert list(tmp_path.iterdir()) == []
    if len(gpu_names()) < 8:
        assert "the driver of this machine lists" in refused("nemotron3-nano-lora", NODE)
    else:
        said = refused("nemotron3-nano-lora", NODE)
        assert "import-hf DIR --name nemotron3-nano" in said or "plans memory for Mamba layers on mamba-ssm" in said


def test_a_machine_without_the_scan_that_memory_was_planned_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = real("nemotron3-nano-lora")
    campaign = campaign.replace(launch=campaign.launch.replace(cores=64))
    monkeypatch.setattr(preflight_module, "gpu_names", lambda: ["NVIDIA H100"] * 8)
    for packages, says in (({}, "on this machine mamba-ssm and causal-conv1d not installed"), (BOTH, "import-hf DIR")):
        monkeypatch.setattr(preflight_module, "machine", lambda gpu, packages=packages: Machine(gpu, packages))
        with pytest.raises(ValueError, match=says):
            check_campaign(campaign, NODE, tmp_path, new=True)


def test_a_csv_that_is_not_there_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    campaign = load_campaign(SHIPPED / "challenge-cpu.yaml", external=tmp_path / "nope.csv")
    with pytest.raises(ValueError, match=r"nope.csv, found no file: check --external"):
        dry_run(campaign, tmp_path / "run", Site(), tmp_path / "store")
    with pytest.raises(ValueError, match=r"nope.csv, found no file: check --external"):
        run_campaign(Session(tmp_path / "run", tmp_path / "store", lambda what, facts: None, lambda: False), campaign)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("side", "items", "says"),
    [
        ("dev", {"dev-a": 200}, "judge.dev of campaign .* needs items for dev-a, dev-b, got dev-a: add dev-b"),
        ("external", {"external-a": 5, "external-b": 5}, "judge.external .* got external-a, external-b: add final"),
        ("dev", {"dev-a": 2, "dev-b": 2_000_000_000}, "dev.items_per_family.dev-b is at most 100000, got 2000000000"),
    ],
)
def test_a_judge_without_the_items_that_are_asked_is_refused(side: str, items: dict, says: str, tmp_path: Path) -> None:
    document = load_yaml(SHIPPED / "demo.yaml")
    document["judge"][side]["items_per_family"] = items
    with pytest.raises(ValueError, match=says):
        preflight(Campaign.parse(document, where="demo"), Site(), tmp_path)


def test_the_launcher_gives_the_gpus_that_the_controller_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    campaign = real("nemotron3-nano-lora")
    session = Session(tmp_path, tmp_path, lambda what, facts: None, lambda: False, NODE)
    with (
        launcher_of(campaign.replace(launch=campaign.launch.replace(cores=64)), session) as launcher,
        pytest.raises(ValueError, match="has 2 GPUs to give; job a asks for 3"),
    ):
        launcher.submit(Job("a", ("true",), tmp_path / "a", 1.0, "done", resources=Resources(gpus=3)))


def test_a_campaign_without_gpus_has_scripts_and_no_gpu_hours(tmp_path: Path) -> None:
    demo = Campaign.parse(load_yaml(SHIPPED / "demo.yaml"), where="demo")
    found = dry_run(demo, tmp_path / "run", Site(), tmp_path / "store")
    assert found["layout"] is None and found["use"]["total"]["gpu_hours_limit"] is None
    starts = ("build", "freeze", "propose", "train", "score", "score", "score", "score")
    assert all(one["what"].startswith(start) for one, start in zip(found["steps"], starts, strict=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_keeps_the_site_that_it_ran_on(own_ground: tiny.Ground, tmp_path: Path) -> None:
    campaign, site = Campaign.parse(load_yaml(own_ground.file), where="tiny"), Site(utilisation=0.2)
    root = tmp_path / "run"
    with pytest.raises(Stopped):
        run_campaign(Session(root, own_ground.store, lambda what, facts: None, lambda: True, site), campaign)
    assert chosen_site(None, CampaignFolder(root).site, campaign) == site


@pytest.mark.slow
def test_the_run_started_what_the_dry_run_prints(ground: tiny.Ground) -> None:
    """Word for word, against what the launcher kept of the jobs of a campaign that ran."""
    campaign = Campaign.parse(load_yaml(ground.file), where="tiny")
    found = dry_run(campaign, ground.finished, Site(), ground.store)
    for what in ("train", "score on dev"):
        argv = step(found, what)["argv"]
        place = Path(argv[argv.index("--out") + 1])
        assert json.loads((place / "attempts/1/job.json").read_text())["argv"] == list(argv)
