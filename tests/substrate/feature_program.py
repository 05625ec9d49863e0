"""One rank that takes a few steps of a model with every feature, in several layouts; for `test_model_feature_layouts`.

    python feature_program.py WEIGHTS FOLDER CASES.json

Latent experts, prediction heads, and rows of packed sequences, one row a micro-batch. The last rank, which has the
losses in every layout, writes for each case its steps: main loss, loss of each depth, gradient norm. Losses are made
without logits in a `frozen` case, whose output table is not trained, and with `chunk_bytes` of logits less than all.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_evolve.kernels.backend import LOSS_CHUNK_BYTES
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.train.preload import preload
from tests.substrate.enlarged import SMALL

ARCHITECTURE = Architecture.model_validate(
    SMALL.model_dump() | {"latent_size": 24, "mtp_pattern": "*E", "mtp_depths": 2}
)
LENGTHS = [[5, 1, 40, 2], [16, 31, 1], [48], [24, 24]]
STEPS = 4


def steps_of(weights: Path, frozen: bool) -> list[list[float]]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megatron_evolve.substrate.model.packed import PackedSequences
    from megatron_evolve.substrate.model.weights import load_part

    model = build.build_model(ARCHITECTURE, seed=2, finalize_model_grads_func=finalize_model_grads)
    load_part([model], [weights])
    if frozen and model.post_process:
        model.output_layer.requires_grad_(False)
        assert model.fuses(1)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)

    def forward_step(rows: Any, model: Any) -> tuple[Any, Any]:
        row, lengths = next(rows)
        output = model(row, None, None, labels=row.roll(-1, 1), packed_seq_params=PackedSequences(lengths))
        return output, lambda loss: (loss.mean(), loss.mean().detach())

    batches = torch.randint(0, 77, (STEPS, len(LENGTHS), 1, 48), generator=torch.Generator().manual_seed(0))
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    measured = []
    for batch in batches:
        rows = list(zip(batch, LENGTHS, strict=True))[rank::copies]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(rows),
            model=model,
            num_microbatches=len(rows),
            seq_length=48,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        if losses:
            heads = MTPLossLoggingHelper.tracker["loss_values"] / len(rows)
            mean = torch.stack([torch.stack(losses).mean(), *heads])
            torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
            measured.append([*(mean / copies).tolist(), float(norm)])
            MTPLossLoggingHelper.clean_metrics_in_tracker()
    return measured


def main(weights: str, folder: str, cases: str) -> None:
    preload()
    found = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        os.environ["MASTER_PORT"] = str(case["port"])
        LOSS_CHUNK_BYTES["eager"] = case.get("chunk_bytes", 2**26)
        build.start(1, Layout.from_text(case["layout"]))
        found[name] = steps_of(Path(weights), case.get("frozen", False))
        build.stop()
    if os.environ.get("RANK") == "1" or "RANK" not in os.environ:
        Path(folder, f"{os.environ.get('WORLD_SIZE', '1')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
