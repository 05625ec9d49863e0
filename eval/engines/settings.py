"""Settings of the judge's engines: which one decodes, and everything about it that may move a completion.

    kind: megatron       our own greedy decoding with state caches, in the judge's process (the default)
    kind: transformers   the same weights as transformers' NemotronH, in the judge's process
    kind: openai         an endpoint that speaks the OpenAI protocol: one that runs, or one that the scoring job starts

A campaign names an engine in these words, and the judge freezes them. No key or password stands here: a setting names
the environment variable that holds one. Letters in braces stand for what only the scoring job knows:

    {run}      the trained run, by twelve digits of its digest
    {model}    folder of the run as a Hugging Face model, its adapter merged
    {adapter}  folder of the run's adapter in PEFT's format
    {name}     the name under which the run is served
    {port}     a free port of this machine
    {python}   the interpreter that runs the judge
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from megatron_evolve.substrate.frozen import Frozen

RUN, MODEL, ADAPTER, NAME, PORT, PYTHON = "{run}", "{model}", "{adapter}", "{name}", "{port}", "{python}"


class MegatronSettings(Frozen):
    """Our own greedy decoding with state caches."""

    # Not written: a file that names no kind means this engine, and digests from before there was a choice hold.
    kind: Literal["megatron"] = Field(default="megatron", exclude=True, description="our own greedy decoding")
    max_new_tokens: int = Field(default=24, ge=1, description="a longer completion is cut and counts as truncated")
    batch_size: int = Field(default=256, ge=1, description="items decoded at once; it moves the last bits of a logit")


class TransformersSettings(Frozen):
    """The run's weights as transformers' NemotronHForCausalLM, greedy, in the judge's process."""

    kind: Literal["transformers"]
    max_new_tokens: int = Field(default=24, ge=1, description="a longer completion is cut and counts as truncated")
    batch_size: int = Field(default=64, ge=1, description="items decoded at once; it moves the last bits of a logit")


class Patience(Frozen):
    """How long an endpoint is waited for, and how often it is asked again."""

    connect_seconds: float = Field(default=10, gt=0, description="until an endpoint that runs takes a connection")
    stall_seconds: float = Field(
        default=300, gt=0, description="while it is asked, its token counter may stand still so long; then it is stuck"
    )
    request_seconds: float = Field(default=3600, gt=0, description="of one request, from question to last token")
    retries: int = Field(default=6, ge=0, le=100, description="further attempts at one item; then the job fails")
    backoff_seconds: float = Field(default=1, gt=0, description="before the first retry, doubled for each further one")
    longest_wait_seconds: float = Field(
        default=120, gt=0, description="longest wait before a retry; a server that asks for more fails the item"
    )


class _Server(Frozen):
    start_seconds: float = Field(
        default=1800, gt=0, description="until the server is up and has answered once, the time to load included"
    )
    drain_seconds: float = Field(default=30, gt=0, description="from asking it to end until it is killed")
    restarts: int = Field(default=2, ge=0, le=100, description="how often one that died or is stuck is started again")


class CommandServer(_Server):
    """Any server, by its command line."""

    kind: Literal["command"]
    argv: tuple[str, ...] = Field(min_length=1, description="may hold {model}, {adapter}, {name}, {port}, {python}")
    packages: tuple[str, ...] = Field(
        default=(), description="distributions whose installed versions belong to the engine's version"
    )

    @model_validator(mode="after")
    def _listens_where_it_is_asked(self) -> "CommandServer":
        if not any(PORT in word for word in self.argv):
            raise ValueError(f"a server's argv must hold {PORT}, the free port that it will be asked at")
        return self


class VllmServer(_Server):
    """vLLM: the merged run, or one base model with the run's adapter as a LoRA request."""

    kind: Literal["vllm"]
    executable: str = Field(default="vllm", min_length=1, description="its command, by path if it is elsewhere")
    base: str | None = Field(
        default=None, description="folder or name of the base model that takes the adapter; none: the merged run"
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(default=32, description="largest rank of an adapter")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share each layer")
    max_model_len: int | None = Field(
        default=None, ge=1, description="longest prompt with completion; none: the model's"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(default="auto", description="of the weights")
    gpu_memory: float = Field(default=0.9, gt=0, le=1, description="share of each GPU's memory that it may take")
    flags: tuple[str, ...] = Field(default=(), description="further words of its command line, as they are")


Server = Annotated[CommandServer | VllmServer, Field(discriminator="kind")]


class OpenAISettings(Frozen):
    """An endpoint that speaks the OpenAI protocol, asked at temperature 0."""

    kind: Literal["openai"]
    max_new_tokens: int = Field(default=24, ge=1, description="a longer completion is cut and counts as truncated")
    concurrency: int = Field(default=32, ge=1, le=4096, description="requests in flight at once")
    url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="of an endpoint that runs, up to /v1; none: `server` is started",
    )
    server: Server | None = Field(default=None, description="started by the scoring job; none: `url` runs already")
    model: str = Field(
        default=RUN, min_length=1, description="the name it must serve the run under; may hold {run} and {model}"
    )
    base: str | None = Field(
        default=None,
        min_length=1,
        description="base model that `url` must list, by its name or the folder it was loaded from; none: any",
    )
    lora: bool = Field(
        default=False,
        description="`url` is vLLM with runtime LoRA updates and these disks: the job loads the run's adapter there",
    )
    prompt: Literal["text", "tokens", "chat"] = Field(
        default="text", description="what is sent: text or token ids to /completions, or a user's message to /chat"
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict, description="further fields of every request, as they are"
    )
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        description="environment variable that holds the key, if it takes one",
    )
    patience: Patience = Field(default=Patience())

    @model_validator(mode="after")
    def _one_endpoint_that_serves_the_run(self) -> "OpenAISettings":
        if (self.url is None) == (self.server is None):
            raise ValueError("an endpoint either runs (`url`) or is started (`server`); give exactly one of them")
        if self.lora and self.url is None:
            raise ValueError("`lora` is for an endpoint that runs (`url`); a vLLM that is started takes a `base`")
        if self.base is not None and self.url is None:
            raise ValueError("`base` of an engine is what an endpoint that runs (`url`) must list; leave it out")
        if self.url is not None and RUN not in self.model:
            # Under a fixed name one model would answer for every candidate of the campaign.
            raise ValueError(
                f"the model's name at an endpoint that runs must hold {RUN}, so that it names the run scored"
            )
        taken = sorted(
            {"model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "n"}
            & self.extra.keys()
        )
        if taken:
            raise ValueError(f"`extra` must not set {', '.join(taken)}, which the judge sets itself; leave it out")
        return self


def with_kind(value: Any) -> Any:
    """The fields of an engine with its kind, which a file may leave out."""
    return {"kind": "megatron", **value} if isinstance(value, dict) else value


EngineSettings = Annotated[
    MegatronSettings | TransformersSettings | OpenAISettings,
    Field(discriminator="kind"),
    BeforeValidator(with_kind),
]


def check_clamp(engine: MegatronSettings | TransformersSettings | OpenAISettings, dt_min: float) -> None:
    """Raises ValueError where the engine would compute another model than training, which clamps the Mamba step.

    vLLM never clamps, and transformers not in its cached step, with which its server writes. The other two engines do
    as training does.
    """
    if engine.kind == "openai" and dt_min > 0:
        raise ValueError(
            f"training clamps the Mamba step at {dt_min:g}, and the servers that engine openai asks do not while they "
            "write: import the checkpoint with --dt-min 0, or judge with engine megatron or transformers"
        )
