"""What the emulations of serving engines share: histories of sequences, and what must not happen in a layer."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_reference import check_attention, normal

ENGINES = Path(__file__).parent / "engines"


def use_engine(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """flash_attn_jit's module for the engine, over the stand-in in tests/engines; all is forgotten after the test."""
    monkeypatch.syspath_prepend(str(ENGINES))
    ours = f"flash_attn_jit.integrations.{name}", f"flash_attn_jit.integrations.{name}._backend"
    for loaded in list(sys.modules):
        if loaded in ours or loaded.partition(".")[0] == name:
            monkeypatch.delitem(sys.modules, loaded)
    module = importlib.import_module(ours[0])
    # What is imported later goes, too.
    for later in (*ours, name):
        monkeypatch.setitem(sys.modules, later, sys.modules.get(later) or importlib.import_module(later))
    return module


class Sequence:
    """All keys and values that a sequence has had, (tokens, heads, head_dim) each."""

    def __init__(self, heads: int, head_dim: int, device: str) -> None:
        self.k = torch.empty(0, heads, head_dim, dtype=torch.float16, device=device)
        self.v = self.k.clone()

    def __len__(self) -> int:
        return len(self.k)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = torch.cat([self.k, k]), torch.cat([self.v, v])


def tokens(count: int, heads: int, head_dim: int, device: str, seed: int) -> torch.Tensor:
    return normal(count, heads, head_dim, seed=seed).to(device)


def check_rows(out: torch.Tensor, q: torch.Tensor, sequence: Sequence, **options: Any) -> None:
    """out and q: (tokens, heads, head_dim), of one sequence."""
    check_attention(out[None], None, q[None], sequence.k[None], sequence.v[None], **options)


_WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__int__", "__float__", "__bool__", "__index__")


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """No value of a tensor is asked for, which on a GPU would wait for it."""

    def refuse(name: str) -> Callable[..., Any]:
        def ask(self: torch.Tensor, *arguments: Any) -> Any:
            raise AssertionError(f"a tensor's {name}() is called")

        return ask

    with pytest.MonkeyPatch.context() as patch:
        for name in _WAITS:
            patch.setattr(torch.Tensor, name, refuse(name), raising=False)
        yield
