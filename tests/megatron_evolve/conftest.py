"""What the loop's tests share: a tiny frozen ground and a whole tiny campaign on it, made once and then only read.

Tests that go on with the campaign, or break it, work on copies.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.megatron_evolve.tiny import WORKER, Ground, environment, settings_on


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One process of the test session at a time."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """The shared ground with its finished campaign. Read only."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-ground"
    root.mkdir(exist_ok=True)
    made = Ground(root)
    with only_one(root / "lock"):
        if (root / "made").exists():
            return made
        # In a process of its own: the tests import no torch.
        source = "from pathlib import Path\nfrom tests.megatron_evolve.tiny import build_tiny\n"
        source += f"build_tiny(Path({str(made.substrate)!r}))"
        subprocess.run([sys.executable, "-c", source], env=environment(), check=True, capture_output=True)
        made.file.write_text(yaml.safe_dump(settings_on(made.substrate), sort_keys=False))
        ended = made.run(made.finished, "--json")
        assert ended.returncode == 0, ended.stderr
        (root / "answer.json").write_text(ended.stdout)
        (root / "made").touch()
    return made


@pytest.fixture
def own_ground(ground: Ground, tmp_path: Path) -> Ground:
    """A copy of the ground, its judge and origin included, for a test that changes it. It has no campaign."""
    mine = Ground(tmp_path / "ground")
    mine.root.mkdir()
    for name in ("substrate", "origin", "store"):
        shutil.copytree(ground.root / name, mine.root / name)
    mine.file.write_text(yaml.safe_dump(settings_on(mine.substrate), sort_keys=False))
    return mine


@pytest.fixture
def copy_of_finished(ground: Ground, tmp_path: Path) -> Path:
    """A copy of the finished campaign. Files are links to the first: replace one, never write into it."""
    own = shutil.ignore_patterns("controller.lock", "warm.*")
    return Path(shutil.copytree(ground.finished, tmp_path / "copy", copy_function=os.link, ignore=own))


@pytest.fixture
def variant(ground: Ground, tmp_path: Path) -> Callable[..., Path]:
    """Writes the campaign with some settings replaced, by dotted path, and returns the file."""

    def write(settings: dict[str, Any] | None = None, name: str = "variant", **changes: Any) -> Path:
        document = json.loads(json.dumps(settings or ground.settings()))
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = document
            for part in parents:
                place = place.setdefault(part, {})
            place[last] = value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        return file

    return write


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[str], list[str]]:
    """A worker's program: `calls` counts from 0, `answer(change)` proposes."""

    def write(body: str) -> list[str]:
        path = tmp_path / "worker.py"
        path.write_text(WORKER.format(asked=str(tmp_path / "asked"), body=body))
        return [sys.executable, str(path)]

    return write
