"""One rank that writes a model as a checkpoint in two ways and tells what they took; for `test_hand_on`.

python hand_on_program.py WEIGHTS FOLDER CASES.json
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_evolve.launch.rundir import RunDirError
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.train.preload import preload

WIDE = Architecture.model_validate(
    NANO_CPU.model_dump()
    | {"name": "wide", "pattern": "MEME", "hidden_size": 512, "num_experts": 16, "expert_ffn_size": 768}
)


def peak_growth(work: Any) -> int:
    """Bytes by which the process grows at most while `work()` runs: the kernel's high-water mark, set back before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(_: str, folder: str, cases: str) -> None:
    preload()
    import torch

    from megatron_evolve.substrate.model.parts import Whole
    from megatron_evolve.substrate.train.checkpoint import save_checkpoint
    from megatron_evolve.substrate.train.run import hand_on

    ((_, case),) = json.loads(Path(cases).read_text()).items()
    os.environ["MASTER_PORT"] = str(case["port"])
    rank = build.start(1, Layout.from_text(case["layout"])).rank
    chunks = build.build_chunks(WIDE, seed=2)
    fields = {"kind": "weights", "step": 1, "run": "r", "state": {}}

    def stream() -> None:
        hand_on(chunks, Path(folder, "streamed"), **fields)

    def gather() -> None:
        tensors = dict(Whole(chunks))
        if rank == 0:
            save_checkpoint(Path(folder, "gathered"), tensors={"weights": tensors}, **fields)

    def refused() -> str:
        try:
            hand_on(chunks, Path("/proc/nowhere/checkpoint"), **fields)
        except RunDirError as error:
            return str(error)
        return ""

    start = time.monotonic()
    said = refused()
    torch.distributed.barrier()  # nobody waits for rank 0 where it could not write
    whole = Whole(chunks)
    sizes = [part.dtype.itemsize * torch.Size(part.shape).numel() for part in whole.parts]
    told = {"refused": said, "largest": max(sizes), "bytes": sum(sizes), "waited": time.monotonic() - start}
    told |= {"streamed": peak_growth(stream), "gathered": peak_growth(gather)}
    if rank == 0:
        Path(folder, "2.json").write_text(json.dumps({"wide": told}))
    build.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
