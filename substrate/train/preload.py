"""The imports a run needs, in one call, so that a warm parent can pay for them once and fork.

Starts no thread, opens no group and touches no file of a campaign: a child made by fork afterwards is as good as a
cold one.
"""

from megatron_evolve.substrate.model import build


def preload() -> None:
    """Import torch, Megatron and everything that training and decoding use; supply what this machine lacks. Idempotent.

    On a CPU torch is held to one thread: runs fill the cores, one each, and one thread adds in one order, so that the
    same seed gives the same bits on any load.
    """
    build.prepare()
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    # The first optimizer imports mimo and torch._dynamo: .7 CPU-seconds of every child that trains, were they not here.
    import megatron.core.distributed.finalize_model_grads
    import megatron.core.models.mimo.model.base
    import megatron.core.optimizer
    import megatron.core.optimizer_param_scheduler
    import megatron.core.pipeline_parallel.schedules  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo

    import megatron_evolve.substrate.model.decode
    import megatron_evolve.substrate.model.lora
    import megatron_evolve.substrate.train.run  # noqa: F401
