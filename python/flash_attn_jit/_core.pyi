"""The compiled module, python/bindings.cpp."""

import logging
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence

import torch

class AccessCount:
    """Shared-memory traffic of one access kind; one count a warp-wide access."""

    @property
    def accesses(self) -> int: ...
    @property
    def cycles(self) -> int: ...
    @property
    def ideal_cycles(self) -> int: ...
    @property
    def factor(self) -> float: ...

class InterpreterReport:
    """What the interpreter saw in one kernel's run."""

    @property
    def kernel(self) -> str: ...
    @property
    def blocks(self) -> int: ...
    @property
    def shared(self) -> Dict[str, AccessCount]: ...
    def json(self) -> str: ...

class KernelLibrary:
    """A cache with a compiler behind it."""

    def find_or_compile(self, spec: str, arch: str) -> Dict[str, Any]: ...

most_scale: float  # the greatest magnitude of softmax_scale

def interprets() -> bool: ...
def connect_torch(torch: ModuleType) -> None: ...
def uses_exchange_api() -> bool: ...
def set_logger(logger: logging.Logger) -> None: ...
def set_python_search_path(folders: Sequence[str]) -> None: ...
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    softmax_scale: Optional[float],
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Optional[torch.Tensor] = None,
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    tile: Optional[str] = None,
) -> None: ...
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: Optional[torch.Tensor],
    dk: Optional[torch.Tensor],
    dv: Optional[torch.Tensor],
    delta: torch.Tensor,
    softmax_scale: Optional[float],
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Optional[torch.Tensor] = None,
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dkdv_tile: Optional[str] = None,
    dq_tile: Optional[str] = None,
) -> None: ...
def interpreter_report() -> InterpreterReport: ...
def devices() -> List[Dict[str, Any]]: ...
def machine_report_json() -> str: ...
def select_kernels(
    kinds: Sequence[str], head_dims: Sequence[int], causal: Sequence[bool], group_sizes: Sequence[int], arch: str
) -> List[str]: ...
def process_library() -> KernelLibrary: ...
def open_pack_for_writing(dir: str) -> KernelLibrary: ...
def write_manifest(dir: str) -> None: ...
