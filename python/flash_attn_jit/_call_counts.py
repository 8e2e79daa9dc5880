"""How many calls ran here, and how many elsewhere, and why: what everything that stands between a library and these
kernels tells its user."""

import threading
from collections import Counter

import torch

_is_compiling = torch.compiler.is_compiling


class CallCounts:
    """Counts of calls, in every thread."""

    def __init__(self, title: str, elsewhere: str = "torch") -> None:
        """title: what the text of them begins with. elsewhere: the key in `counts` of what runs the other calls."""
        self._title, self._elsewhere = title, elsewhere
        self._lock = threading.Lock()
        self._here = 0
        self._reasons: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """How many calls ran where: ``{"flash_attn_jit": ..., "torch": ...}``."""
        with self._lock:
            return {"flash_attn_jit": self._here, self._elsewhere: sum(self._reasons.values())}

    @property
    def reasons(self) -> dict[str, int]:
        """Why calls ran elsewhere, and how many for each reason."""
        with self._lock:
            return dict(self._reasons)

    def count(self, reason: str | None = None) -> None:
        """A call that ran here, or for that reason elsewhere. Nothing while torch.compile traces: the graph would be
        made anew for every value of a counter."""
        if _is_compiling():
            return
        with self._lock:
            if reason is None:
                self._here += 1
            else:
                self._reasons[reason] += 1

    def reset(self) -> None:
        with self._lock:
            self._here = 0
            self._reasons.clear()

    def __repr__(self) -> str:
        counts = self.counts
        lines = [
            f"{self._title}: {counts['flash_attn_jit']} calls ran in flash_attn_jit, {counts[self._elsewhere]} in "
        ]
        lines[0] += "PyTorch" if self._elsewhere == "torch" else self._elsewhere
        lines += [f"  {count} x {reason}" for reason, count in sorted(self.reasons.items(), key=lambda r: -r[1])]
        return "\n".join(lines)
