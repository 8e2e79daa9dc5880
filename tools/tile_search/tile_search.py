#!/usr/bin/env python3
"""Searches the tiles of a kernel for a T4, with no GPU: `flash-attn-jit model` is the judge. What was tried and what
came first goes into a file of records.

    tile_search.py --kinds bwd_dkdv,bwd_dq --head-dims 32,64 --masks full,causal --records records
    tile_search.py --kinds bwd_dkdv --head-dims 32,64 --masks full,causal --tiles default    (no search)

First every shape (rows, columns, warps, dims in registers) with a few schedules, then every schedule of the best
shapes.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# Of a problem's tiles, the best first; with them its default tiles.
KEPT_OF_SEARCH, KEPT_OF_NAMED = 10, 3

# Rows a warp x warps, columns, and what a shape is tried with: (load, barrier, first keys) in eighths.
WARPS, ROWS_PER_WARP, COLUMNS = (2, 4, 8), (16, 32), (8, 16, 24, 32, 48, 64)
FORWARD_SCHEDULES = ((2, 4, 7), (2, 7, 7), (2, 8, 8))
BACKWARD_SCHEDULES = ((0, 4, 8), (0, 7, 8), (0, 8, 8), (2, 8, 8))


class Problem(NamedTuple):
    """What a row of a table of default tiles is for."""

    kind: str
    head_dim: int
    mask: str  # full, causal or window
    features: str  # flags of the program, as in '--alibi --varlen'

    def flags(self) -> list[str]:
        mask = [] if self.mask == "full" else [f"--{self.mask}"]
        return ["--kind", self.kind, "--head-dim", str(self.head_dim), *mask, *shlex.split(self.features)]


class Judged(NamedTuple):
    tile: str
    useful: float  # share of the tensor cores' peak that the main loop reaches
    stress: float  # the same under longer latencies: one that holds up rests on less luck
    block_cycles: list[int]  # of a block, of an iteration, of a masked one, where as many share a multiprocessor as fit
    resident: int
    registers: int
    spilled_bytes: int
    built_by: str


def is_forward(problem: Problem) -> bool:
    return problem.kind == "fwd"


def shapes(problem: Problem) -> Iterator[str]:
    dims = max(16, (problem.head_dim + 7) // 8 * 8)
    in_registers = sorted({dims, dims * 5 // 8 // 16 * 16})
    for warps, rows, n, q in itertools.product(WARPS, ROWS_PER_WARP, COLUMNS, in_registers):
        yield f"m{warps * rows}n{n}w{warps}q{q}"


def schedules(problem: Problem) -> Iterator[str]:
    for load, barrier in itertools.combinations(range(9), 2):
        for first_keys in range(barrier, 9) if is_forward(problem) else [8]:
            yield f"l{load}b{barrier}k{first_keys}"


def shape_of(tile: str) -> str:
    return tile[: tile.index("l")]


def judge_tile(args: argparse.Namespace, problem: Problem, tile: str) -> Judged | None:
    """None where the tile is not legal for the problem, or the model has nothing to say, which is told."""
    nvrtc = ["--nvrtc", args.nvrtc] if args.nvrtc else []
    done = subprocess.run(
        [args.program, "model", *problem.flags(), "--tile", tile, *nvrtc, "--json"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        if f"--tile is '{tile}'" not in done.stderr:
            print(f"{problem} {tile}: {done.stderr.strip()}", file=sys.stderr)
        return None
    said = json.loads(done.stdout)
    cost = said["cycles_of_a_block"][-1]
    return Judged(
        said["tile"],
        round(said["useful"], 4),
        round(said["useful_under_stress"], 4),
        [round(cost[name]) for name in ("block", "iteration", "masked_iteration")],
        len(said["cycles_of_a_block"]),
        said["registers"],
        said["spill_stores"] + said["spill_loads"],
        said["built_by"],
    )


def default_tiles(args: argparse.Namespace, problem: Problem) -> list[str]:
    command = [args.program, "inspect", *problem.flags(), "--emit", "tiles"]
    return subprocess.check_output(command, text=True).split()


class Search:
    """Of one problem."""

    def __init__(self, args: argparse.Namespace, problem: Problem, pool: ThreadPoolExecutor):
        self._args, self._problem, self._pool = args, problem, pool
        self._defaults = default_tiles(args, problem)
        self._judged: dict[str, Judged | None] = {}

    def judge(self, tiles: Iterable[str]) -> None:
        new = [tile for tile in dict.fromkeys(tiles) if tile not in self._judged]
        judged = self._pool.map(lambda tile: judge_tile(self._args, self._problem, tile), new)
        self._judged.update(zip(new, judged))

    def judge_defaults(self) -> None:
        self.judge(self._defaults)

    def best(self) -> list[Judged]:
        return sorted(filter(None, self._judged.values()), key=lambda tile: (-tile.useful, tile.tile))

    def search(self) -> None:
        problem = self._problem
        few = FORWARD_SCHEDULES if is_forward(problem) else BACKWARD_SCHEDULES
        ends = [f"l{load}b{barrier}k{first_keys}" for load, barrier, first_keys in few]
        self.judge_defaults()
        self.judge(shape + end for shape in shapes(problem) for end in ends)
        best_shapes = list(dict.fromkeys(shape_of(tile.tile) for tile in self.best()))[: self._args.refined]
        self.judge(shape + end for shape in best_shapes for end in schedules(problem))

    def record(self) -> dict[str, Any]:
        judged = self.best()
        record = {**self._problem._asdict(), "tried": len(judged)}
        searched = self._args.tiles == "space"
        if searched:
            record["refined"] = self._args.refined
        most = KEPT_OF_SEARCH if searched else KEPT_OF_NAMED
        kept = [tile for i, tile in enumerate(judged) if i < most or tile.tile in self._defaults]
        return {**record, "best": [tile._asdict() for tile in kept]}


def merge(folder: Path, record: dict[str, Any]) -> None:
    """Puts the record into the file of its kind, in the place of the problem's. What a search found stays
    beside tiles that were named."""
    path = folder / f"{record['kind']}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    for old in [r for r in records if all(r[name] == record[name] for name in Problem._fields)]:
        records.remove(old)
        if "refined" not in record:
            judged_anew = {tile["tile"] for tile in record["best"]}
            found = record["best"] + [tile for tile in old["best"] if tile["tile"] not in judged_anew]
            found.sort(key=lambda tile: (-tile["useful"], tile["tile"]))
            record = {**old, "tried": max(old["tried"], len(found)), "best": found}
    records.append(record)
    records.sort(key=lambda r: [str(r[name]).zfill(4) for name in Problem._fields])
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r) for r in records)
    path.write_text(f"[\n{lines}\n]\n")


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", required=True, type=words, help="as for `flash-attn-jit model`")
    parser.add_argument("--head-dims", required=True, type=numbers)
    parser.add_argument("--masks", type=words, default=["full", "causal"])
    parser.add_argument("--features", default="", help="more flags of the kernel, such as '--alibi'")
    parser.add_argument(
        "--tiles", default="space", help="space (search it), default (the program's own), or a list with commas"
    )
    parser.add_argument("--refined", type=int, default=2, help="shapes of which every schedule is tried")
    parser.add_argument("--program", default="flash-attn-jit")
    parser.add_argument("--nvrtc", help="as for `flash-attn-jit model`")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--records", type=Path, help="folder of the files in which the problems' records are replaced")
    args = parser.parse_args()
    if args.tiles not in ("space", "default") and not re.fullmatch(r"(m\d+n\d+w\d+q\d+l\db\dk\d,?)+", args.tiles):
        parser.error(f"--tiles is '{args.tiles}'; accepted: space, default, or tiles with commas")
    return args


def main() -> None:
    args = parse()
    with ThreadPoolExecutor(args.jobs) as pool:
        for mask, kind, head_dim in itertools.product(args.masks, args.kinds, args.head_dims):
            problem = Problem(kind, head_dim, mask, args.features)
            search = Search(args, problem, pool)
            if args.tiles == "space":
                search.search()
            elif args.tiles == "default":
                search.judge_defaults()
            else:
                search.judge(words(args.tiles))
            record = search.record()
            print(json.dumps(record), flush=True)
            if args.records:
                merge(args.records, record)


if __name__ == "__main__":
    main()
