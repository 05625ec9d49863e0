"""ScatterMoE's expert products beside ours, where it is installed (github.com/shawntan/scattermoe, 0.3.0 was read).

Its products read rows by their choice and write them sorted, or read them sorted and write them by choice, so that
nothing is permuted in memory, as in ours; the activation between them is PyTorch's, and so is the sum over a token's
choices. It weighs after the second product, where Megatron weighs before it, and that is the same function:

    sum_k W2 (p_k relu(h_k)^2) = sum_k p_k (W2 relu(h_k)^2)

Its weights enter a product with the rows, so they are rounded to the rows' dtype. Gradients of the matrices are always
computed, also where nobody asks: `full` is the mode to compare.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_evolve.kernels.bench.problem import Experts, Prepared


def scattermoe(v: Experts, parallel_linear: Callable | None = None) -> Prepared:
    """`parallel_linear` is the package's, of sorted or scattered rows times their expert's matrix (E, in, out).

    Raises ImportError where the package is not installed, ValueError for adapters.
    """
    if v.loras:
        raise ValueError("ScatterMoE has no adapters inside its products: compare frozen or fully trained matrices")
    if parallel_linear is None:
        from scattermoe import parallel_linear
    expert_of_row_M = v.idx_TK.flatten()[v.plan.choice_of_row_M.long()]
    # what its own sort of the choices gives, in its own order: experts, choices, last row of each expert plus one
    route = (expert_of_row_M.long(), v.plan.choice_of_row_M.long(), v.plan.counts_E.cumsum(0))

    def run() -> Tensor:
        h_MF = parallel_linear(v.x_TH, v.W1_EFH.transpose(1, 2), v.p_TK.size(1), *route, grouped_out=True)
        a_MF = torch.relu(h_MF).square()
        weights_TK = v.p_TK.to(v.x_TH.dtype)
        return parallel_linear(a_MF, v.W2_EHF.transpose(1, 2), 1, *route, grouped_in=True, gates=weights_TK)

    return run
