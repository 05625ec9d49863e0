"""A site: one cluster or one machine, and what on it the jobs of any campaign need to know.

A campaign says what is trained, searched and scored; a site says on what. So one campaign file serves many sites, and
one site file many campaigns. What a site names by path or address is put into the campaign before it is opened
(`placed`), for the campaign's own copy must say what was asked; the rest only places its jobs and is hashed nowhere.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_evolve.campaign import Campaign
from megatron_evolve.document import find_yaml, load_yaml
from megatron_evolve.eval.engines.settings import OpenAISettings, VllmServer
from megatron_evolve.launch.slurm import Queue
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.plan.job import memory_bytes

SHIPPED_SITES = Path(__file__).resolve().parent / "sites"
WORD = r"^[A-Za-z0-9_.,:@&|*()\[\]-]+$"  # what Slurm's options are written with; no space, quote or line break


class SlurmQueue(Frozen):
    """Where Slurm takes this site's jobs."""

    account: str | None = Field(default=None, pattern=WORD, description="whom the jobs are charged to")
    partition: str | None = Field(default=None, pattern=WORD, description="partition, or several with commas")
    qos: str | None = Field(default=None, pattern=WORD, description="quality of service")
    constraint: str | None = Field(default=None, pattern=WORD, description="features that a node must have")


class Site(Frozen):
    """Machines and what is installed on them. The default is this machine without GPUs."""

    schema_: Literal["site/1"] = Field(default="site/1", alias="schema")
    launcher: Literal["local", "slurm"] = Field(
        default="local", description="who starts jobs: the controller on its own machine, or Slurm on whole nodes"
    )
    gpus_per_node: int = Field(default=0, ge=0, le=1024, description="GPUs of a node; 0: ranks compute on its cores")
    gpu_memory: str = Field(default="80GB", description="of one GPU, as on its label")
    cores_per_gpu: int = Field(default=8, ge=1, description="cores that a job takes for each of its GPUs")
    mamba_scan: Literal["mamba-ssm", "pytorch"] = Field(
        default="mamba-ssm",
        description="what Mamba layers run on there, as `doctor` says; pytorch keeps seven times their activations",
    )
    peak_tflops: float = Field(
        default=989.0, gt=0, description="10^12 dense bfloat16 operations a second of one GPU, for the estimate alone"
    )
    # Published LoRA runs of the family reach 7 % (Lightning 3.5 on 8 H100) and 2 % (Super on 16 GB200) by this count.
    utilisation: float = Field(
        default=0.05, gt=0, le=1, description="assumed share of that peak in training, for the estimate alone"
    )
    longest_job_hours: float | None = Field(
        default=None, gt=0, description="longest wall time that a job may ask for here; none: any"
    )
    models: dict[str, str] = Field(
        default_factory=dict, description="folder of each Hugging Face checkpoint here, by the name that a judge calls"
    )
    vllm: str | None = Field(
        default=None, min_length=1, description="vLLM's command where it has its own environment; none: the campaign's"
    )
    endpoint: str | None = Field(
        default=None, pattern=r"^https?://", description="up to /v1, of the server that a judge asks with a `url`"
    )
    slurm: SlurmQueue = Field(default=SlurmQueue(), description="for launcher slurm")

    @property
    def queue(self) -> Queue:
        """Where Slurm takes jobs, as the launcher is told."""
        return Queue(gpus_per_node=self.gpus_per_node, **self.slurm.model_dump())

    @field_validator("gpu_memory")
    @classmethod
    def _is_a_label(cls, text: str) -> str:
        memory_bytes(text)
        return text

    @model_validator(mode="after")
    def _slurm_is_asked(self) -> "Site":
        if self.launcher != "slurm" and self.slurm != SlurmQueue():
            raise ValueError("`slurm` belongs to `launcher: slurm`; set that, or leave `slurm` out")
        return self


def find_site(name: str) -> Path:
    """Path of a site file: a path that exists, or the name of a shipped one."""
    return find_yaml(name, SHIPPED_SITES, "site file")


def load_site(path: Path) -> Site:
    """The site of a file. Raises ValueError in one sentence."""
    return Site.parse(load_yaml(path), where=str(path))


def chosen_site(named: str | None, kept: Path, campaign: Campaign) -> Site:
    """The site named on the command line; else the one the campaign ran on before, kept in its folder; else the one its
    file names; else this machine.
    """
    if named is not None:
        return load_site(find_site(named))
    if kept.is_file() or campaign.launch.site is None:
        return kept_site(kept)
    return load_site(find_site(campaign.launch.site))


def kept_site(kept: Path) -> Site:
    """The site that a campaign's folder keeps; this machine where it keeps none."""
    return load_site(kept) if kept.is_file() else Site()


def placed(campaign: Campaign, site: Site) -> Campaign:
    """The campaign with its judge's engine found on the site: vLLM's command, the base model's folder, the address."""
    engine = campaign.judge.engine
    if not isinstance(engine, OpenAISettings):
        return campaign
    if engine.url is not None:
        found = engine.replace(url=site.endpoint or engine.url)
    elif isinstance(engine.server, VllmServer):
        base = engine.server.base
        here = {"base": site.models.get(base, base) if base else None, "executable": site.vllm}
        found = engine.replace(server=engine.server.replace(**{name: value for name, value in here.items() if value}))
    else:
        return campaign
    return campaign.replace(judge=campaign.judge.replace(engine=found))
