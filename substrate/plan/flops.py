"""Floating-point operations that one token costs, a multiply-add counted as two.

The backward pass costs twice the forward one: a gradient for each side of a product. A frozen weight needs none, so its
products cost 2/3 of a trained one's; those between activations (scores, scan) and adapters cost the whole.
"""

from dataclasses import dataclass
from math import ceil

from megatron_evolve.kernels.backend import LOSS_CHUNK_BYTES
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.plan.job import Job

BETWEEN_ACTIVATIONS = ("scores", "scan")


@dataclass(frozen=True)
class Flops:
    """Operations a token."""

    forward: float
    train: float  # forward and backward
    executed: float  # and what recompute repeats

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.train + other.train, self.executed + other.executed)


def layer_forward(a: Architecture, letter: str, sequence_length: int) -> dict[str, float]:
    """Operations of one layer's forward pass by kind: products with weights, and those between activations."""
    hidden = a.hidden_size
    if letter == "M":
        heads, width, state = a.mamba_num_heads, a.mamba_head_dim, a.mamba_state_dim
        chunk = ceil(sequence_length / ceil(sequence_length / a.mamba_chunk_size))
        # inside a chunk scores C B for each group and their product with x; into and out of the state
        scan = 2 * chunk * (a.mamba_num_groups * state + heads * width) + 2 * 2 * heads * width * state
        return {
            "projections": 2 * (sum(a.mamba_projection_parts) + a.mamba_inner_size) * hidden,
            "scan": scan + 2 * a.mamba_conv_size * a.mamba_conv_kernel,
        }
    if letter == "*":
        queries = a.num_attention_heads * a.head_dim
        return {
            "projections": 4 * (queries + a.num_query_groups * a.head_dim) * hidden,
            "scores": 4 * queries * (sequence_length + 1) / 2,  # the causal half of q k and of weights times v
        }
    return {
        "router": 2 * a.num_experts * hidden,
        "shared": 4 * a.shared_ffn_size * hidden,
        "latent": 4 * (a.latent_size or 0) * hidden,
        "experts": 2 * a.top_k * a.routed_expert_parameters(),
    }


def pattern_flops(a: Architecture, pattern: str, job: Job, targets: tuple[str, ...] | None = None) -> Flops:
    """Operations of the layers of a pattern, as the job trains and recomputes them; `targets` in place of its own."""
    targets = job.adapter.targets if targets is None else targets
    total = Flops(0.0, 0.0, 0.0)
    for letter in set(pattern):
        count = pattern.count(letter)
        kinds = layer_forward(a, letter, job.sequence_length)
        forward = count * sum(kinds.values())
        between = count * sum(kinds.get(kind, 0.0) for kind in BETWEEN_ACTIVATIONS)
        again = forward if job.recompute == "full" or (job.recompute == "selective" and letter == "E") else 0.0
        adapted = count * _adapter_forward(a, letter, job.adapter.rank, targets) if job.mode == "lora" else 0.0
        train = 3 * forward if job.mode == "sft" else 2 * forward + between + 3 * adapted
        total += Flops(forward + adapted, train, train + again)
    return total


def head_flops(a: Architecture, job: Job) -> Flops:
    """Operations of the output table, and of every depth of multi-token prediction with its own logits."""
    times = 3 if job.mode == "sft" else 2
    table = 2 * a.vocab_size * a.hidden_size * (1 + a.mtp_depths) + a.mtp_depths * 4 * a.hidden_size**2
    further = pattern_flops(a, a.mtp_pattern * a.mtp_depths, job, job.adapter.in_heads)
    chunk = LOSS_CHUNK_BYTES["triton" if job.precision == "bf16" else "eager"]
    logits = job.micro_batch * job.sequence_length * a.vocab_size * job.weight_bytes
    many = job.mode == "sft" and job.loss == "chunks" and logits > chunk
    again = 2 * a.vocab_size * a.hidden_size * (1 + a.mtp_depths) if many else 0  # see `kernels.chunked_loss`
    return Flops(table, times * table, times * table + again) + further


def token_flops(a: Architecture, job: Job) -> Flops:
    """Operations of the whole model."""
    return pattern_flops(a, a.pattern, job) + head_flops(a, job)


def _adapter_forward(a: Architecture, letter: str, rank: int, targets: tuple[str, ...]) -> float:
    """Two thin products beside each adapted matrix."""
    hidden, queries = a.hidden_size, a.num_attention_heads * a.head_dim
    width = a.latent_size or hidden
    sides = {
        "attention": ("*", 2 * hidden + 2 * queries + 2 * a.num_query_groups * a.head_dim),
        "mamba": ("M", 2 * hidden + sum(a.mamba_projection_parts) + a.mamba_inner_size),
        "shared": ("E", 2 * hidden + 2 * a.shared_ffn_size),
        "experts": ("E", a.top_k * (2 * width + 2 * a.expert_ffn_size)),
    }
    return 2 * rank * sum(sides[target][1] for target in targets if sides.get(target, " ")[0] == letter)
