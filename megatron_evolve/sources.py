"""Which version of the code decided: one digest over the source files that decisions are made by."""

from pathlib import Path

from megatron_evolve.substrate.digest import digest_file, digest_of


def decision_sources() -> str:
    """sha256 over the sources of the loop and of the paired statistics."""
    here = Path(__file__).resolve().parent
    rooms = {"megatron_evolve": here, "eval": _beside(here, "eval"), "substrate": _beside(here, "substrate")}
    return digest_of(
        {
            f"{room}/{path.relative_to(base).as_posix()}": digest_file(path)
            for room, base in rooms.items()
            for path in sorted(base.rglob("*.py"))
        }
    )


def _beside(here: Path, room: str) -> Path:
    """A room of the package: inside it when installed, beside it in a checkout."""
    return here / room if (here / room).is_dir() else here.parent / room
