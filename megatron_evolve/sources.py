"""Which version of the code decided: one digest over the source files that decisions are made by."""

from pathlib import Path

from megatron_evolve.substrate.digest import digest_file, digest_of

# What turns a round's answers into the next round: evidence, verdict, policy.
POLICY = ("axes.py", "campaign.py", "candidate.py", "comparisons.py", "constitution.py", "dead_ends.py", "delta.py")
POLICY += ("edits.py", "evidence.py", "facts.py", "gap.py", "meta.py", "origin.py", "policy.py", "promotion.py")
POLICY += ("proposals.py", "reading.py", "released.py", "review.py", "stance.py", "verdict.py", "window.py")
PAGES = ("contest/table.py", "contest/real_table.py")  # they tell what came, and decide nothing
STATISTICS = ("discordant.py", "looks.py", "paired.py", "power.py", "reported.py", "score.py", "seeds.py")
SETTINGS = ("digest.py", "frozen.py", "mix.py", "recipe.py", "settings.py")  # what a candidate is, and its name


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


def policy_sources() -> dict[str, str]:
    """sha256 of each file of this package, of `eval` and of `substrate` that a campaign's decision rests on, by name.

    Which modules are left out, and why, stands in tests/megatron_evolve/test_contest.py.
    """
    here = Path(__file__).resolve().parent
    found = {name: here / name for name in POLICY}
    for name in ("contest", "simulate", "workers"):
        found |= {f"{name}/{path.name}": path for path in (here / name).glob("*.py")}
    for room, names in (("eval", STATISTICS), ("substrate", SETTINGS)):
        found |= {f"{room}/{name}": _beside(here, room) / name for name in names}
    return {name: digest_file(path) for name, path in sorted(found.items()) if name not in PAGES}


def _beside(here: Path, room: str) -> Path:
    """A room of the package: inside it when installed, beside it in a checkout."""
    return here / room if (here / room).is_dir() else here.parent / room
