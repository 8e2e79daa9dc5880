"""The PNG of a timing run, from its JSON alone."""

from itertools import product
from pathlib import Path
from typing import Any

from .backends import NAMES
from .problem import BACKWARD, BOTH, FORWARD, PASSES

_LABELS = {
    "flash_attn_jit": "flash_attn_jit",
    "sdpa_efficient": "SDPA memory-efficient",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_math": "SDPA math",
}
_PASS_TITLES = {FORWARD: "forward", BACKWARD: "backward", BOTH: "forward and backward"}


def _pass_of(row: dict[str, Any]) -> str:
    return str(row.get("pass", FORWARD))  # a record from before there were others does not say it


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One group of bars a sequence length; whiskers from the slowest to the fastest sample."""
    seqlens = sorted({row["seqlen"] for row in rows})
    names = [name for name in NAMES if any(row["backend"] == name for row in rows)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for row in (row for row in rows if row["backend"] == name):
            x = seqlens.index(row["seqlen"]) + (i - (len(names) - 1) / 2) * width
            median = row["tflops"]
            slowest, fastest = (median * row["ms_median"] / row[key] for key in ("ms_max", "ms_min"))
            axes.bar(x, median, width, color=f"C{NAMES.index(name)}")
            axes.errorbar(x, median, [[median - slowest], [fastest - median]], color="black", linewidth=0.8)
    axes.set_xticks(range(len(seqlens)), [str(seqlen) for seqlen in seqlens])
    axes.set_xlabel("sequence length")
    axes.set_ylabel("TFLOP/s")


def plot(record: dict[str, Any], png: Path) -> None:
    """Draws `record` (a timing run's JSON) into `png`: head dims and passes by rows, full and causal by columns."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'flash-attn-jit[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in record.get("rows", []) if row.keys() >= {"tflops", "head_dim"}]
    if not rows:
        raise SystemExit(f"--plot: this JSON, of the kind {record.get('kind')!r}, holds no timings of single calls")
    head_dims = sorted({row["head_dim"] for row in rows})
    masks = sorted({row["causal"] for row in rows})
    passes = [which for which in PASSES if any(_pass_of(row) == which for row in rows)]
    panels = list(product(head_dims, passes))
    size: tuple[float, float] = (6.4 * len(masks), 3.6 * len(panels))
    figure, grid = pyplot.subplots(len(panels), len(masks), figsize=size, squeeze=False, layout="constrained")
    for (head_dim, which), line in zip(panels, grid):
        for causal, axes in zip(masks, line):
            shown_here = (head_dim, which, causal)
            _bars(axes, [row for row in rows if (row["head_dim"], _pass_of(row), row["causal"]) == shown_here])
            axes.set_title(f"{_PASS_TITLES[which]}, head dim {head_dim}, {'causal' if causal else 'full'}")
    shown = [name for name in NAMES if any(row["backend"] == name for row in rows)]
    figure.legend(
        handles=[Patch(color=f"C{NAMES.index(name)}", label=_LABELS[name]) for name in shown],
        loc="outside lower center",
        ncols=len(shown),
    )
    machine = record["machine"]
    figure.suptitle(f"Attention, fp16, {machine['gpu']}, target {machine['target']}")
    figure.savefig(png, dpi=150)
