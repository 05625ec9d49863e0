"""However the package is installed, it imports under one root and leaves other people's `kernels` package alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import megatron_evolve.kernels.reference, megatron_evolve.launch.job, megatron_evolve.substrate.digest
import megatron_evolve.eval.metric, megatron_evolve.workers.brief, megatron_evolve.campaign
import kernels
print(megatron_evolve.substrate.digest.__file__)
print(kernels.WHOSE)
print(sorted(path.stem for path in megatron_evolve.campaign.SHIPPED.glob("*.yaml")))
"""


def run(*argv: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's package called `kernels`, as PyPI has one."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    return folder


@pytest.mark.slow
def test_plain_install(tmp_path: Path, theirs: Path) -> None:
    target = tmp_path / "site"
    source = tmp_path / "source"
    # Built from a copy, since setuptools leaves a build folder behind.
    tracked = run("git", "ls-files", cwd=ROOT).split() if (ROOT / ".git").exists() else None
    if tracked is None:
        pytest.skip("not a git checkout, so what belongs to the source is unknown")
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", str(target), str(source), cwd=tmp_path)
    out = run(sys.executable, "-S", "-c", _with_dependencies(), cwd=tmp_path, PYTHONPATH=f"{target}:{theirs}")
    place, whose, campaigns = out.splitlines()
    assert place.startswith(str(target))
    assert whose == "theirs"
    assert "demo" in campaigns
    assert not (target / "kernels").exists()
    assert (target / "megatron_evolve" / "slurm" / "train.sbatch").is_file()
    assert {"worlds", "matrix", "score-only"} <= {path.stem for path in target.glob("megatron_evolve/worlds/*.yaml")}


def test_from_the_checkout(theirs: Path, tmp_path: Path) -> None:
    out = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, PYTHONPATH=f"{theirs}:{ROOT}")
    place, whose, campaigns = out.splitlines()
    assert place == str(ROOT / "substrate" / "digest.py")
    assert whose == "theirs"
    assert "demo" in campaigns


def _with_dependencies() -> str:
    """The program without this environment's own (perhaps editable) install, but with its dependencies."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    return f"import sys; sys.path.append({site!r})\n{PROGRAM}"


def test_setup_lists_every_sub_package() -> None:
    source = (ROOT / "setup.py").read_text()
    for room in ("kernels", "launch", "substrate", "eval", "megatron_evolve"):
        for init in (ROOT / room).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT).as_posix()
            assert folder == "megatron_evolve" or f'"{folder}"' in source, f"setup.py does not list {folder}"


def test_top_folders_are_no_packages_of_their_own() -> None:
    for room in ("kernels", "launch", "substrate", "eval"):
        assert not (ROOT / room / "__init__.py").exists()
