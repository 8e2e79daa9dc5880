"""How figures and problem classes are written."""

from .records import ProblemClass
from .style import KIND_WORDS

PREDICTED = "predicted, not measured"
NONE = "\u2013"  # an en dash
MINUS, TIMES = "\u2212", "\u00d7"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    factor, unit = (1e6, "µs") if seconds < 999.5e-6 else (1e3, "ms") if seconds < 0.9995 else (1.0, "s")
    return f"{_three_digits(seconds * factor)} {unit}"


def _three_digits(value: float) -> str:
    """1.23, 12.3, 123."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def percent(ratio: float | None, digits: int = 1) -> str:
    return NONE if ratio is None else f"{100 * ratio:.{digits}f} %"


def loss(regret: float | None) -> str:
    """+4.1 %, beside the winner."""
    if regret is None:
        return NONE
    return "0 %" if abs(regret) < 5e-5 else f"{100 * regret:+.1f} %".replace("-", MINUS)


def times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}{TIMES}"


def number(value: float | None) -> str:
    return NONE if value is None else _three_digits(value)


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def kernel_title(problem: ProblemClass) -> str:
    kernel = problem.kernel
    words = [KIND_WORDS[kernel.kind], f"head dim {kernel.head_dim}", kernel.mask, *kernel.features]
    if kernel.group_size > 1:
        words.append(f"groups of {kernel.group_size}")
    if kernel.text.endswith("elem2"):
        words.append("unaligned")
    return ", ".join(words)


def size_title(problem: ProblemClass) -> str:
    return f"up to {problem.seqlen_q} queries, {problem.seqlen_k} keys, {problem.batch_heads} batch {TIMES} heads"
