"""The compiled module, python/bindings.cpp."""

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch

from ._options import Options
from .flex._attention import UserFunctions

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

class KernelFamily:
    """A kind of kernel: its word, the matrix products over visible pairs of a query and a key, and what it moves of a
    problem: rows of head_dim elements for each query and for each key, float32 numbers for each query."""

    @property
    def word(self) -> str: ...
    @property
    def products(self) -> int: ...
    @property
    def has_tile_costs(self) -> bool: ...
    @property
    def query_rows(self) -> int: ...
    @property
    def query_value_rows(self) -> int: ...
    @property
    def key_rows(self) -> int: ...
    @property
    def value_rows(self) -> int: ...
    @property
    def query_numbers(self) -> int: ...

class InterpreterReport:
    """What the interpreter saw in one kernel's run."""

    @property
    def kernel(self) -> str: ...
    @property
    def blocks(self) -> int: ...
    @property
    def shared(self) -> dict[str, AccessCount]: ...
    def json(self) -> str: ...

class KernelLibrary:
    """A cache with a compiler behind it."""

    def find_or_compile(self, spec: str, arch: str) -> dict[str, Any]: ...

most_head_dim: int
most_head_dim_of_gradients: int
oldest_sm: int  # the oldest GPU's compute capability x 10
report_same_within: float  # a share: times that lie no further apart are the same
accepted: dict[str, str]  # in the words of the checks, by what they are about

def interprets() -> bool: ...
def refuses_bfloat16() -> bool: ...
def connect_torch(torch: ModuleType) -> None: ...
def connect_options(type: type[Options]) -> None: ...
def uses_exchange_api() -> bool: ...
def set_logger(logger: logging.Logger) -> None: ...
def set_python_search_path(folders: Sequence[str]) -> None: ...
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor | None,
    options: Options,
    tile: str | None = None,
    user: UserFunctions | None = None,
) -> None: ...
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dbias: torch.Tensor | None,
    delta: torch.Tensor,
    peaks: torch.Tensor | None,
    options: Options,
    dkdv_tile: str | None = None,
    dq_tile: str | None = None,
    all_keys_tile: str | None = None,
    user: UserFunctions | None = None,
) -> None: ...
def keep_user_functions(code: str) -> int: ...
def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    q: torch.Tensor | None,
    q_turned: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    interleaved: bool,
    queries_advance: bool,
) -> None: ...
def refuse_rank(name: str, tensor: torch.Tensor, varlen: bool) -> NoReturn: ...
def interpreter_report() -> InterpreterReport: ...
def devices() -> list[dict[str, Any]]: ...
def loaded_kernels(device: int) -> list[str]: ...
def tune(
    preset: str,
    head_dims: Sequence[int],
    gqa: Sequence[int],
    causal: Sequence[bool],
    heads: int,
    seqlens: Sequence[int],
    batch: Sequence[int],
    kinds: Sequence[str],
    budget_seconds: float,
    device: int,
    afresh: bool,
    worker_command: Sequence[str],
) -> str: ...  # JSON, as of end_autotune()
def begin_autotune(budget_seconds: float, seconds_each: float, worker_command: Sequence[str]) -> None: ...
def autotune_found() -> str: ...
def end_autotune() -> str: ...
def run_tune_worker() -> int: ...
def machine_report_json() -> str: ...
def kernel_families() -> list[KernelFamily]: ...
def select_kernels(
    kinds: Sequence[str], head_dims: Sequence[int], causal: Sequence[bool], group_sizes: Sequence[int], arch: str
) -> list[str]: ...
def process_library() -> KernelLibrary: ...
def open_pack_for_writing(dir: str) -> KernelLibrary: ...
def write_manifest(dir: str) -> None: ...
