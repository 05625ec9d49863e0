"""The ground of a world: the base substrate's weights over a pool of training rows with the world's cue.

Weights are trained without any cue, so one build serves every world, and worlds of one pool share one frozen substrate
and with it the origin's trained runs.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_evolve.campaign import SubstrateSpec
from megatron_evolve.launch.job import Launcher
from megatron_evolve.prepare import Progress, build_substrate
from megatron_evolve.substrate.build import refreeze
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import nearest
from megatron_evolve.substrate.manifest import trainer_sources, verify


def substrate_of(
    spec: SubstrateSpec, cue: Mapping[str, float], store: Path, launcher: Launcher, on_progress: Progress
) -> Path:
    """The folder of the frozen substrate with this cue in its pool. Raises ValueError for a family it does not have."""
    folder = build_substrate(spec, store, launcher, on_progress)
    base = verify(folder)
    for family in cue:
        if family not in base.construction.families:
            raise ValueError(
                f"substrate {base.name} has no rows of {family!r} for a cue"
                f"{nearest(family, list(base.construction.families))}"
            )
    construction = base.construction.replace(cue_rate=dict(sorted(cue.items())))
    if construction == base.construction:
        return folder
    files = {name: file.model_dump(mode="json") for name, file in base.files.items()}
    name = digest_of({"files": files, "construction": construction, "trainer": trainer_sources()})[:12]
    sibling = (store / "substrates" / f"{base.name}-{name}" / "substrate").resolve()
    refreeze(folder, sibling, construction=construction)
    return sibling
