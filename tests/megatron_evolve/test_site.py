"""Site files: the shipped ones hold, a wrong one is one sentence, and a folder remembers its own."""

from pathlib import Path

import pytest
import yaml

from megatron_evolve.artefacts import save_yaml
from megatron_evolve.campaign import Campaign, find_campaign
from megatron_evolve.document import load_yaml
from megatron_evolve.eval.engines.settings import OpenAISettings
from megatron_evolve.eval.judge import OpenAIEngine
from megatron_evolve.site import SHIPPED_SITES, Site, chosen_site, find_site, load_site, placed


def campaign(name: str) -> Campaign:
    return Campaign.parse(load_yaml(find_campaign(name)), where=name)


@pytest.mark.parametrize("path", sorted(SHIPPED_SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sites_are_valid_and_survive_saving(path: Path, tmp_path: Path) -> None:
    save_yaml(tmp_path / "site.yaml", load_site(path))
    assert load_site(tmp_path / "site.yaml") == load_site(path)


def test_the_site_that_operations_shows_holds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    site = Site.parse(yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]), where="docs/operations.md")
    queue = site.queue
    assert queue.longest_s == 86400.0 and queue.options == {"mem": "0", "exclusive": ""} and queue.throttle == 4
    assert queue.container.runtime == "pyxis" and queue.container.mounts == ("/shared:/shared",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu_per_node: 8", "unknown key 'gpu_per_node'; did you mean gpus_per_node"),
        ("launcher: slrm", "launcher: input should be 'local', 'slurm' or 'kubernetes', got 'slrm'"),
        ("gpu_memory: 80", "gpu_memory"),
        ("gpu_memory: lots", "is written as in `80GB`; got 'lots'"),
        ("gpus_per_node: -1", "gpus_per_node: input should be greater than or equal to 0"),
        ("slurm: {account: me}", "`slurm` belongs to `launcher: slurm`"),
        ("{launcher: slurm, slurm: {acount: me}}", "unknown key 'slurm.acount'; did you mean account"),
        ('{launcher: slurm, slurm: {partition: "a b"}}', "slurm.partition"),
        ('{launcher: slurm, slurm: {account: "a\\n#SBATCH --uid=0"}}', "slurm.account"),
        ("{launcher: slurm, slurm: {options: {time: '5'}}}", "slurm.options: expected the long name of an option that"),
        ("{launcher: slurm, slurm: {options: {mem: 1 G}}}", "slurm.options.mem"),
        ("{launcher: slurm, slurm: {throttle: 0}}", "slurm.throttle"),
        ("{launcher: slurm, slurm: {container: {runtime: docker, image: a}}}", "slurm.container.runtime"),
        ("endpoint: host:8000", "endpoint"),
        ("schema: campaign/1", "input should be 'site/1'"),
    ],
)
def test_wrong_sites_are_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        load_site(file)
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value)


def test_names_and_paths() -> None:
    assert find_site("h100-node") == SHIPPED_SITES / "h100-node.yaml"
    with pytest.raises(ValueError, match=r"no site file 'h100-nod'.*did you mean h100-node"):
        find_site("h100-nod")


def test_whose_site_counts(tmp_path: Path) -> None:
    """The command line's, then the folder's, then the campaign file's, then this machine."""
    nano, demo = campaign("nemotron3-nano-lora"), campaign("demo")
    kept = tmp_path / "site.yaml"
    assert chosen_site(None, kept, demo) == Site()
    assert chosen_site(None, kept, nano) == load_site(find_site("h100-node"))
    save_yaml(kept, Site(gpus_per_node=4))
    assert chosen_site(None, kept, nano).gpus_per_node == 4
    assert chosen_site("h100-slurm", kept, nano).launcher == "slurm"


def test_the_site_is_no_part_of_the_campaign_but_for_its_paths(tmp_path: Path) -> None:
    ultra = campaign("nemotron3-ultra-infrastructure")
    assert "site" not in ultra.model_dump()["launch"]
    assert placed(ultra, Site()) == ultra
    assert placed(ultra, Site(endpoint="http://there:1/v1")).judge.engine.url == "http://there:1/v1"
    demo = campaign("demo")
    assert placed(demo, load_site(find_site("h100-node"))) == demo


def test_the_path_of_vllm_is_not_in_a_comparison() -> None:
    from megatron_evolve.eval.judge import MOVABLE

    def compared(executable: str, tensor_parallel: int) -> dict:
        server = {"kind": "vllm", "executable": executable, "tensor_parallel": tensor_parallel}
        settings = OpenAISettings(kind="openai", server=server)
        return OpenAIEngine(**settings.model_dump(), version="1", packages={}).model_dump(exclude=MOVABLE)

    assert compared("vllm", 2) == compared("/opt/vllm", 2) != compared("vllm", 4)
