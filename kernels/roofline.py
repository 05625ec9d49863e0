"""What each op of the expert path must move and multiply, and the least time a chip can do it in.

    time of a pass = max(FLOP / peak, bytes / bandwidth)             time of a path = the sum over its passes

Predictions, not measurements: perfect products, every byte moved once, no launch, no padding of tiles. The fused path
is counted as the kernels here are built; the unfused one as Megatron-Core runs it on Hopper, with its adapters as
Megatron-Bridge runs them. Without a GPU this is the plan; with one it is the ceiling that a row is a share of.

Letters: T tokens, E experts of this rank, K chosen, M = T K rows, H width in and out, F hidden width, R adapter rank.
This file needs no torch.
"""

from typing import NamedTuple

BF16, FP32, INT32 = 2, 4, 4  # bytes
MODES = ("frozen", "full", "lora")


class Chip(NamedTuple):
    """Ceilings that are reached, not those of the data sheet's products (989 TFLOP/s dense in bfloat16)."""

    name: str
    tflops: float  # bfloat16 with float32 sums; large dense products of the vendor's library
    tb_per_s: float

    def ms(self, flops: float, bytes_moved: float) -> float:
        return 1e-9 * max(flops / self.tflops, bytes_moved / self.tb_per_s)


CHIPS = {"h100": Chip("H100 SXM", 800, 3.35), "h200": Chip("H200", 800, 4.8)}


class Shape(NamedTuple):
    """One layer's routed experts on one rank; the rank's K T rows are spread over its own E experts."""

    model: str
    tokens: int
    experts: int
    chosen: int
    width: int
    hidden: int
    rank: int = 0  # of the adapter, 0 without one
    ep: int = 1  # ranks that share the layer's experts
    gradient_bytes: int = FP32  # of a number of a weight gradient: Megatron's main gradient, or BF16

    @property
    def rows(self) -> int:
        return self.tokens * self.chosen

    @property
    def matrix_bytes(self) -> int:
        """All E matrices of fc1, or of fc2."""
        return self.experts * self.width * self.hidden * BF16

    @property
    def wide(self) -> int:
        """Bytes of M rows of the model's width."""
        return self.rows * self.width * BF16

    @property
    def narrow(self) -> int:
        """Bytes of M rows of the hidden width."""
        return self.rows * self.hidden * BF16

    @property
    def tokens_bytes(self) -> int:
        return self.tokens * self.width * BF16

    @property
    def product(self) -> int:
        """FLOP of one grouped product."""
        return 2 * self.rows * self.width * self.hidden


# experts of the model, chosen, width of the experts (the latent size in Super and Ultra), hidden width
MODELS = {
    "nano": (128, 6, 2688, 1856),
    "super": (512, 22, 1024, 2688),
    "ultra": (512, 22, 2048, 5120),
}


def shape_of(model: str, tokens: int, ep: int = 1, rank: int = 0) -> Shape:
    """A rank's part of that model's layer when each of its `ep` ranks brings as many tokens as this one."""
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}: name one of them")
    experts, chosen, width, hidden = MODELS[model]
    if experts % ep:
        raise ValueError(f"the ranks must divide the {experts} experts of {model}; got {ep}: choose a power of two")
    return Shape(model, tokens, experts // ep, chosen, width, hidden, rank, ep)


class Pass(NamedTuple):
    """One reading and writing of memory, with the products done on the way."""

    name: str
    flops: float
    bytes_moved: float


def permute(s: Shape) -> Pass:
    """Tokens to rows, or rows to tokens: the same bytes."""
    return Pass("permute", 0, s.tokens_bytes + s.wide)


def chunk_sort(s: Shape) -> Pass:
    """Rows that came from other ranks, put in the order of experts: Megatron's dispatcher, with EP above 1."""
    return Pass("chunk_sort", 0, 2 * s.wide)


def squared_relu(s: Shape) -> Pass:
    """The activation times each row's share: h and the shares are read, a is written."""
    return Pass("squared_relu", 0, 2 * s.narrow + s.rows * FP32)


def squared_relu_gradient(s: Shape, *, one_pass: bool = False) -> Pass:
    """Megatron takes dp in a pass of its own, which reads h and da again."""
    again = 0 if one_pass else 2 * s.narrow
    return Pass("squared_relu_gradient", 0, 3 * s.narrow + 2 * s.rows * FP32 + again)


def router(s: Shape, all_experts: int, model_width: int) -> Pass:
    """From tokens to indices and shares; the router's matrix stays in L2."""
    chosen = s.tokens * s.chosen * (INT32 + FP32)
    return Pass("router", 2 * s.tokens * all_experts * model_width, s.tokens * model_width * BF16 + chosen)


def gated_norm(tokens: int, width: int, *, backward: bool = False) -> Pass:
    """Mamba-2's output norm: y and z in, out; backward also dout in, dy and dz out."""
    return Pass("gated_norm", 0, tokens * width * BF16 * (5 if backward else 3))


def linear_cross_entropy(tokens: int, width: int, vocabulary: int) -> Pass:
    """Frozen head: logits and dx are two products; logits go through memory four times, in chunks."""
    head, logits = vocabulary * width * BF16, tokens * vocabulary * BF16
    return Pass("linear_cross_entropy", 4 * tokens * width * vocabulary, 2 * head + 4 * logits)


def others(tokens: int) -> dict[str, dict[str, tuple[Pass, ...]]]:
    """The ops beside the experts at Nano's sizes: op -> forward, backward -> its passes.

    The loss makes its gradient in the forward pass; of the plan there is none, and the router's is not counted.
    """
    s, inner, vocabulary = shape_of("nano", tokens), 4096, 131_072
    moved = {"forward": (permute(s),), "backward": (permute(s),)}
    return {
        "route_plan": {"forward": (Pass("route_plan", 0, 3 * INT32 * s.rows),)},
        "permute": moved,
        "unpermute": moved,
        "router": {"forward": (router(s, s.experts, s.width),)},
        "gated_norm": {
            "forward": (gated_norm(tokens, inner),),
            "backward": (gated_norm(tokens, inner, backward=True),),
        },
        "linear_cross_entropy": {"forward": (linear_cross_entropy(tokens, s.width, vocabulary),)},
    }


def fused_forward(s: Shape) -> tuple[Pass, ...]:
    """fc1 reads rows by their token, which L2 serves again, so x counts once."""
    r_bytes, extra = s.rows * s.rank * BF16, 2 * s.rows * s.rank
    before = ()
    if s.rank:
        before = (
            Pass("adapter fc1", extra * s.width, s.tokens_bytes + r_bytes),
            Pass("adapter fc2", extra * s.hidden, s.narrow + r_bytes),
        )
    return (
        *before,
        Pass("fc1", s.product + extra * s.hidden, s.matrix_bytes + s.tokens_bytes + 2 * s.narrow + r_bytes),
        Pass("fc2", s.product + extra * s.width, s.matrix_bytes + s.narrow + s.wide + r_bytes),
        Pass("combine", 0, s.tokens_bytes + s.wide),
    )


def fused_backward(s: Shape, mode: str) -> tuple[Pass, ...]:
    """dy counts as M rows: its K reads of a token are far apart, and h streams through L2 beside it."""
    r_bytes, extra = s.rows * s.rank * BF16, 2 * s.rows * s.rank
    a_again = 0 if mode == "frozen" else s.narrow  # made again for the gradients of fc2's matrix or adapter
    passes = [
        Pass("fc2_gradient", s.product + extra * s.hidden, s.matrix_bytes + s.wide + 2 * s.narrow + a_again + r_bytes),
        Pass("fc1 input gradient", s.product + extra * s.width, s.matrix_bytes + s.narrow + s.wide + r_bytes),
        Pass("combine", 0, s.tokens_bytes + s.wide),
    ]
    if mode == "full":
        written = s.matrix_bytes // BF16 * s.gradient_bytes
        passes += [Pass(f"{name} weight gradient", s.product, s.narrow + s.wide + written) for name in ("fc1", "fc2")]
    if mode == "lora":
        # du, dA and dB of each; du2 and dB2 read dy, dA2 reads a; du1 and dB1 read dh, dA1 reads x by its token
        passes += [
            Pass("adapter fc2", 2 * extra * s.width + extra * s.hidden, 2 * s.wide + s.narrow + 3 * r_bytes),
            Pass("adapter fc1", 2 * extra * s.hidden + extra * s.width, 2 * s.narrow + s.tokens_bytes + 3 * r_bytes),
        ]
    return tuple(passes)


def _unfused_product(s: Shape, name: str) -> Pass:
    return Pass(name, s.product, s.matrix_bytes + s.narrow + s.wide)


def _moved(s: Shape) -> tuple[Pass, ...]:
    return (permute(s), *((chunk_sort(s),) if s.ep > 1 else ()))


def unfused_forward(s: Shape) -> tuple[Pass, ...]:
    """Megatron's passes; an adapter's are x A^T, u B^T, times the scale, plus the base: its output's bytes, 6 times."""
    passes = [*_moved(s), _unfused_product(s, "fc1"), squared_relu(s), _unfused_product(s, "fc2"), *_moved(s)]
    if s.rank:
        r_bytes, flops = 2 * s.rows * s.rank * BF16, 2 * s.rows * s.rank * (s.width + s.hidden)
        passes += [
            Pass("adapter fc1", flops, s.wide + 6 * s.narrow + r_bytes),
            Pass("adapter fc2", flops, s.narrow + 6 * s.wide + r_bytes),
        ]
    return tuple(passes)


def unfused_backward(s: Shape, mode: str) -> tuple[Pass, ...]:
    """Megatron's passes for the gradients of the inputs, and by `mode` of all matrices (`full`) or of the adapters."""
    products = [_unfused_product(s, f"{name} input gradient") for name in ("fc2", "fc1")]
    passes = [*_moved(s), *products, squared_relu_gradient(s), *_moved(s)]
    if mode == "full":
        written = s.matrix_bytes // BF16 * s.gradient_bytes
        passes += [Pass(f"{name} weight gradient", s.product, s.narrow + s.wide + written) for name in ("fc1", "fc2")]
    if mode == "lora":
        # scaled gradient written (2), read for du and for dB (2); x read, dx of the adapter written, added to dx (5)
        flops = 4 * s.rows * s.rank * (s.width + s.hidden)
        passes += [
            Pass("adapter fc1", flops, 4 * s.narrow + 5 * s.wide),
            Pass("adapter fc2", flops, 4 * s.wide + 5 * s.narrow),
        ]
    return tuple(passes)


PATHS = {"fused": (fused_forward, fused_backward), "unfused": (unfused_forward, unfused_backward)}


def passes_of(path: str, direction: str, s: Shape, mode: str) -> tuple[Pass, ...]:
    """Those of `forward`, `backward` or `both`."""
    forward, backward = PATHS[path]
    both = {"forward": forward(s), "backward": backward(s, mode)}
    return both["forward"] + both["backward"] if direction == "both" else both[direction]


def ms(passes: tuple[Pass, ...], chip: Chip) -> float:
    """The least milliseconds of these passes, one after another."""
    return sum(chip.ms(p.flops, p.bytes_moved) for p in passes)


def saved_bytes(path: str, s: Shape) -> int:
    """Activations kept for the backward pass beyond the tokens: h (and u), or the permuted rows, h and a."""
    adapters = 2 * s.rows * s.rank * BF16
    return s.narrow + adapters if path == "fused" else s.wide + 2 * s.narrow + adapters
