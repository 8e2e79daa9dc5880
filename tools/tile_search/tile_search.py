#!/usr/bin/env python3
"""Searches the tiles of a kernel, with no GPU: compiles each with `flash-attn-jit inspect`, lets a judge say from the
machine code how well it will run, and writes what was tried and what came first into a file of records.

    tile_search.py --kind bwd_dkdv --head-dims 32,64 --masks full,causal --judge JUDGE --records records/bwd_dkdv.json
    tile_search.py --kind bwd_dkdv --head-dims 32,64 --masks full,causal --judge JUDGE --tiles default    (no search)

JUDGE is a command with {cubin}, {threads}, {dynamic_smem} and {useful_mma} in it, as `inspect --emit resources` names
them, that prints JSON whose `useful` is the share of the tensor cores' peak that the kernel's main loop reaches. It is
run once more with ` --stress` behind it, for the share under longer latencies: one that holds up rests on less luck.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

KEPT = 8  # of a problem's tiles, the best first


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
    useful: float
    stress: float
    registers: int
    spilled_bytes: int
    built_by: str


def tile_space(args: argparse.Namespace) -> Iterator[str]:
    """Every tile that the arguments allow; the program refuses those that are not legal."""
    shapes = itertools.product(args.block_m, args.block_n, args.warps, args.register_dims)
    for (m, n, warps, q), load in itertools.product(shapes, range(8)):
        for barrier in range(load + 1, 9):
            for first_keys in [8] if args.kind.startswith("bwd") else range(barrier, 9):
                yield f"m{m}n{n}w{warps}q{q}l{load}b{barrier}k{first_keys}"


def default_tiles(args: argparse.Namespace, problem: Problem) -> list[str]:
    command = [args.program, "inspect", *problem.flags(), "--emit", "tiles"]
    return subprocess.check_output(command, text=True).split()


def judge_tile(args: argparse.Namespace, problem: Problem, tile: str) -> Judged | None:
    """None where the tile is not legal for the problem."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, resources = Path(folder, "kernel.cubin"), Path(folder, "resources.json")
        files = ["--emit", "cubin", "-o", str(cubin), "--resources", str(resources)]
        made = subprocess.run(
            [args.program, "inspect", *problem.flags(), "--tile", tile, *files],
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode != 0:
            if f"--tile is '{tile}'" in made.stderr:
                return None
            sys.exit(f"{problem} {tile}: {made.stderr}")
        facts = json.loads(resources.read_text())
        command = args.judge.format(cubin=cubin, **facts)
        useful, stress = (
            json.loads(subprocess.check_output(shlex.split(command + end), text=True))["useful"]
            for end in ("", " --stress")
        )
    return Judged(
        facts["tile"],
        round(useful, 4),
        round(stress, 4),
        facts["registers"],
        facts["spill_stores"] + facts["spill_loads"],
        facts["built_by"],
    )


def judge_all(args: argparse.Namespace, problem: Problem, tiles: list[str], pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The record of a problem: which tiles were tried, as far as the time went, and the best of them."""
    end = time.monotonic() + args.seconds

    def judge(tile: str) -> Judged | None:
        return judge_tile(args, problem, tile) if time.monotonic() < end else None

    judged = sorted(filter(None, pool.map(judge, tiles)), key=lambda tile: -tile.useful)
    record = {**problem._asdict(), "tried": len(judged)}
    if args.tiles == "space":
        record["space"] = {name: getattr(args, name) for name in ("block_m", "block_n", "warps", "register_dims")}
    record["best"] = [tile._asdict() for tile in judged[:KEPT]]
    return record


def merge(path: Path, record: dict[str, Any]) -> None:
    """Puts the record into the file, in the place of the problem's; tiles found earlier stay if they are others."""
    records = json.loads(path.read_text()) if path.exists() else []
    for old in [r for r in records if all(r[name] == record[name] for name in Problem._fields)]:
        records.remove(old)
        judged_anew = {tile["tile"] for tile in record["best"]}
        record["best"] += [tile for tile in old["best"] if tile["tile"] not in judged_anew]
        record["best"].sort(key=lambda tile: -tile["useful"])
        record = {**old, **record, "tried": max(record["tried"], old["tried"], len(record["best"]))}
    records.append(record)
    records.sort(key=lambda r: [str(r[name]).zfill(4) for name in Problem._fields])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r) for r in records)
    path.write_text(f"[\n{lines}\n]\n")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, help="as for `flash-attn-jit inspect`")
    parser.add_argument("--head-dims", required=True, type=numbers)
    parser.add_argument("--masks", default="full,causal")
    parser.add_argument("--features", default="", help="more flags of the kernel, such as '--alibi'")
    parser.add_argument(
        "--tiles", default="space", help="space (search it), default (the program's own), or a list with commas"
    )
    parser.add_argument("--block-m", type=numbers, default=[64, 128, 256])
    parser.add_argument("--block-n", type=numbers, default=[8, 16, 24, 32])
    parser.add_argument("--warps", type=numbers, default=[4, 8])
    parser.add_argument("--register-dims", type=numbers, default=[], help="default: all dims of the head")
    parser.add_argument("--judge", required=True)
    parser.add_argument("--program", default="flash-attn-jit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=600, help="for each problem; what is tried first is drawn")
    parser.add_argument("--records", type=Path, help="JSON file in which the problems' records are replaced")
    return parser.parse_args()


def main() -> None:
    args = parse()
    every_dim = not args.register_dims
    with ThreadPoolExecutor(args.jobs) as pool:
        for head_dim, mask in itertools.product(args.head_dims, args.masks.split(",")):
            if every_dim:
                args.register_dims = [(head_dim + 15) // 16 * 16]
            problem = Problem(args.kind, head_dim, mask, args.features)
            if args.tiles == "space":
                tiles = list(tile_space(args))
                random.Random(1).shuffle(tiles)
            else:
                tiles = default_tiles(args, problem) if args.tiles == "default" else args.tiles.split(",")
            record = judge_all(args, problem, tiles, pool)
            print(json.dumps(record), flush=True)
            if args.records:
                merge(args.records, record)


if __name__ == "__main__":
    main()
