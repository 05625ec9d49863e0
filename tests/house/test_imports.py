"""Imports point down: who may import whom, read from the source with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_evolve.substrate.manifest import MEASURES, trainer_sources

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_evolve"
ROOMS = ("kernels", "launch", "substrate", "eval", "megatron_evolve")

# Room -> prefixes of the project that it may import, itself apart.
MAY_IMPORT = {
    "kernels": (),
    "launch": (),
    # A job's own writing: its folder's files, and whether it may still write there.
    "substrate": ("megatron_evolve.kernels", "megatron_evolve.launch.rundir", "megatron_evolve.launch.fence"),
    "eval": ("megatron_evolve.substrate", "megatron_evolve.launch.rundir", "megatron_evolve.launch.fence"),
    "megatron_evolve": ("megatron_evolve.substrate", "megatron_evolve.launch", "megatron_evolve.eval"),
}
HEAVY = ("torch", "megatron", "transformers", "triton")
TORCH_FREE_FILES = [
    *sorted((ROOT / "launch").rglob("*.py")),
    *sorted((ROOT / "megatron_evolve").rglob("*.py")),
    *sorted((ROOT / "substrate" / "puzzles").rglob("*.py")),
    *(
        ROOT / "substrate" / f"{name}.py"
        for name in [
            "digest",
            "frozen",
            "layout",
            "logs",
            "manifest",
            "mix",
            "operations",
            "ranks",
            "recipe",
            "settings",
            "tokenizer",
        ]
    ),
    *(ROOT / "substrate" / f"{name}.py" for name in ["adapter", "chat", "checkpoint_tokenizer", "exchange"]),
    *(ROOT / "substrate" / "model" / f"{name}.py" for name in ["architecture", "tensor_file", "weight_map"]),
    *(path for path in sorted((ROOT / "substrate" / "plan").glob("*.py")) if path.stem != "measure"),
    *(
        ROOT / "eval" / f"{name}.py"
        for name in [
            "metric",
            "score",
            "suite",
            "paired",
            "discordant",
            "power",
            "seeds",
            "looks",
            "leakage",
            "judge",
            "freeze",
            "probes",
            "reported",
            "hook",
        ]
    ),
    *(
        ROOT / "eval" / "engines" / f"{name}.py"
        for name in ["settings", "versions", "seam", "command", "server", "endpoint", "conversation", "served"]
    ),
]


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_prefix(room: str) -> str:
    return PACKAGE if room == PACKAGE else f"{PACKAGE}.{room}"


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room: str) -> None:
    allowed = (*MAY_IMPORT[room], own_prefix(room))
    if room == PACKAGE:
        allowed = (PACKAGE,)
    for path in sources(room):
        for name in imports(path):
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                assert name.startswith(allowed), f"{path.relative_to(ROOT)} imports {name}; {room} may not"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != PACKAGE])
def test_nobody_below_imports_the_loop(room: str) -> None:
    below = tuple(f"{PACKAGE}.{name}" for name in ROOMS if name != PACKAGE)
    for path in sources(room):
        for name in imports(path):
            if name.startswith(f"{PACKAGE}."):
                assert name.startswith(below), f"{path.relative_to(ROOT)} imports {name}, a room of the loop"


def test_no_trainer_rests_on_what_its_digest_leaves_out() -> None:
    """The files that `trainer_sources` passes over are there, and nothing it covers imports one of them."""
    left_out = [f"{PACKAGE}.{name.removesuffix('.py').strip('/').replace('/', '.')}" for name in MEASURES]
    assert all((ROOT / name).exists() for name in MEASURES)
    for name in trainer_sources():
        for imported in imports(ROOT / name) if name.endswith(".py") else ():
            assert not any(f"{imported}.".startswith(f"{one}.") for one in left_out), f"{name} imports {imported}"


# What is told to a cluster is YAML to its operators; its login is the official client's, imported when it connects.
LAUNCH_EXCEPTIONS = {"kubernetes_manifest.py": {"yaml"}, "kubernetes_client.py": {"kubernetes", "urllib3"}}


def test_launch_needs_the_standard_library_only() -> None:
    for path in sources("launch"):
        for name in imports(path):
            top = name.split(".")[0]
            if top in LAUNCH_EXCEPTIONS.get(path.name, ()):
                continue
            assert top in sys.stdlib_module_names or name.startswith(f"{PACKAGE}.launch"), f"{path}: {name}"


@pytest.mark.parametrize("path", TORCH_FREE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_free_files_name_no_heavy_package(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name}"


def test_torch_free_modules_import_with_torch_blocked() -> None:
    modules = []
    for path in TORCH_FREE_FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
        modules.append(".".join(part for part in parts if part != "__init__"))
    program = (
        "import sys, importlib\n"
        f"for name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick_to_import() -> None:
    """scipy and pyarrow cost more than the whole help page: they are imported where they are used."""
    program = "import sys, megatron_evolve.cli; print([m for m in ('scipy', 'pyarrow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
