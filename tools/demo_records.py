"""Writes the records of `python -m flash_attn_jit.report --demo`: what the card's model says of some problems on a T4.

Every figure in them is a prediction (`flash-attn-jit model`, which needs no GPU, but an NVRTC): the timer is "model",
and no candidate has a sample. Candidates are the default tiles and the best of tools/tile_search/records.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "python" / "flash_attn_jit" / "data" / "demo_records.json"


class Problem(NamedTuple):
    kind: str
    head_dim: int
    mask: str
    batch: int
    heads: int
    seqlen: int

    def kernel_flags(self) -> list[str]:
        flags = ["--kind", self.kind, "--head-dim", str(self.head_dim)]
        return [*flags, "--causal"] if self.mask == "causal" else flags

    def size_flags(self) -> list[str]:
        lengths = ["--seqlen-q", str(self.seqlen), "--seqlen-k", str(self.seqlen)]
        return ["--batch", str(self.batch), "--heads", str(self.heads), *lengths]


def problems() -> list[Problem]:
    kernels = list(itertools.product(("fwd", "bwd_dkdv", "bwd_dq"), (64, 128), ("full", "causal")))
    large = [Problem(*kernel, 4, 16, seqlen) for kernel in kernels for seqlen in (1024, 4096)]
    short = [
        Problem(kind, head_dim, mask, batch, 12, seqlen)
        for kind, batch, seqlen in (("fwd", 1, 197), ("bwd_all_keys", 32, 128))
        for head_dim in (64, 128)
        for mask in ("full", "causal")
    ]
    return large + short


def default_tiles(program: str, problem: Problem) -> list[str]:
    command = [program, "inspect", *problem.kernel_flags(), "--emit", "tiles"]
    return subprocess.check_output(command, text=True).split()


def searched_tiles(problem: Problem, most: int) -> list[str]:
    records = json.loads((ROOT / "tools" / "tile_search" / "records" / f"{problem.kind}.json").read_text())
    return [
        tile["tile"]
        for record in records
        if (record["head_dim"], record["mask"], record["features"]) == (problem.head_dim, problem.mask, "")
        for tile in record["best"][:most]
    ]


def ask(program: str, problem: Problem, tile: str) -> dict[str, Any] | None:
    """What the model says; None where the tile is not legal for the problem any more; "auto" always is."""
    command = [
        program,
        "model",
        *problem.kernel_flags(),
        "--tile",
        tile,
        *problem.size_flags(),
        "--gpu",
        "t4",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2 and "--tile" in done.stderr:
        return None
    if done.returncode != 0:
        sys.exit(f"{problem} {tile}: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def candidate(tile: str, answer: dict[str, Any]) -> dict[str, Any]:
    known = ("registers", "spill_stores", "spill_loads", "threads", "static_smem", "dynamic_smem")
    return {
        "tile": tile,
        "outcome": "measured",
        "reason": "",
        "predicted_seconds": answer["seconds"],
        "limited_by": answer.get("limit", ""),
        **{name: answer.get(name) for name in known},
        "blocks_per_multiprocessor": answer.get("blocks_per_multiprocessor"),
        "compile_seconds": None,
        "error": None,
        "error_allowed": None,
        "samples": [],
        "median_seconds": answer["seconds"],
        "low_seconds": answer["seconds"],
        "high_seconds": answer["seconds"],
    }


def power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def peaks(answers: list[dict[str, Any]]) -> dict[str, float | None]:
    """The card's, as the model takes them: those of the tensor cores follow from a share of them."""
    card, problem = answers[0].get("card", {}), answers[0].get("problem", {})
    share = problem.get("share_of_peak")
    bytes_per_second = card.get("dram_bytes_per_second")
    return {
        "peak_tflops": problem["useful_flops"] / answers[0]["seconds"] / share * 1e-12 if share else None,
        "peak_gigabytes": bytes_per_second * 1e-9 if bytes_per_second else None,
    }


def version() -> str:
    found = re.search(r"project\(flash-attn-jit VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert found
    return found[1]


def record(problem: Problem, default: str, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    winner = min(answers, key=lambda tile: (answers[tile]["seconds"], tile != default, tile))
    first = answers[default]
    card = first.get("card", {})
    return {
        "format": "flash-attn-jit tuning record",
        "version": 1,
        "key": {
            "device": {
                "name": card.get("name", "Tesla T4"),
                "sm": 75,
                "multiprocessors": card.get("multiprocessors", 40),
                "code": "native",
            },
            "templates": first["templates"],
            "problem": {
                "kernel": first["kernel"].rsplit(" ", 1)[0],
                "seqlen_q": power_of_two(problem.seqlen),
                "seqlen_k": power_of_two(problem.seqlen),
                "batch_heads": power_of_two(problem.batch * problem.heads),
            },
            "policy": {"timer": "model", "l2": "none"},
        },
        "environment": {
            "library": version(),
            "driver": "",
            "nvrtc": first.get("built_by"),
            "power_limit_watts": None,
            **peaks([first]),
        },
        "measured": {
            "batch": problem.batch,
            "num_heads": problem.heads,
            "num_heads_k": problem.heads,
            "seqlen_q": problem.seqlen,
            "seqlen_k": problem.seqlen,
            "window_left": -1,
            "window_right": -1,
        },
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": 0.0,
        "default": default,
        "winner": winner,
        "rule": "the least predicted time",
        "rounds": 0,
        "candidates": [candidate(tile, answer) for tile, answer in answers.items()],
        "others": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--program", default="flash-attn-jit")
    parser.add_argument("--tiles", type=int, default=8, help="of tools/tile_search/records, for each problem")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    made = []
    with ThreadPoolExecutor(options.jobs) as workers:
        for problem in problems():
            chosen = ask(options.program, problem, "auto")  # what a launch takes without a record
            assert chosen
            default = chosen["tile"]
            tiles = list(
                dict.fromkeys([*default_tiles(options.program, problem), *searched_tiles(problem, options.tiles)])
            )
            asked = workers.map(lambda tile, problem=problem: ask(options.program, problem, tile), tiles)
            answers = {tile: answer for tile, answer in zip(tiles, asked) if answer is not None}
            made.append(record(problem, default, answers))
            print(f"{problem}: {len(answers)} tiles", file=sys.stderr, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    database = {"format": "flash-attn-jit tuning database", "version": 1, "records": made}
    options.out.write_text(json.dumps(database, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
