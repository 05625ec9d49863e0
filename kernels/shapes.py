"""The shapes of an op's operands, held against each other on the host before anything is launched.

A kernel reads as far as it is told and never asks how long a tensor is: one that is too short gives numbers from beside
it. The shapes are host integers, so the comparison waits for nothing, and a CUDA graph is captured as before.

    check_shapes("W1", (E, F, H), x=(x, (M, H)), p=(p, (M,)), W2=(W2, (E, H, F)), **lora_shapes("1", lora1, E, F, H))

Letters as in `reference`: E experts, I and O the input and output width of one grouped matrix, R adapter rank.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_evolve.kernels.reference import GroupedLora

Operand = Tensor | Sequence[Tensor]
Wanted = tuple[Operand, tuple[int, ...]]


def shape_of(W: Operand) -> tuple[int, ...]:
    """A tensor's shape; of E matrices apart, or one stack in a tuple, (E, rows, columns). `matrices` compares the E."""
    if isinstance(W, Tensor):
        return W.shape
    return W[0].shape if W[0].dim() == 3 else (len(W), *W[0].shape)


def lora_shapes(number: str, lora: GroupedLora | None, num_experts: int, rows: int, columns: int) -> dict[str, Wanted]:
    """What an adapter has to be, if there is one, beside E matrices (O, I): A (E, R, I) and B (E, O, R)."""
    if lora is None:
        return {}
    R = lora.B_EOR.shape[-1]
    return {f"A{number}": (lora.A_ERI, (num_experts, R, columns)), f"B{number}": (lora.B_EOR, (num_experts, rows, R))}


def check_shapes(beside: str, shape: Sequence[int], **operands: Wanted) -> None:
    """Raises ValueError for the first operand, (tensor or matrices, shape wanted), that has another shape.

    `beside` names the operand whose `shape` decided what is wanted of the others.
    """
    for name, (operand, wanted) in operands.items():
        got = shape_of(operand)
        if got != wanted:
            raise ValueError(
                f"{name} must have shape {tuple(wanted)} where {beside} has {tuple(shape)}; got {tuple(got)}: pass "
                "tensors that belong together"
            )
