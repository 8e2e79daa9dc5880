"""The command line of ``python -m flash_attn_jit.bench``, and which options each kind of run takes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .backends import NAMES, SDPA_MATH
from .problem import BACKWARD, DTYPES, FORWARD, FP16, MASKS, NO_MASK, PASSES

TARGET_VARIABLE = "FLASH_ATTN_JIT_TARGET"

TIMING, DECODE, FLEX, MODEL, PREDICT, ACCURACY, MEMORY, HOST_COST, BESIDE, PLOT = KINDS = (
    "timing",
    "decode",
    "flex",
    "model",
    "predict",
    "accuracy",
    "memory",
    "host_cost",
    "beside",
    "plot",
)
_ONE_CALL: dict[str, Any] = {
    "batch": 4,
    "heads": 16,
    "heads_k": None,
    "head_dims": [64, 128],
    "head_dim_v": None,
    "causal": "both",
}
# The options that each kind of run takes, with what they are where they are not given. `backends`: the problem's own.
_DEFAULTS: dict[str, dict[str, Any]] = {
    TIMING: {
        **_ONE_CALL,
        "seqlens": [512, 1024, 2048, 4096, 8192, 16384],
        "passes": list(PASSES),
        "attn_masks": [NO_MASK],
        "dropout": [0.0],
        "dtypes": [FP16],
        "backends": None,
        "rounds": 5,
        "burst_ms": 50.0,
    },
    DECODE: {
        "batch": [1, 8],
        "heads": 32,
        "heads_k": [32, 8, 4],
        "head_dims": [64, 128],
        "queries": [1, 16],
        "keys": [2048, 8192, 32768],
        "page_size": None,
        "rounds": 5,
        "burst_ms": 50.0,
    },
    FLEX: {
        "batch": 4,
        "heads": 16,
        "head_dims": [64, 128],
        "seqlens": [4096],
        "passes": [FORWARD, BACKWARD],
        "rounds": 5,
        "burst_ms": 50.0,
    },
    MODEL: {
        "layers": 8,
        "heads": 32,
        "heads_k": 4,
        "head_dims": [64],
        "intermediate": 5632,
        "vocabulary": 32000,
        "tokens": 8192,
        "seqlens": [1024, 2048, 4096, 8192],
        "rounds": 5,
        "burst_ms": 50.0,
    },
    PREDICT: {**_ONE_CALL, "seqlens": [1024, 4096, 8192], "passes": [FORWARD, BACKWARD], "dtypes": [FP16]},
    ACCURACY: {
        **_ONE_CALL,
        "seqlens": [512, 1024, 2048, 4096],
        "passes": list(PASSES),
        "attn_masks": [NO_MASK],
        "dtypes": [FP16],
        "backends": None,
        "seeds": 5,
    },
    MEMORY: {**_ONE_CALL, "seqlens": [1024, 4096], "backends": None},
    HOST_COST: {"rounds": 50},
    BESIDE: {"rounds": 5, "burst_ms": 50.0},
    PLOT: {},
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _defaults(name: str) -> str:
    """For --help: the option's default in each kind of run that has one of its own."""
    values: dict[str, list[str]] = {}
    for kind, options in _DEFAULTS.items():
        if options.get(name) is not None:
            value = options[name]
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            values.setdefault(text, []).append("timing" if kind == TIMING else _flag(kind))
    if len(values) == 1:
        return f"(default: {next(iter(values))})"
    return f"(default: {'; '.join(f'{value} with {_and(kinds)}' for value, kinds in values.items())})"


def _and(kinds: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer above 0")
    return int(text)


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds above 0")
    return value


def _names(what: str, accepted: Sequence[str], text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}; there are {', '.join(accepted)}")
    return names


def _backends(text: str) -> list[str]:
    return _names("backend", NAMES, text)


def _passes(text: str) -> list[str]:
    return _names("pass", PASSES, text)


def _masks(text: str) -> list[str]:
    return _names("mask", MASKS, text)


def _dtypes(text: str) -> list[str]:
    return _names("dtype", list(DTYPES), text)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: numbers from 0 to below 1")
    return shares


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--decode",
        action="store_true",
        help="inference calls instead, a few queries over many keys: the GPU's time alone, of many calls in a CUDA "
        "graph, and which share of the bandwidth of copies on this GPU reading k and v makes of it. This library's "
        "calls have causal=True and are checked against float64; SDPA's flash backend, and its memory-efficient one "
        "with k and v repeated for every head beforehand, run without a mask: their is_causal is aligned top-left, so "
        "that queries would see next to nothing",
    )
    what.add_argument(
        "--flex",
        action="store_true",
        help="flex_attention instead, whose functions say ALiBi, a softcap, a causal mask and a window of 1024 on "
        "either side, beside flash_attn_func's arguments for the same",
    )
    what.add_argument(
        "--model",
        action="store_true",
        help="a whole Llama-like decoder with float16 weights instead of single calls, with PyTorch's SDPA left to the "
        "two backends that a Turing GPU has, and inside route_sdpa(). forward: the logits of every token, without a "
        "graph; training: forward, cross-entropy, backward and a step of AdamW",
    )
    what.add_argument(
        "--predict",
        metavar="CARD",
        help="measure nothing: what the model of a Turing card (t4, ...: `flash-attn-jit model --help`) says of single "
        "calls; needs no GPU, but an NVRTC",
    )
    what.add_argument(
        "--accuracy",
        action="store_true",
        help="errors of the output and the gradients against float64 instead of times",
    )
    what.add_argument(
        "--memory",
        action="store_true",
        help="the peak memory of a backward call, beside inputs, outputs, gradients and one float a query row and "
        "head, instead of times",
    )
    what.add_argument(
        "--host-cost", action="store_true", help="the cost of a Python call beside SDPA's instead of times"
    )
    what.add_argument(
        "--beside",
        type=Path,
        metavar="DATABASE",
        help="times SDPA's memory-efficient backend for the forward records, of this GPU and without features, that "
        "`flash-attn-jit tune --export` wrote, and writes DATABASE anew with it: reports show it beside the tiles",
    )
    what.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing: draw the PNG of this timing run")


def _add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_positives, help=f"with --decode several {_defaults('batch')}")
    parser.add_argument("--heads", type=_positive, help=_defaults("heads"))
    parser.add_argument(
        "--heads-k",
        type=_positives,
        help="heads of k and v, with --decode several (default: 32,8,4 with --decode, 4 with --model, else as many as "
        "--heads; --memory: these, then one for all)",
    )
    parser.add_argument("--head-dims", type=_positives, metavar="64,128", help=_defaults("head_dims"))
    parser.add_argument("--head-dim-v", type=_positive, help="of v, where it is another one")
    parser.add_argument("--seqlens", type=_positives, metavar="512,...", help=_defaults("seqlens"))
    parser.add_argument("--causal", choices=["both", "yes", "no"], help=_defaults("causal"))
    parser.add_argument(
        "--passes",
        type=_passes,
        metavar=",".join(PASSES),
        help="fwd: forward; bwd: backward alone, over graphs made beforehand, counted as 2.5 times the forward pass; "
        "both: a forward and a backward pass, counted as 3.5 times; --accuracy: fwd is the output, bwd the gradients "
        "(default: all)",
    )
    parser.add_argument(
        "--attn-masks",
        type=_masks,
        metavar=",".join(MASKS),
        help="in a timing run and with --accuracy an attn_mask, with causal=False: of keys, from some place of each "
        "sequence on or a tenth at random; of pairs, a tenth, for each sequence, or those of eight blocks alone; a "
        "number of q's dtype for every pair and head, of all sequences or of each "
        f"{_defaults('attn_masks')}",
    )
    parser.add_argument("--dtypes", type=_dtypes, metavar=",".join(DTYPES), help=f"of q, k and v {_defaults('dtypes')}")
    parser.add_argument("--dropout", type=_shares, metavar="0,0.1", help=f"dropout_p {_defaults('dropout')}")
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar=",".join(NAMES),
        help="sdpa_NAME is PyTorch's with that one backend; for fewer heads of k and v it is called with "
        "enable_gqa=True, but sdpa_efficient, which takes none, with k and v repeated for every head (default: all, "
        f"{SDPA_MATH} for fewer heads of k and v only: there it is what PyTorch takes on a GPU without flash)",
    )


def _add_decode(parser: argparse.ArgumentParser) -> None:
    for name, what in (("keys", "keys of a sequence"), ("queries", "and its queries")):
        parser.add_argument(_flag(name), type=_positives, help=f"--decode: {what} {_defaults(name)}")
    parser.add_argument(
        "--page-size", type=_positive, help="--decode: also keys in pages of so many rows, in a random order"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("layers", "layers of the decoder"),
        ("intermediate", "width of its SwiGLU"),
        ("vocabulary", "its tokens, random ones"),
        ("tokens", "tokens a step, of which --seqlens make the sequences"),
    ):
        parser.add_argument(_flag(name), type=_positive, help=f"--model: {what} {_defaults(name)}")


class _Parser(argparse.ArgumentParser):
    """Whose errors are one line: the usage before it would be 14."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flash_attn_jit.bench",
        description="Times attention, forward and backward, against PyTorch SDPA's backends and writes the figures as "
        "JSON.",
    )
    _add_kinds(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON to write (default: bench.json, bench-accuracy.json and so on; --beside's database in its place), or "
        "--plot's PNG",
    )
    _add_problem(parser)
    _add_decode(parser)
    _add_model(parser)
    parser.add_argument(
        "--rounds", type=_positive, help=f"samples of each backend, taken in turns {_defaults('rounds')}"
    )
    parser.add_argument(
        "--burst-ms",
        type=_milliseconds,
        help=f"calls back to back in a sample last about this long, 3 calls or more {_defaults('burst_ms')}",
    )
    parser.add_argument("--seeds", type=_positive, help=f"--accuracy: how many {_defaults('seeds')}")
    parser.add_argument(
        "--target",
        choices=["native", "compute_75"],
        help=f"sets {TARGET_VARIABLE}: compute_75 runs the Turing code on a newer GPU",
    )
    return parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """With `kind`, and every option of that kind at its default where it is not given. One that the kind has no use
    for is refused."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.kind = next((kind for kind in KINDS if getattr(options, kind, None)), TIMING)
    taken = _DEFAULTS[options.kind]
    for name in dict.fromkeys(name for kind in _DEFAULTS.values() for name in kind):
        if name not in taken and getattr(options, name) is not None:
            flags = ", ".join([*map(_flag, taken), "--output"])
            parser.error(f"{_flag(name)} means nothing {_with(options.kind)}, which takes {flags}")
        if getattr(options, name) is None:
            setattr(options, name, taken.get(name))
    if options.kind != DECODE:
        _take_the_only(parser, options)
    if options.kind not in (PLOT, HOST_COST, BESIDE):
        _check_sizes(parser, options)
    return options


def _with(kind: str) -> str:
    return "in a timing run" if kind == TIMING else f"with {_flag(kind)}"


def _take_the_only(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The number of options that have several with --decode alone."""
    for name in ("batch", "heads_k"):
        value = getattr(options, name)
        if isinstance(value, list):
            if len(value) > 1:
                parser.error(
                    f"{_flag(name)} is {','.join(map(str, value))}; accepted {_with(options.kind)}: one number"
                )
            setattr(options, name, value[0])


def _check_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    heads_k = options.heads_k if isinstance(options.heads_k, list) else [options.heads_k or options.heads]
    for each in heads_k:
        if options.heads % each:
            parser.error(f"--heads is {options.heads}, and --heads-k {each}; accepted: a multiple of --heads-k")
    if options.kind != MODEL:
        return
    if len(options.head_dims) > 1 or options.head_dims[0] % 2:
        parser.error(f"--head-dims is {options.head_dims}; accepted with --model: one, and even, for its rotary turns")
    for seqlen in options.seqlens:
        if options.tokens % seqlen:
            parser.error(f"--seqlens has {seqlen}, and --tokens is {options.tokens}; accepted: what divides --tokens")
