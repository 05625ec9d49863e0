"""A site: one cluster or one machine, and what on it the jobs of any campaign need to know.

A campaign says what is trained, searched and scored; a site says on what. So one campaign file serves many sites, and
one site file many campaigns. What a site names by path or address is put into the campaign before it is opened
(`placed`), for the campaign's own copy must say what was asked; the rest only places its jobs and is hashed nowhere.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_evolve.campaign import Campaign
from megatron_evolve.document import find_yaml, load_yaml
from megatron_evolve.eval.engines.settings import OpenAISettings, VllmServer
from megatron_evolve.launch.kubernetes_manifest import Cluster
from megatron_evolve.launch.slurm import SCRIPTS, Container, Queue
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.plan.job import memory_bytes

if TYPE_CHECKING:
    from megatron_evolve.launch.kubernetes import KubernetesLauncher

SHIPPED_SITES = Path(__file__).resolve().parent / "sites"
WORD = r"^[A-Za-z0-9_.,:@&|*()\[\]-]+$"  # what Slurm's options are written with; no space, quote or line break


OPTION = r"^[A-Za-z0-9_.,:@&|*()\[\]/=%+-]*$"  # the same, and paths, sizes and mail addresses
# What the scripts say themselves; given once more, one of the two would be silently lost.
OWN_OPTIONS = {
    *("job-name", "array", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "output"),
    *("error", "signal", "requeue", "no-requeue", "open-mode", "account", "partition", "qos", "constraint", "wait"),
}


class SlurmContainer(Frozen):
    """A container that jobs run in."""

    runtime: Literal["pyxis", "apptainer"] = Field(description="srun's options of pyxis, or `apptainer exec`")
    image: str = Field(pattern=r"^\S+$", description="image, as pyxis or apptainer takes it")
    mounts: tuple[Annotated[str, Field(pattern=r"^[^\s,]+$")], ...] = Field(
        default=(), description="HOST:INSIDE; campaign folder, store and models must be there under the same paths"
    )
    python: str | None = Field(
        default=None,
        pattern=r"^\S+$",
        description="interpreter with the package inside; none: the path it has here",
    )


class SlurmQueue(Frozen):
    """Where Slurm takes this site's jobs, and how they are started there."""

    account: str | None = Field(default=None, pattern=WORD, description="whom the jobs are charged to")
    partition: str | None = Field(default=None, pattern=WORD, description="partition, or several with commas")
    qos: str | None = Field(default=None, pattern=WORD, description="quality of service")
    constraint: str | None = Field(default=None, pattern=WORD, description="features that a node must have")
    options: dict[str, Annotated[str, Field(pattern=OPTION)]] = Field(
        default_factory=dict, description="further options of sbatch by long name, as {mem: 200G, exclusive: ''}"
    )
    throttle: int | None = Field(
        default=None,
        ge=1,
        description="jobs of one shape become an array of which so many run at once; none: no arrays",
    )
    container: SlurmContainer | None = Field(default=None, description="what jobs run in; none: bare metal")
    scripts: str | None = Field(
        default=None,
        min_length=1,
        description="folder of your own train.sbatch and eval.sbatch; none: the shipped ones",
    )

    @field_validator("options")
    @classmethod
    def _are_free(cls, options: dict[str, str]) -> dict[str, str]:
        for name in options:
            if re.fullmatch(r"[a-z][a-z-]*", name) is None or name in OWN_OPTIONS:
                raise ValueError(
                    f"expected the long name of an option that the scripts leave open; got {name!r}: set it where the "
                    "site or the campaign has a field for it"
                )
        return options


class Toleration(Frozen):
    """A taint of nodes that this site's pods may ignore, in Kubernetes' own words."""

    key: str | None = Field(default=None, description="the taint's key; none: every taint")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="whether its value counts")
    value: str | None = Field(default=None, description="the taint's value, for operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="the taint's effect; none: every effect"
    )


class Namespace(Frozen):
    """Where Kubernetes takes this site's jobs. Run folders, store and substrate lie on one claim."""

    namespace: str = Field(description="of the jobs; the controller's account needs the Role of docs/kubernetes.md")
    image: str = Field(description="HOST/PATH:TAG of all pods: the controller's own, so that its paths hold in them")
    claim: str = Field(description="PersistentVolumeClaim (ReadWriteMany) of run folders and store")
    mount: str = Field(description="folder where that claim is mounted, in every pod and for the controller")
    service: str = Field(
        default="megatron-evolve", description="headless Service through which pods of an Indexed Job meet"
    )
    training_runtime: str | None = Field(
        default=None, description="Kubeflow TrainingRuntime of jobs on several nodes; none: they are Indexed Jobs"
    )
    memory: str | None = Field(default=None, description="of each pod, as in 200Gi; none: the namespace's default")
    user: int | None = Field(default=None, ge=0, description="uid and gid of the pods; none: the image's")
    service_account: str | None = Field(default=None, description="of the pods, which ask nothing of the cluster")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that a node must have")
    tolerations: tuple[Toleration, ...] = Field(default=(), description="taints that the pods may ignore")
    priority_class: str | None = Field(default=None, description="PriorityClass of the pods")
    queue: str | None = Field(default=None, description="Kueue's LocalQueue")
    secret: str | None = Field(
        default=None, description="Secret in the environment of Jobs, not of TrainJobs: the key of a judge's endpoint"
    )
    pull_secrets: tuple[str, ...] = Field(default=(), description="Secrets with which the image is pulled")
    context: str | None = Field(
        default=None, description="of the kubeconfig; none: its current one, or the pod's own service account"
    )

    def cluster(self, gpus_per_node: int) -> Cluster:
        """The same as the launcher is told. Raises ValueError for a name, image or quantity that cannot be one."""
        tolerations = tuple(one.model_dump(exclude_none=True) for one in self.tolerations)
        return Cluster(gpus_per_node=gpus_per_node, **{**dict(self), "tolerations": tolerations})

    @model_validator(mode="after")
    def _can_be_one(self) -> "Namespace":
        self.cluster(gpus_per_node=0)
        return self


class Site(Frozen):
    """Machines and what is installed on them. The default is this machine without GPUs."""

    schema_: Literal["site/1"] = Field(default="site/1", alias="schema")
    launcher: Literal["local", "slurm", "kubernetes"] = Field(
        default="local",
        description="who starts jobs: the controller on its own machine, or Slurm or Kubernetes on whole nodes",
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
        default=None,
        gt=0,
        description="longest wall time that a job may ask for here; Slurm puts a longer one back. None: any",
    )
    grace_seconds: float = Field(
        default=10.0, ge=0, description="what a job that is told to stop has to save in; a checkpoint must fit"
    )
    stall_seconds: float | None = Field(
        default=1800.0,
        gt=0,
        description="a job whose count of progress stands still for so long hangs, and is stopped and tried again; "
        "several times the longest step with its held-out loss and checkpoint, or null for never",
    )
    start_seconds: float | None = Field(
        default=3600.0,
        gt=0,
        description="the same before a job's first count and after its last: loading, compiling, writing what was made",
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
    kubernetes: Namespace | None = Field(default=None, description="for launcher kubernetes")

    @property
    def queue(self) -> Queue:
        """Where Slurm takes jobs, as the launcher is told."""
        given = self.slurm.model_dump(exclude={"container", "scripts"})
        container = self.slurm.container
        return Queue(
            gpus_per_node=self.gpus_per_node,
            longest_s=self.longest_job_hours and self.longest_job_hours * 3600,
            container=Container(**container.model_dump()) if container else None,
            scripts=Path(self.slurm.scripts).resolve() if self.slurm.scripts else SCRIPTS,
            **given,
        )

    @property
    def cluster(self) -> Cluster:
        """Where Kubernetes takes jobs, as the launcher is told."""
        assert self.kubernetes is not None  # the validator's promise, where the launcher is kubernetes
        return self.kubernetes.cluster(self.gpus_per_node)

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

    @model_validator(mode="after")
    def _kubernetes_is_asked(self) -> "Site":
        if (self.launcher == "kubernetes") != (self.kubernetes is not None):
            raise ValueError("`launcher: kubernetes` and a section `kubernetes` belong together; give both or neither")
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


def kubernetes_launcher(site: Site) -> "KubernetesLauncher":
    """The launcher of a site with `launcher: kubernetes`, which found all that jobs need. Raises KubernetesError."""
    from megatron_evolve.launch.kubernetes import KubernetesLauncher
    from megatron_evolve.launch.kubernetes_client import connect

    launcher = KubernetesLauncher(site.cluster, connect(site.cluster.context))
    launcher.check()
    return launcher


def placed(campaign: Campaign, site: Site) -> Campaign:
    """The campaign with its judge's engine found on the site: vLLM's command, the base model's folder, the address."""
    engine = campaign.judge.engine
    if not isinstance(engine, OpenAISettings):
        return campaign
    if engine.url is not None:
        base = site.models.get(engine.base, engine.base) if engine.base else None
        found = engine.replace(url=site.endpoint or engine.url, base=base)
    elif isinstance(engine.server, VllmServer):
        base = engine.server.base
        here = {"base": site.models.get(base, base) if base else None, "executable": site.vllm}
        found = engine.replace(server=engine.server.replace(**{name: value for name, value in here.items() if value}))
    else:
        return campaign
    return campaign.replace(judge=campaign.judge.replace(engine=found))
