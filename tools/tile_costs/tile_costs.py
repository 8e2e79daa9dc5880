#!/usr/bin/env python3
"""Makes generator/tile_costs.inc: what a block of every default tile costs on a Turing multiprocessor, as
`flash-attn-jit model` says. The library chooses among default tiles by it.

    tile_costs.py --nvrtc PATH > generator/tile_costs.inc
"""

import argparse
import itertools
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

KINDS = ("fwd", "bwd_dkdv", "bwd_dq", "bwd_all_keys", "decode")
MASKS = ("full", "causal", "window")
DIMS = range(16, 257, 16)
MOST_DIMS = {"bwd_all_keys": 128}  # of a kind that has fewer; its rows above are empty


class Problem(NamedTuple):
    kind: str
    mask: str
    head_dim: int

    def __str__(self) -> str:
        return f"{self.kind} {self.mask} {self.head_dim}"

    def flags(self) -> list[str]:
        mask = [] if self.mask == "full" else [f"--{self.mask}"]
        return ["--kind", self.kind, "--head-dim", str(self.head_dim), *mask]


def output_of(args: argparse.Namespace, *command: str) -> str:
    nvrtc = ["--nvrtc", args.nvrtc] if args.nvrtc and command[0] == "model" else []
    return subprocess.check_output([args.program, *command, *nvrtc], text=True)


def default_tiles(args: argparse.Namespace, problem: Problem) -> list[str]:
    if problem.head_dim > MOST_DIMS.get(problem.kind, DIMS[-1]):
        return []
    return output_of(args, "inspect", *problem.flags(), "--emit", "tiles").split()


def cost_of(args: argparse.Namespace, problem: Problem, tile: str) -> dict[str, Any]:
    prediction: dict[str, Any] = json.loads(output_of(args, "model", *problem.flags(), "--tile", tile, "--json"))
    return prediction


def text_of(prediction: dict[str, Any]) -> str:
    costs = prediction["cycles_of_a_block"]
    alone, sharing = (
        "{" + ", ".join(str(round(cost[name])) for name in ("block", "iteration", "masked_iteration")) + "}"
        for cost in (costs[0], costs[-1])
    )
    rows, columns, warps = re.match(r"m(\d+)n(\d+)w(\d+)", prediction["tile"]).groups()  # type: ignore[union-attr]
    return f"{{{rows}, {columns}, {warps}, {len(costs)}, {alone}, {sharing}}}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="flash-attn-jit")
    parser.add_argument("--nvrtc", help="as for `flash-attn-jit model`")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="problems, such as 'fwd full 64,bwd_dq causal 32'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    args = parse()
    problems = [Problem(*each) for each in itertools.product(KINDS, MASKS, DIMS)]
    if args.only:
        problems = [problem for problem in problems if str(problem) in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        tiles = list(pool.map(lambda problem: default_tiles(args, problem), problems))
        jobs = [[pool.submit(cost_of, args, problem, tile) for tile in each] for problem, each in zip(problems, tiles)]
    print("// Made by tools/tile_costs. Kinds, masks and head dims in their order; of each its default tiles:")
    print("// {rows, columns, warps, blocks that share a multiprocessor,")
    print("//  {block, iteration, masked iteration} alone, sharing}")
    for problem, predictions in zip(problems, jobs):
        row = ", ".join(text_of(job.result()) for job in predictions)
        print(f"{{{{{row}}}}},  // {problem}")


if __name__ == "__main__":
    main()
