"""Nothing in the loop knows a family, a cue or a round by name: whether it discovers anything must be a fact."""

import ast
from pathlib import Path

import pytest

import megatron_evolve

ROOM = Path(megatron_evolve.__file__).resolve().parent
SOURCES = sorted(ROOM.rglob("*.py"))

# The operator's own files may name the knob of the operator's pool; nothing that decides may.
OPERATORS_FILES = {
    "campaign.py": "campaign file: the pool to build",
    "prepare.py": "builds it",
    "cli.py": "refreezes it",
    "grid.py": "grid of worlds: the pools to build",
    "ground.py": "builds them",
    "leaks.py": "draws the rows of a finished run again, for people; nothing that decides reads it",
}


def names_of(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.keyword | ast.arg):
            found.append(node.arg or "")
    return found


def strings_of(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def compared_rounds(tree: ast.AST) -> list[int]:
    """Lines that compare something called a round with a constant."""

    def is_round(node: ast.AST) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return name.endswith(("round", "round_number"))

    def is_number(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and isinstance(node.value, int | float)

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(is_round, sides)) and any(map(is_number, sides)):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOM).as_posix())
def test_no_family_no_cue_no_round(path: Path) -> None:
    families = pytest.importorskip("megatron_evolve.substrate.puzzles.families").FAMILIES
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = [text for text in strings_of(tree) if any(name in text for name in families)]
    assert not told, f"family names in {path.name}: {told}"
    if path.name not in OPERATORS_FILES:
        assert "cue_rate" not in names_of(tree)
        assert not [text for text in strings_of(tree) if "cue_rate" in text]
    assert not compared_rounds(tree), f"{path.name} compares a round with a number"


def test_the_test_sees_what_it_looks_for() -> None:
    tree = ast.parse("def f(policy, cue_rate):\n    return policy.round >= 3 and 'x' in policy.cue_rate")
    assert compared_rounds(tree) == [2]
    assert names_of(tree).count("cue_rate") == 2
    assert "x" in strings_of(tree)
