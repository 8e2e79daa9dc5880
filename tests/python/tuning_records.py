"""Plausible tuning records for tests, as JSON values; what they tell was never measured."""

import random
from itertools import islice, product
from typing import Any

LIMITS = ["tensor", "lsu", "xu", "issue", ""]
T4 = {"name": "Tesla T4", "sm": 75, "multiprocessors": 40, "code": "native"}


def tiles(count: int, draw: random.Random) -> list[str]:
    every = [
        f"m{m}n{n}w{w}q{64}l{load}b{barrier}k{first}"
        for m, n, w, load, barrier, first in product(
            (64, 128, 256), (8, 16, 32), (4, 8), range(3), range(3, 6), range(6, 9)
        )
    ]
    return draw.sample(every, count)


def candidate(tile: str, seconds: float, draw: random.Random, rounds: int = 7) -> dict[str, Any]:
    samples: list[dict[str, Any]] = [
        {
            "round": i,
            "seconds": seconds * draw.uniform(0.994, 1.008),
            "clock_mhz": 1590 - 15 * i,
            "power_watts": 69.5,
            "temperature_celsius": 61,
            "throttled_by": ["sw_power_cap"] if i > 4 else [],
        }
        for i in range(rounds)
    ]
    times = sorted(sample["seconds"] for sample in samples)
    return {
        "tile": tile,
        "outcome": "measured",
        "reason": "",
        "predicted_seconds": seconds * draw.uniform(0.86, 1.09),
        "limited_by": draw.choice(LIMITS),
        "registers": draw.randint(120, 255),
        "spill_stores": draw.choice([0, 0, 0, 24]),
        "spill_loads": draw.choice([0, 0, 0, 40]),
        "threads": 256,
        "static_smem": 0,
        "dynamic_smem": 57344,
        "blocks_per_multiprocessor": draw.choice([1, 2]),
        "compile_seconds": 0.6,
        "error": 4e-4,
        "error_allowed": 2e-3,
        "samples": samples,
        "median_seconds": times[rounds // 2],
        "low_seconds": times[1],
        "high_seconds": times[-2],
    }


def rejected(tile: str, outcome: str, reason: str) -> dict[str, Any]:
    unknown = dict.fromkeys(
        ("predicted_seconds", "registers", "spill_stores", "spill_loads", "compile_seconds", "error", "error_allowed")
    )
    times = dict.fromkeys(("median_seconds", "low_seconds", "high_seconds"))
    sizes = dict.fromkeys(("threads", "static_smem", "dynamic_smem", "blocks_per_multiprocessor"), 0)
    return {
        "tile": tile,
        "outcome": outcome,
        "reason": reason,
        "limited_by": "",
        "samples": [],
        **unknown,
        **times,
        **sizes,
    }


REJECTIONS = [
    ("pruned", "predicted 1.62 times as slow as the best"),
    ("pruned", "predicted 2.05 times as slow as the best"),
    ("compile failed", "ptxas: too many resources"),
    ("wrong result", "the greatest error is 0.31, and 0.002 is allowed"),
    ("timed out", "no answer within 5 s"),
]


def record(
    kind: str = "fwd",
    head_dim: int = 64,
    mask: str = "causal",
    seqlen: int = 1024,
    batch: int = 4,
    device: dict[str, Any] | None = None,
    seed: int = 0,
    count: int = 14,
    scale: float = 1.0,
    rounds: int = 7,
) -> dict[str, Any]:
    """`scale` makes the device slower."""
    draw = random.Random(f"{kind} {head_dim} {mask} {seqlen} {batch} {seed}")
    names = tiles(count + len(REJECTIONS), draw)
    products = {"fwd": 2, "bwd_dkdv": 4, "bwd_dq": 3}.get(kind, 1)
    flops = 2 * products * batch * 16 * seqlen * seqlen * head_dim / (2 if mask == "causal" else 1)
    best = scale * (flops / 38e12 + 9e-6)
    measured = [
        candidate(tile, best * (1 + 0.035 * i * draw.uniform(0.3, 1.4)), draw, rounds)
        for i, tile in enumerate(names[:count])
    ]
    winner = min(measured, key=lambda each: each["median_seconds"])
    default = draw.choice(measured[:4])
    draw.shuffle(measured)
    return {
        "format": "flash-attn-jit tuning record",
        "version": 1,
        "key": {
            "device": dict(device or T4),
            "templates": "3f" * 32,
            "problem": {
                "kernel": f"{kind} hdim{head_dim} fp16 {mask} gqa1 vec16",
                "seqlen_q": seqlen,
                "seqlen_k": seqlen,
                "batch_heads": 16 * batch,
            },
            "policy": {"timer": "events", "l2": "rotated inputs"},
        },
        "environment": {
            "library": "0.1.0",
            "driver": "12.4",
            "nvrtc": "nvrtc 12.9",
            "power_limit_watts": 70.0,
            "peak_tflops": 50.1,
            "peak_gigabytes": 240.0,
        },
        "measured": {"batch": batch, "num_heads": 16, "num_heads_k": 16, "seqlen_q": seqlen, "seqlen_k": seqlen},
        "when": "2026-11-27T08:00:00Z",
        "seconds": 12.5,
        "default": default["tile"],
        "winner": winner["tile"],
        "rule": "lowest median",
        "rounds": 7,
        "candidates": measured + [rejected(tile, *why) for tile, why in zip(names[count:], REJECTIONS)],
        "others": {"sdpa_efficient": best * draw.uniform(1.5, 2.4)},
    }


def predicted(**arguments: Any) -> dict[str, Any]:
    """A record of the model: nothing ran."""
    made = record(**arguments)
    made["key"]["policy"]["timer"] = "model"
    made["others"] = {}
    for each in made["candidates"]:
        if each["outcome"] == "measured":
            each["predicted_seconds"] = each["median_seconds"]
            each |= {"samples": [], "median_seconds": None, "low_seconds": None, "high_seconds": None, "error": None}
    return made


def records(count: int, candidates: int = 14, **arguments: Any) -> list[dict[str, Any]]:
    """Of as many problem classes."""
    sizes = product(
        range(1, 1000),
        (1024, 4096, 512, 128, 2048),
        ("fwd", "bwd_dkdv", "bwd_dq"),
        ("causal", "full"),
        (64, 128, 96),
    )
    return [
        record(kind, head_dim, mask, seqlen, 4 * batch, count=candidates, **arguments)
        for batch, seqlen, kind, mask, head_dim in islice(sizes, count)
    ]


def database(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {"format": "flash-attn-jit tuning database", "version": 1, "records": values}
