"""Checks of the ops as Megatron's layers call them, beside those that the benchmark times.

`GroupedExperts` hands sorted rows over and lets weight gradients be added into `main_grad`; `FusedRouter` has logits;
full fine-tuning trains the output table; and a layer may bound its activation. Each is held to float64 as in `checks`.
"""

import torch
from torch import Tensor

from megatron_evolve.kernels import fused, reference
from megatron_evolve.kernels.bench import problem as problems
from megatron_evolve.kernels.bench.problem import Prepared, Problem
from megatron_evolve.kernels.bench.rows import TOLERANCE
from megatron_evolve.kernels.roofline import Shape

CLAMP = 1.5  # half of the pre-activations lie above 0, a sixteenth above this


def through_rows(v: problems.Experts, clamp: float | None = None, main_grads: tuple | None = None) -> Tensor:
    """The layer as Megatron's dispatcher runs it: permuted, the experts from rows, and back."""
    rows, p_rows = fused.permute(v.x_TH, v.p_TK, v.plan)
    options = {"clamp": clamp, "main_grads": main_grads}
    return fused.unpermute(fused.grouped_experts(rows, v.plan.counts_E, p_rows, v.W1_EFH, v.W2_EHF, **options), v.plan)


def clamped(v: problems.Experts) -> tuple[Problem, Prepared]:
    """Experts from rows with a bounded activation."""
    given = {"fresh": (), "given": v.tensors(), "want": lambda: problems.oracle(v, CLAMP), "predicted": {}}
    found = Problem("experts from rows, clamped", {}, v.leaves(), v.dout_TH, **given)
    return found, lambda: through_rows(v, CLAMP)


def into_main_grads(v: problems.Experts) -> dict:
    """Weight gradients added into float32 buffers, twice from the same start; `reason` where one is off."""
    starts = [torch.rand(W.shape, device=W.device) for W in (v.W1_EFH, v.W2_EHF)]
    runs = [[start.clone() for start in starts] for _ in range(2)]
    for main in runs:
        through_rows(v, main_grads=tuple(list(buffer.unbind()) for buffer in main)).backward(v.dout_TH)
        v.x_TH.grad = v.p_TK.grad = None
    want, allowed = problems.oracle(v), TOLERANCE[v.x_TH.dtype]
    added = {name: main - start for name, main, start in zip(("dW1", "dW2"), runs[0], starts, strict=True)}
    errors = {name: problems.error(grad, want[name]) for name, grad in added.items()}
    found = {"errors": errors, "bitwise_repeat": all(torch.equal(a, b) for a, b in zip(*runs, strict=True))}
    wrong = [f"{name} is off by {off:.2g} of its norm; at most {allowed:g}" for name, off in errors.items()]
    wrong = [text for text, off in zip(wrong, errors.values(), strict=True) if not off <= allowed]
    if not found["bitwise_repeat"]:
        wrong.append("a second run gave other bits")
    return found | ({"reason": "; ".join(wrong)} if wrong else {})


def router(device: str, tokens: int, s: Shape) -> tuple[Problem, Prepared]:
    """Shares and their gradient from logits."""
    rng = torch.Generator(device).manual_seed(3)
    logits_TE = torch.randn(tokens, s.experts, generator=rng, device=device).requires_grad_()
    bias_E = torch.randn(s.experts, generator=rng, device=device) / 4
    dp_TK = torch.randn(tokens, s.chosen, generator=rng, device=device)

    def want() -> dict[str, Tensor]:
        wide = logits_TE.detach().double().requires_grad_()
        p_TK = reference.router(wide, bias_E.double(), s.chosen, 2.5)[1]
        return {"out": p_TK.detach(), "dlogits": torch.autograd.grad(p_TK, wide, dp_TK.double())[0]}

    found = Problem("router from logits", {}, {"logits": logits_TE}, dp_TK, (), (logits_TE, bias_E, dp_TK), want, {})
    return found, lambda: fused.router(logits_TE, bias_E, s.chosen, 2.5)[1]


def trained_head(problem: Problem, W_VH: Tensor, target_T: Tensor) -> tuple[Problem, Prepared]:
    """The loss of `checks.loss` with its table trained as well."""
    x_TH = problem.leaves["x"]
    W_VH = W_VH.detach().requires_grad_()

    def want() -> dict[str, Tensor]:
        wide = [t.detach().double().requires_grad_() for t in (x_TH, W_VH)]
        loss_T = reference.linear_cross_entropy(*wide, target_T)
        dx_TH, dW_VH = torch.autograd.grad(loss_T, wide, problem.dout.double())
        want = {"out": loss_T.detach(), "dx": dx_TH}
        del wide, loss_T  # each holds the table in float64, 2.8 GB, as much as its gradient is before it is float32
        return want | {"dW": dW_VH.float()}

    named = {"op": "linear_cross_entropy, trained head", "leaves": {"x": x_TH, "W": W_VH}, "want": want}
    return problem._replace(**named), lambda: fused.linear_cross_entropy(x_TH, W_VH, target_T)


def layer(device: str, width: int, hidden: int, dtype: torch.dtype) -> problems.Experts:
    """Eight experts that are trained whole."""
    return problems.experts(Shape("check", 300, 8, 4, width, hidden), "full", 0.5, dtype, device)
