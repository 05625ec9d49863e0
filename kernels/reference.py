"""The expert path of Nemotron's mixture-of-experts layer, defined: plain PyTorch, any dtype up to float64, not fast.

Every faster form is tested against this page, outputs and gradients. What the layer computes for one token x, with
s = sigmoid(logits) and C the K experts of largest s + bias:

    p_e = scale * s_e / (sum_{j in C} s_j + 1e-20)
    y   = sum_{e in C} W2_e (p_e * relu(W1_e x)^2)

The probability multiplies the activation *before* fc2, as Megatron-Core does (transformer/mlp.py, MLP.forward). The
bias only selects (Wang et al. 2024, arXiv 2408.15664); Megatron-Core's TopKRouter is the source of the details. With a
clamp c, c tanh(relu(h) / c) takes the place of relu(h), as later Megatron-Core's activation_func_tanh_clamp_scale.

Letters: T tokens, E experts, K experts chosen per token, M = T * K rows sorted by expert, H model width, F hidden width
of an expert, R adapter rank, I and O the input and output width of one grouped matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RoutePlan(NamedTuple):
    """Where each choice c = t * K + k stands among the rows sorted by expert, tokens in order within an expert.

    int64 here, int32 from the Triton form; either serves every backend.
    """

    choice_of_row_M: Tensor
    row_of_choice_TK: Tensor  # its inverse
    counts_E: Tensor  # rows of each expert; sums to M

    @property
    def token_of_row_M(self) -> Tensor:
        return self.choice_of_row_M // self.row_of_choice_TK.size(1)


class GroupedLora(NamedTuple):
    """One low-rank adapter per expert: W_e + scale * B_e A_e (Hu et al. 2021, arXiv 2106.09685)."""

    A_ERI: Tensor
    B_EOR: Tensor
    scale: float


def router(logits_TE: Tensor, bias_E: Tensor, num_chosen: int, scale: float) -> tuple[Tensor, Tensor]:
    """Chosen experts (T, K) int64, best first, and their probabilities (T, K) in the dtype of the scores.

    Scores are at least float32. Selection compares s + bias in float32, the bias's dtype: scores that a large bias
    hides are equal, and among equals the lowest expert wins. A single choice (K = 1) keeps its score unnormalised, as
    in Megatron-Core's topk_routing_with_score_function. The bias gets no gradient.
    """
    s_TE = torch.sigmoid(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)))
    rank_TE = (s_TE + bias_E).detach().to(torch.float32)
    idx_TK = torch.sort(rank_TE, dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    p_TK = s_TE.gather(1, idx_TK)
    if num_chosen > 1:
        p_TK = p_TK / (p_TK.sum(-1, keepdim=True) + 1e-20)
    return idx_TK, p_TK * scale


def route_plan(idx_TK: Tensor, num_experts: int) -> RoutePlan:
    """Sort the T * K choices by expert, keeping the order of tokens within each expert."""
    choice_of_row_M = torch.sort(idx_TK.flatten(), stable=True).indices
    row_of_choice_M = torch.empty_like(choice_of_row_M)
    row_of_choice_M[choice_of_row_M] = torch.arange(idx_TK.numel(), device=idx_TK.device)
    counts_E = torch.bincount(idx_TK.flatten(), minlength=num_experts)
    return RoutePlan(choice_of_row_M, row_of_choice_M.view_as(idx_TK), counts_E)


def experts_of_chunks(counts_RE: Tensor, num_rows: int) -> Tensor:
    """The expert of each row (M, 1) that R ranks sent in turn, each its own rows sorted by the E experts here.

    Such rows are tokens with one choice, so `route_plan` of this sorts them by expert, ranks in order within each:
    `permute` and `unpermute` are then Megatron's sort of chunks after its exchange and the reverse, and the fused
    experts read and write rows as they were received. counts_RE are the rows of each chunk, on the rows' device;
    nothing is read back, so that they sum to num_rows is the caller's to know.
    """
    stop_C = counts_RE.flatten().cumsum(0)
    chunk_M = torch.searchsorted(stop_C, torch.arange(num_rows, device=stop_C.device), right=True)
    return (chunk_M % counts_RE.size(1)).unsqueeze(1)


def permute(x_TH: Tensor, p_TK: Tensor, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Rows (M, H) and their probabilities (M,), sorted by expert."""
    return x_TH[plan.token_of_row_M], p_TK.flatten()[plan.choice_of_row_M]


def unpermute(y_MH: Tensor, plan: RoutePlan) -> Tensor:
    """Sum each token's K rows back to (T, H)."""
    return y_MH[plan.row_of_choice_TK].sum(1)


def check_clamp(clamp: float | None) -> None:
    """Refuse a soft bound that is none."""
    if clamp is not None and not 0 < clamp < float("inf"):
        raise ValueError(f"clamp must be a positive number, or None for no bound; got {clamp}: change it")


def weighted_squared_relu(h_MF: Tensor, p_M: Tensor, clamp: float | None = None) -> Tensor:
    """a = p * relu(h)^2 (So et al. 2021, arXiv 2109.08668), in the wider dtype of the two and rounded to that of h.

    With a clamp s, a = p * (s * tanh(relu(h) / s))^2, which stays below p * s^2.
    """
    check_clamp(clamp)
    r_MF = torch.relu(h_MF).to(torch.promote_types(h_MF.dtype, p_M.dtype))
    g_MF = r_MF if clamp is None else clamp * torch.tanh(r_MF / clamp)
    return (p_M.unsqueeze(-1) * g_MF**2).to(h_MF.dtype)


def grouped_linear(
    x_MI: Tensor, counts_E: Tensor, W_EOI: Tensor | Sequence[Tensor], lora: GroupedLora | None = None
) -> Tensor:
    """Each row times its expert's matrix: (M, O). Rows stand sorted by expert; W is stacked or E matrices."""
    W_EOI = W_EOI if isinstance(W_EOI, Tensor) else torch.stack(tuple(W_EOI))
    expert_M = torch.repeat_interleave(torch.arange(len(W_EOI), device=x_MI.device), counts_E.to(x_MI.device))
    y_MO = torch.einsum("mi,moi->mo", x_MI, W_EOI[expert_M])
    if lora is None:
        return y_MO
    u_MR = torch.einsum("mi,mri->mr", x_MI, lora.A_ERI[expert_M])
    return y_MO + lora.scale * torch.einsum("mr,mor->mo", u_MR, lora.B_EOR[expert_M])


def grouped_experts(
    x_MH: Tensor,
    counts_E: Tensor,
    p_M: Tensor,
    W1_EFH: Tensor | Sequence[Tensor],
    W2_EHF: Tensor | Sequence[Tensor],
    lora1: GroupedLora | None = None,
    lora2: GroupedLora | None = None,
    *,
    clamp: float | None = None,
) -> Tensor:
    """fc1, weighted squared ReLU, fc2 on rows sorted by expert: (M, H), each row weighted by its probability."""
    a_MF = weighted_squared_relu(grouped_linear(x_MH, counts_E, W1_EFH, lora1), p_M, clamp)
    return grouped_linear(a_MF, counts_E, W2_EHF, lora2)


def gated_rms_norm(y_TD: Tensor, z_TD: Tensor, w_D: Tensor, num_groups: int, eps: float = 1e-5) -> Tensor:
    """Mamba-2's output norm (Dao and Gu 2024, arXiv 2405.21060): y silu(z), normed within each group of D / G, times w.

    At least float32 inside, rounded to the dtype of y once, as mamba_ssm's RMSNormGated with norm_before_gate=False.
    """
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    g_TD = y_TD.to(wide) * torch.nn.functional.silu(z_TD.to(wide))
    g_TGD = g_TD.unflatten(-1, (num_groups, -1))
    n_TGD = g_TGD * torch.rsqrt(g_TGD.square().mean(-1, keepdim=True) + eps)
    return (n_TGD.flatten(-2) * w_D).to(y_TD.dtype)


def linear_cross_entropy(x_TH: Tensor, W_VH: Tensor, target_T: Tensor) -> Tensor:
    """-log softmax(W x)[target] of each token (T,), at least in float32 from logits in the dtype of x."""
    logits_TV = x_TH @ W_VH.t()
    logits_TV = logits_TV.to(torch.promote_types(x_TH.dtype, torch.float32))
    return torch.logsumexp(logits_TV, -1) - logits_TV.gather(1, target_T.unsqueeze(-1)).squeeze(-1)
