"""One page of several grids: the committed results give the committed page, and files that do not fit are refused."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.worlds.merge import merged
from tests.megatron_evolve.test_worlds import CODE, result

COMMITTED = Path(__file__).parents[2] / "docs" / "results"


def grid_file(folder: Path, name: str, *worlds: str, code: str = CODE, **changes: int) -> Path:
    document = {"schema": "worlds/1", "campaign": "demo", "rounds": 3, "seeds": 2, **changes}
    document["worlds"] = [{"name": world} for world in worlds]
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps({"grid": document, "code": code, "digest": CODE}))
    return path


def result_file(path: Path, world: str, number: int, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    one = result(world=world, campaign=f"{world}-{number}", **changes)
    path.write_text(json.dumps(one.model_dump(mode="json", by_alias=True)))
    return path


def test_the_committed_results_give_the_committed_page() -> None:
    """Below its head, `worlds.md` is what `megatron-evolve worlds-table docs/results/worlds` prints."""
    title, body = merged([COMMITTED / "worlds"])["table"].split("\n\n", 1)
    page = (COMMITTED / "worlds.md").read_text()
    assert page.startswith(f"{title}\n\n") and page.endswith(body)
    told = CliRunner().invoke(app, ["worlds-table", str(COMMITTED / "worlds")])
    assert told.exit_code == 0 and told.output.strip().endswith(body.strip())


def test_grids_of_several_versions_make_one_table(tmp_path: Path) -> None:
    """Copied files and a folder as a run leaves it; rows stand in the order of the grids, then of their numbers."""
    copied, run = tmp_path / "copied", tmp_path / "run"
    grid_file(copied, "grid.json", "b", "a")
    grid_file(run, "grid.json", "c", code="1" * 64)
    for world, number in (("a", 2), ("a", 1), ("b", 1)):
        result_file(copied / f"{world}-{number}.json", world, number)
    result_file(run / "c" / "1" / "result.json", "c", 1, decisions="1" * 64)
    (run / "worlds.json").write_text("{}")
    found = merged([copied, run])
    assert [one["campaign"] for one in found["campaigns"]] == ["b-1", "a-1", "a-2", "c-1"]
    assert [one["world"] for one in found["worlds"]] == ["b", "a", "c", "all worlds"]
    assert (found["finished"], found["planned"], found["code"]) == (4, 6, f"{CODE[:12]}, {'1' * 12}")
    assert "2 versions of the code" in found["table"] and found["rounds"] == 3
    assert merged(sorted(copied.iterdir())) == merged([copied])


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    grid_file(first, "grid.json", "a")
    one = result_file(first / "a-1.json", "a", 1)
    cases: list[tuple[list[Path], str]] = [([one], "grid.json"), ([tmp_path / "none"], "found none")]
    cases.append(([first, grid_file(other, "more-rounds.json", "b", rounds=4)], "rounds 3 and 4"))
    cases.append(([first, grid_file(other, "same.json", "a")], "every world in one grid"))
    cases.append(([first, result_file(other / "b-1.json", "b", 1)], "no grid given has campaign b-1"))
    cases.append(([first, result_file(other / "a-1.json", "a", 1, seed=8)], "another a-1"))
    for paths, said in cases:
        with pytest.raises(ValueError, match=said) as caught:
            merged(paths)
        assert "\n" not in str(caught.value)
    shutil.copy(one, other / "again.json")
    assert merged([first, other / "again.json"]) == merged([first]), "the same file twice is the same campaign"
