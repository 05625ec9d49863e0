"""One page over the results of several grids, whichever code ran them. Reads result files, runs nothing.

A grid is its `grid.json` with the `result.json` of each finished campaign: a folder as `megatron-evolve worlds` leaves
it, or one to which those files were copied under other names, of several grids if need be. Which file is what stands in
it. Grids come in the order of their files' names, rows in the order of their grid.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_evolve.launch.rundir import read_json
from megatron_evolve.worlds.grid import Grid
from megatron_evolve.worlds.table import CampaignResult, document_of

OWN_PAGE = "worlds.json"  # what a folder's own run made of it


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The result of all grids together. Raises ValueError in one sentence for files that do not fit together."""
    grids: list[tuple[str, Grid, str]] = []
    results: dict[tuple[str, str], CampaignResult] = {}
    for path in _files(paths):
        found = read_json(path)
        if "grid" in found:
            grids.append((path.stem, Grid.parse(found["grid"], where=str(path)), found["code"]))
            continue
        one = CampaignResult.parse(found, where=str(path))
        if results.setdefault((one.world, one.campaign), one) != one:
            raise ValueError(f"{path}: expected each campaign once, got another {one.campaign}: leave one of them out")
    grids.sort(key=lambda one: one[0])
    if not grids:
        raise ValueError("expected the grid.json of at least one grid, got none: add it to the result files")
    rows = _in_order([grid for _, grid, _ in grids], results)
    facts = {**_shared([grid for _, grid, _ in grids]), "finished": len(rows)}
    facts["code"] = ", ".join(dict.fromkeys(code[:12] for *_, code in grids))
    return document_of(facts, [world.name for _, grid, _ in grids for world in grid.worlds], rows)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
            continue
        found = [*sorted(path.glob("*.json")), *sorted(path.glob("*/*/result.json"))]
        if not found:
            raise ValueError(f"expected result files of a grid in {path}, found none: give its folder or its files")
        yield from (one for one in found if one.name != OWN_PAGE)


def _in_order(grids: Sequence[Grid], results: dict[tuple[str, str], CampaignResult]) -> list[CampaignResult]:
    """Every result at its place in the grids."""
    worlds = [(world.name, grid.seeds) for grid in grids for world in grid.worlds]
    places = [(name, f"{name}-{index + 1}") for name, seeds in worlds for index in range(seeds)]
    if len(set(places)) < len(places):
        raise ValueError("expected every world in one grid, got one in two: give them different pages")
    if strangers := sorted(set(results) - set(places)):
        raise ValueError(f"no grid given has campaign {strangers[0][1]}: add the grid.json of its grid")
    return [results[place] for place in places if place in results]


def _shared(grids: Sequence[Grid]) -> dict[str, Any]:
    """What a page says once of all its campaigns."""
    first = grids[0]
    for other in grids[1:]:
        for name in ("campaign", "rounds", "truth"):
            if getattr(first, name) != getattr(other, name):
                raise ValueError(
                    f"expected grids of one size on one page, got {name} {getattr(first, name)} and "
                    f"{getattr(other, name)}: give each a page of its own"
                )
    return {
        "rounds": first.rounds,
        "base": Path(first.campaign).stem,
        "planned": sum(len(grid.worlds) * grid.seeds for grid in grids),
        "dev": first.truth.dev,
        "external": first.truth.external,
    }
