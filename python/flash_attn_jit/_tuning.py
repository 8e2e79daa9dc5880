"""``tune()`` and ``autotune()``: the fastest tiles of the GPU at hand."""

import json
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from . import _core
from ._arguments import number, truth
from ._environment_report import program_path
from .errors import DriverError, Refusal

_MOST_SECONDS = 30 * 86400
_LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class TunedProblem:
    """One problem of one kernel, and what tuning found for it.

    Attributes:
        kernel: the kernel without its tile, such as ``"fwd hdim64 fp16 causal gqa1 vec16"``. A backward pass has three.
        batch, num_heads, num_heads_k, seqlen_q, seqlen_k: the problem that stands for its class.
        problem_class: the class's text; None where nothing was found.
        winner, default: the tiles' texts, such as ``"m256n16w8q64l5b8k8"``; None where nothing was found.
        winner_seconds, default_seconds: medians of a launch, of decode with what puts its splits together; None where
            not measured.
        rule: why the winner won; where there is none, why not.
        settled: more time would change nothing.
        newly_measured: candidates that were measured now; 0 where all was known before.
        record: the whole record, as in its file; None where nothing was found.
    """

    kernel: str
    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    problem_class: str | None
    winner: str | None
    default: str | None
    winner_seconds: float | None
    default_seconds: float | None
    rule: str
    settled: bool
    newly_measured: int
    record: dict[str, Any] | None


_FIELDS = {field.name for field in fields(TunedProblem)}


def _problems(text: str) -> list[TunedProblem]:
    found = [{**problem, "problem_class": problem["class"]} for problem in json.loads(text)]
    return [TunedProblem(**{name: problem[name] for name in _FIELDS}) for problem in found]


def _worker_command() -> list[str]:
    # The script comes with the compiled module, and so speaks its language; a program on the PATH may be another's.
    if sys.executable:
        script, module = Path(__file__).with_name("_tune_worker.py"), str(_core.__file__)
        return [sys.executable, "-I", "-S", str(script), module]
    program = program_path()
    if program is None:
        raise DriverError(
            "no program can be started that measures: sys.executable is empty, and flash-attn-jit is not found"
        )
    return [program, "tune-worker"]


def _integer(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            whole = operator.index(value)
            return max(-_LARGEST_INT, min(whole, _LARGEST_INT))  # the compiled module says what is accepted
    except TypeError:
        pass
    raise Refusal(name, f"is {value!r}", "an integer, or several").exception()


def _integers(name: str, values: Any) -> list[int]:
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, torch.Tensor)):
        return list(dict.fromkeys(_integer(name, value) for value in values))
    return [_integer(name, values)]


def _words(name: str, values: Any) -> list[str]:
    words = [values] if isinstance(values, str) else values
    if isinstance(words, Iterable):
        words = list(words)
        if words and all(isinstance(word, str) for word in words):
            return words
    raise Refusal(name, f"is {values!r}", "a word, or several").exception()


def _masks(causal: Any) -> list[bool]:
    return [False, True] if isinstance(causal, str) and causal == "both" else [truth("causal", causal)]


def _seconds(name: str, value: Any) -> float:
    seconds = number(name, value)
    if not 1 <= seconds <= _MOST_SECONDS:
        raise Refusal(name, f"is {seconds:g}", f"seconds, from 1 to {_MOST_SECONDS}").exception()
    return seconds


def _ordinal(device: Any) -> int:
    if device is None:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    if isinstance(device, int) and not isinstance(device, bool):
        return _integer("device", device)
    try:
        named = torch.device(device)
    except (TypeError, RuntimeError):
        named = None
    if named is None or named.type != "cuda":
        raise Refusal("device", f"is {device!r}", "a CUDA device, its number, or None for the current one").exception()
    return torch.cuda.current_device() if named.index is None else named.index


def tune(
    preset: str | None = None,
    *,
    head_dims: int | Iterable[int] = (),
    seqlens: int | Iterable[int] = (),
    batch: int | Iterable[int] = (),
    heads: int = 16,
    gqa: int | Iterable[int] = 1,
    causal: bool | Literal["both"] = False,
    kinds: str | Iterable[str] = "fwd",
    budget_seconds: float = 600.0,
    device: int | str | torch.device | None = None,
    afresh: bool = False,
) -> list[TunedProblem]:
    """Finds the fastest tiles for problems on a GPU, and keeps them: what ``flash-attn-jit tune`` does.

    Every later launch uses what was found, in this process from the next call on, in others when they start. Candidates
    run in a process of their own, with tensors of their own, so that one that crashes takes nothing along; they share
    the GPU's memory with this process (``torch.cuda.empty_cache()`` gives back what torch only keeps). Other work on
    the GPU disturbs the measurement. Ctrl-C ends it with KeyboardInterrupt and keeps what was measured; the same call
    goes on there. The logger ``flash_attn_jit`` tells each outcome, at level INFO.

    Arguments:
        preset: the problems of a model, such as ``"llama-3-8b"``; ``flash-attn-jit tune --help`` lists them.
        head_dims: or head dims, 1 to 256, with the following arguments.
        seqlens: lengths, in tokens, of queries and of keys, q of shape (batch, seqlen, heads, head_dim); instead of a
            preset's own where given.
        batch: batch sizes, likewise; without a preset 1.
        heads: query heads. With ``head_dims`` alone, as are the next two.
        gqa: group sizes, num_heads / num_heads_k.
        causal: False, True or ``"both"``.
        kinds: ``"fwd"``, ``"bwd"`` (the three kernels of a backward pass, and where a block can have all keys the one
            in their place: their times decide which are launched), ``"decode"`` (of 1 and of 16 queries, against keys
            of the lengths) or several.
        budget_seconds: for all problems together, kept within a tenth.
        device: the CUDA device; the current one where None.
        afresh: measure again what is known.

    Returns:
        A :class:`TunedProblem` for each problem class and kernel, in the order asked for; its ``winner`` is None where
        the budget ended before it or nothing could be measured, and its ``rule`` says why.

    Raises:
        ValueError: an argument that does not fit; names the argument, what came and what is accepted.
        ConfigError: ``FLASH_ATTN_JIT_OFFLINE`` is 1: tuning compiles.
        UnsupportedError: the GPU is older than Turing.
        DriverError: there is no driver or no such GPU.
        RuntimeError: nothing can be measured at all: the GPU's memory is full, say.
        KeyboardInterrupt: Ctrl-C.
    """
    if preset is not None and not isinstance(preset, str):
        raise Refusal("preset", f"is {preset!r}", "a preset's name, or None").exception()
    problems = _core.tune(
        preset=preset or "",
        head_dims=_integers("head_dims", head_dims),
        gqa=_integers("gqa", gqa),
        causal=_masks(causal),
        heads=_integer("heads", heads),
        seqlens=_integers("seqlens", seqlens),
        batch=_integers("batch", batch),
        kinds=_words("kinds", kinds),
        budget_seconds=_seconds("budget_seconds", budget_seconds),
        device=_ordinal(device),
        afresh=truth("afresh", afresh),
        worker_command=_worker_command(),
    )
    return _problems(problems)


class autotune:
    """Tunes what it meets: ``with flash_attn_jit.autotune(budget_seconds=300) as tuning: model(batch)``.

    A call inside of the with block whose problem class has no measured record yet is tuned before it runs, each kernel
    once (forward, or decode where queries are few; the three of a backward pass, and the one in their place where a
    block can have all keys), as :func:`tune` would; so the first call takes long, and from then on it is as fast as it
    will be. The records stay: later calls and later processes use them, and a second run finds nothing left to tune;
    what a search found that was interrupted is used too, and :func:`tune` goes on with it. It is the whole process's,
    and counts for the calls of all threads; it does not nest.

    Never inside stream capture: a problem that is met there first is left untuned, with one warning. Problems that do
    not fit into the budget, or that find the GPU's memory too full for a second set of tensors, are left so too. CPU
    tensors, which the interpreter runs, have nothing to tune, which is said once. A window is measured at a quarter of
    the keys, score features at usual values, sequences of ``cu_seqlens`` at their greatest length, a cache of keys and
    values as if it were full. Calls of many queries over a cache are left untuned, which is said once.

    Ctrl-C ends the tuning at hand with KeyboardInterrupt and keeps what was measured; in a backward pass, which torch
    runs in a thread of its own, it is heard when the kernel at hand is done.

    Arguments:
        budget_seconds: for all that is tuned inside, 1 to 2592000.
        seconds_each: for one kernel's problem class at the most.

    Attributes:
        problems: a :class:`TunedProblem` for each class that was met without a record, so far, in order; its ``winner``
            is None where it was left untuned, and its ``rule`` says why.

    Raises:
        ValueError: an argument that does not fit, or another autotune() is on.
        ConfigError: ``FLASH_ATTN_JIT_OFFLINE`` is 1.
    """

    def __init__(self, budget_seconds: float = 600.0, *, seconds_each: float = 60.0) -> None:
        self._budget_seconds = _seconds("budget_seconds", budget_seconds)
        self._seconds_each = _seconds("seconds_each", seconds_each)
        self._is_on = False
        self._problems: list[TunedProblem] = []

    def __enter__(self) -> "autotune":
        _core.begin_autotune(self._budget_seconds, self._seconds_each, _worker_command())
        self._is_on = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._problems = _problems(_core.end_autotune())
        self._is_on = False

    @property
    def problems(self) -> list[TunedProblem]:
        return _problems(_core.autotune_found()) if self._is_on else list(self._problems)
