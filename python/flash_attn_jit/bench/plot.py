"""The PNG of a timing run, from its JSON alone."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

from .backends import NAMES

_LABELS = {
    "flash_attn_jit": "flash_attn_jit",
    "sdpa_efficient": "SDPA memory-efficient",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
}


def _bars(axes: Any, rows: List[Dict[str, Any]]) -> None:
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


def plot(record: Dict[str, Any], png: Path) -> None:
    """Draws `record` (a timing run's JSON) into `png`: head dims by rows, full and causal by columns."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'flash-attn-jit[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in record["rows"] if "tflops" in row]
    if not rows:
        raise SystemExit("--plot: this JSON holds no timings")
    head_dims = sorted({row["head_dim"] for row in rows})
    masks = sorted({row["causal"] for row in rows})
    size: Tuple[float, float] = (6.4 * len(masks), 3.6 * len(head_dims))
    figure, grid = pyplot.subplots(
        len(head_dims), len(masks), figsize=size, squeeze=False, layout="constrained"
    )
    for head_dim, line in zip(head_dims, grid):
        for causal, axes in zip(masks, line):
            _bars(axes, [row for row in rows if row["head_dim"] == head_dim and row["causal"] == causal])
            axes.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}")
    shown = [name for name in NAMES if any(row["backend"] == name for row in rows)]
    figure.legend(
        handles=[Patch(color=f"C{NAMES.index(name)}", label=_LABELS[name]) for name in shown],
        loc="outside lower center",
        ncols=len(shown),
    )
    machine = record["machine"]
    figure.suptitle(f"Forward attention, fp16, {machine['gpu']}, target {machine['target']}")
    figure.savefig(png, dpi=150)
