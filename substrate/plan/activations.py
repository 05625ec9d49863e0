"""Bytes that one micro-batch leaves on a rank between its forward and its backward pass, layer by layer.

Counted tensor by tensor, as autograd keeps them: `float32` is this package's PyTorch path (scan in chunks, grouped
experts), which a CPU runs and `docs/results/model.md` measures; `bf16` is the fused path of a GPU (mamba-ssm's scan
keeps its input and output and computes the rest again; flash attention keeps no L x L matrix; norms keep their input).
Experts are taken as evenly loaded.

Letters: T tokens of a rank outside tensor parallelism, S = T / tp inside its sequence parallelism, R rows that reach
this rank's experts.
"""

from dataclasses import dataclass
from math import ceil

from megatron_evolve.kernels.backend import LOSS_CHUNK_BYTES
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.plan.job import Job


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer and one micro-batch."""

    kept: float  # from forward to backward
    again: float  # computed again before the backward pass, on top of `kept`
    working: float  # gradients and copies of the backward pass itself


class Activations:
    """The bytes of one architecture, layout and job; of layers with adapters on `targets` in place of the job's."""

    def __init__(
        self, architecture: Architecture, layout: Layout, job: Job, targets: tuple[str, ...] | None = None
    ) -> None:
        self.a, self.layout, self.job = architecture, layout, job
        self.targets = job.adapter.targets if targets is None else targets
        self.x = job.weight_bytes
        self.fused = job.precision == "bf16"
        self.trained = job.mode == "sft"  # a frozen weight needs no input for its gradient
        self.rows = job.micro_batch
        self.length = job.sequence_length / layout.cp
        self.T = self.rows * self.length
        self.S = self.T / layout.tp

    def in_heads(self) -> "Activations":
        """The same for layers of prediction heads."""
        return Activations(self.a, self.layout, self.job, self.job.adapter.in_heads)

    def layer(self, letter: str) -> Kept:
        """One layer of this kind."""
        a, job = self.a, self.job
        inner, working = {"M": self._mamba, "*": self._attention, "E": self._experts}[letter]()
        source = self.S * a.hidden_size * self.x  # the layer's input, which the norm keeps
        norm = self._norm() - source
        whole = source + norm + inner
        if job.recompute == "full":
            return Kept(source, whole - source, working)
        if job.recompute == "selective":
            norms = self.fused and job.recompute_norms and letter != "M"
            lost = (norm if norms else 0.0) + (inner if letter == "E" else 0.0)
            return Kept(whole - lost, lost, working)
        return Kept(whole, 0.0, working)

    def head(self, depths: int) -> Kept:
        """Final norm, output table and loss, of the next token and of `depths` further ones."""
        a = self.a
        states = self.S * a.hidden_size * self.x
        entries = a.vocab_size / self.layout.tp
        further = depths * 2 * states  # input of the projection of state and embedding
        hidden = self.T * a.hidden_size * self.x
        chunk = min(self.T * entries * self.x, self._chunk_bytes())
        passes = 1 if self.fused else 2  # PyTorch's sum of exponentials takes a copy
        if not self.trained and "output" not in self.targets:  # no logits but a chunk's: see `model.head`
            kept = (1 + depths) * (self._norm() - states + hidden + self.T * 12)
            return Kept(kept + further, 0.0, passes * chunk + hidden)
        if self.trained and self.job.loss == "chunks" and self.T * entries * self.x > self._chunk_bytes():
            gathered = hidden if self.layout.tp > 1 else 0.0  # the table's input, and 3 numbers and a target a token
            kept = (1 + depths) * (self._norm() + gathered + self.T * 20)
            table = entries * a.hidden_size * (4 if self.x == 4 else 4 + self.x)  # summed in float32
            # either the forward pass with its copy, or a chunk turned into its gradient in place beside the table's
            return Kept(kept + further, 0.0, max(passes * chunk, chunk + table) + hidden)
        logits = self.T * entries
        kept = (1 + depths) * (logits * 4 + self._norm() + self.T * 8)
        copies = logits * self.x if self.fused else 0.0  # the product in bf16 beside its float32 copy
        table = entries * a.hidden_size * self.x if self.trained and not self.fused else 0.0
        return Kept(kept + further, 0.0, copies + table + hidden)

    def _chunk_bytes(self) -> int:
        return LOSS_CHUNK_BYTES["triton" if self.fused else "eager"]

    def boundary(self) -> float:
        """What a pipeline stage receives and sends for one micro-batch."""
        return 2 * self.S * self.a.hidden_size * self.x if self.layout.pp > 1 else 0.0

    def _norm(self) -> float:
        """Input, one scale a token, and the output that the next product keeps; PyTorch keeps the scaled input too."""
        wide = 2 if self.fused else 2 + self.trained
        return self.S * (wide * self.a.hidden_size * self.x + 4)

    def _adapted(self, target: str) -> int:
        """Rank of the adapter on this target, of which each product keeps u = A x."""
        return self.job.adapter.rank if not self.trained and target in self.targets else 0

    def _mamba(self) -> tuple[float, float]:
        a, tp = self.a, self.layout.tp
        inner, heads, state = a.mamba_inner_size, a.mamba_num_heads, a.mamba_state_dim
        projected = sum(a.mamba_projection_parts)
        adapters = 2 * self._adapted("mamba") * self.T * self.x
        if self.fused and self.job.scan == "mamba-ssm":
            kept = self.T * ((projected + 2 * inner) * self.x + 4 * a.mamba_num_groups) / tp
            return kept + adapters, self.T * (projected + 2 * inner) * self.x / tp
        chunks = ceil(self.length / a.mamba_chunk_size)
        chunk = ceil(self.length / chunks)
        several = chunks > 1
        scan = (  # numbers a token, all in float32
            2 * a.mamba_num_groups * state  # B and C in chunks
            + heads * (3 + 2 * chunk + state)  # step twice, exponent; decay and mixing; B for each head
            + 3 * inner
        )
        if several:
            scan += heads * (1 + state) + inner  # exponent, C for each head, and what earlier chunks add
        states = self.rows * (2 * chunks if several else 1) * heads * a.mamba_head_dim * state
        if self.fused:  # the convolution's input and sum in float32; its output, and the norm's inputs and output
            a_token = 4 * (2 * a.mamba_conv_size + scan) + (a.mamba_conv_size + 3 * inner) * self.x
        else:  # projection, sum and silu of the convolution; gate 2, norm 1 or 2, output 1, and a scale for each group
            around = projected + 2 * a.mamba_conv_size + (4 + self.trained) * inner + a.mamba_num_groups
            a_token = 4 * (around + scan)
        working = self.T * 4 * inner * (7 if self.fused else 4) / tp  # casts of bf16 make copies, too
        return (self.T * a_token + 4 * states) / tp + adapters, working

    def _attention(self) -> tuple[float, float]:
        a, tp = self.a, self.layout.tp
        queries = a.num_attention_heads * a.head_dim / tp
        groups = max(1, a.num_query_groups / tp)
        qkv = queries + 2 * groups * a.head_dim
        copied = 0 if self.fused or groups == 1 else queries  # PyTorch's kernel wants queries of several groups apart
        a_token = (qkv + copied + queries) * self.x + 4 * a.num_attention_heads / tp
        adapters = 2 * self._adapted("attention") * self.x
        return self.T * (a_token + adapters), self.T * (2 * qkv + queries) * self.x

    def _experts(self) -> tuple[float, float]:
        a, layout = self.a, self.layout
        width, ffn = a.latent_size or a.hidden_size, a.expert_ffn_size / layout.etp
        rows = self.S * a.top_k * layout.etp
        shared = 2 * self.T * (a.shared_ffn_size / layout.tp + self._adapted("shared")) * self.x
        if self.fused:
            routing = self.S * (a.num_experts * (4 + 4 + 1) + 4 * (2 * a.num_experts + 1) + 8 * a.top_k)
        else:
            routing = self.S * (4 * (a.num_experts + 1 + a.top_k) + 8 * 4 * a.top_k)
        latent = self.S * (a.latent_size or 0) * self.x
        routed = rows * ((width + 2 * ffn + 2 * self._adapted("experts")) * self.x + 4)
        working = rows * (width + 2 * ffn) * self.x
        if not self.fused and self.trained:  # the gradients of all local experts' matrices stand at once
            working += a.num_experts / layout.ep * width * ffn * self.x
        return shared + routing + latent + routed, working
