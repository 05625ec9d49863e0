"""Some thirty faults on campaigns with real jobs: each ends as the one that nothing disturbed."""

from pathlib import Path

import pytest

from tests.faults.real_jobs import FROM_OUTSIDE, check, few, many, small, torment
from tests.megatron_evolve.tiny import Ground

pytestmark = pytest.mark.slow

HEAVY = 3  # of some nine faults each
LIGHT = (5, 14)  # schedules of one to three, of the same story
LEAST = 25


def test_struck_campaigns_end_as_the_undisturbed_one(ground: Ground, tmp_path: Path) -> None:
    file, calm = small(ground, tmp_path / "small.yaml"), tmp_path / "calm"
    ended = ground.run(calm, file=file)
    assert ended.returncode == 0, ended.stderr
    fell: list[str] = []
    for name, plan, seed in [(f"many-{seed}", many(seed), seed) for seed in range(HEAVY)] + [
        (f"few-{seed}", few(seed), seed) for seed in LIGHT
    ]:
        struck = torment(ground, tmp_path / name, file, plan, seed)
        check(struck, calm)
        fell += struck.fell
    assert len(fell) >= LEAST, fell
    assert "flipped byte" in fell
    assert set(FROM_OUTSIDE) & set(fell)
