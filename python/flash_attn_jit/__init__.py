"""FlashAttention for Turing GPUs: kernels that are generated and compiled when they are first needed."""

import sys

if not sys.platform.startswith("linux"):
    raise ImportError("flash_attn_jit is for Linux.")

from . import _environment_report

if _environment_report.is_asked_for():
    # `python -m flash_attn_jit` imports this file first. Its report must come out where what follows does not work.
    _environment_report.main(sys.argv[1:])
    raise SystemExit(0)

from importlib.metadata import version as _version

from ._torch_check import require_torch as _require_torch

_require_torch()

from importlib.util import find_spec as _find_spec

if _find_spec(f"{__name__}._core") is None:
    raise ImportError(
        f"flash_attn_jit in {__path__[0]} has no compiled module: it is the source. Install it (pip install .) and "
        "start Python in another folder."
    )

from . import _flop_formulas, bert_padding  # noqa: F401  _flop_formulas has them registered with torch
from ._core import InterpreterReport
from ._router import SdpaRouter, route_sdpa
from ._sdpa import sdpa
from ._tuning import TunedProblem, autotune, tune
from .errors import (
    CompileError,
    ConfigError,
    DriverError,
    InterpreterError,
    MissingKernelError,
    UnsupportedError,
)
from .flex import flex_attention
from .integrations.flash_attn import as_flash_attn
from .interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    interpreter_report,
)
from .kv_cache import flash_attn_with_kvcache

__version__: str = _version("flash-attn-jit")

__all__ = [
    "CompileError",
    "ConfigError",
    "DriverError",
    "InterpreterError",
    "InterpreterReport",
    "MissingKernelError",
    "SdpaRouter",
    "TunedProblem",
    "UnsupportedError",
    "__version__",
    "as_flash_attn",
    "autotune",
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex_attention",
    "interpreter_report",
    "route_sdpa",
    "sdpa",
    "tune",
]
