"""Problems of every family of kernels, compared with float64: masks, features, varlen, classes of head dims, caches,
functions of a user."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from .. import flash_attn_func, flash_attn_varlen_func, flex_attention
from .._dtypes import takes
from .._reference import Exact, Scores, exact_attention, summed_bias
from .._s_dmask import kept_share
from .._sdpa import MOST_HEAD_DIM_OF_GRADIENTS
from . import cache
from .cache import CacheCase


@dataclass(frozen=True)
class Case:
    """Lengths of several sequences make a varlen problem; else the batch is `batch` of one length."""

    name: str
    head_dim: int = 64
    head_dim_v: int = 0  # of v, where it is another one; 0: the same
    heads: int = 4
    heads_k: int = 4
    batch: int = 2
    seqlens_q: tuple[int, ...] = (333,)
    seqlens_k: tuple[int, ...] = (333,)
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    mask: str = ""  # an attn_bias: one of _MASKS
    sinks: bool = False
    dropout: float = 0.0
    aligned: bool = True
    dtype: torch.dtype = torch.float16
    of_user: bool = False  # softcap and causal are said by functions of a user, to flex_attention

    @property
    def has_gradients(self) -> bool:
        return self.head_dim <= MOST_HEAD_DIM_OF_GRADIENTS

    @property
    def is_varlen(self) -> bool:
        return len(self.seqlens_q) > 1

    def small(self) -> "Case":
        """The same at a size that the interpreter runs in a moment."""

        def shortened(lengths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(min(length, 20 + length // 20) for length in lengths)

        window = tuple(min(width, 11) for width in self.window)
        return replace(
            self,
            heads=2,
            heads_k=max(1, 2 * self.heads_k // self.heads),
            batch=1,
            seqlens_q=shortened(self.seqlens_q),
            seqlens_k=shortened(self.seqlens_k),
            window=(window[0], window[1]),
        )


_FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal, longer keys": {"causal": True, "seqlens_k": (500,)},
    "causal, grouped heads": {"causal": True, "heads_k": 1},
    "few keys": {"seqlens_k": (33,)},
    "few keys, window, grouped heads": {"seqlens_q": (128,), "seqlens_k": (60,), "window": (30, 5), "heads_k": 2},
    "window": {"window": (100, 40)},
    "softcap, causal": {"softcap": 20.0, "causal": True},
    "ALiBi, causal": {"alibi": True, "causal": True},
    "sinks, causal, grouped heads": {"sinks": True, "causal": True, "heads_k": 2},
    "dropout, causal, grouped heads": {"dropout": 0.25, "causal": True, "heads_k": 2},
    "varlen, causal": {"seqlens_q": (200, 0, 77, 333), "seqlens_k": (200, 40, 130, 333), "causal": True},
    "varlen": {"seqlens_q": (129, 256, 1), "seqlens_k": (129, 300, 17)},
    "bfloat16, causal, grouped heads": {"dtype": torch.bfloat16, "causal": True, "heads_k": 2},
    "bfloat16, varlen, sinks": {
        "dtype": torch.bfloat16,
        "seqlens_q": (129, 256, 1),
        "seqlens_k": (129, 300, 17),
        "sinks": True,
    },
    "bfloat16, mask": {"dtype": torch.bfloat16, "mask": "brain"},
    "unaligned rows, causal": {"causal": True, "aligned": False},
    "v of 40 head dims, causal, grouped heads": {"head_dim_v": 40, "causal": True, "heads_k": 2},
    "bool mask of keys": {"mask": "keys", "seqlens_k": (400,)},
    "float16 bias, softcap": {"mask": "bias", "softcap": 20.0, "seqlens_k": (400,)},
    "float32 mask, causal, grouped heads": {"mask": "pairs", "causal": True, "heads_k": 2},
    "functions of a user: softcap, causal": {"of_user": True, "softcap": 20.0, "causal": True, "heads_k": 2},
}
# Its numbers, and which of (batch, heads, queries, keys) it has; the others are broadcast. Some queries see no key.
_MASKS: dict[str, tuple[torch.dtype, str]] = {
    "keys": (torch.bool, "bk"),
    "bias": (torch.float16, "hqk"),
    "brain": (torch.bfloat16, "hqk"),
    "pairs": (torch.float32, "bqk"),
}
_OTHER_HEAD_DIMS = (32, 96, 80, 256, 512, 40, 112, 160, 192, 33, 8, 224)


_CACHES: dict[str, dict[str, Any]] = {
    "cache, pages of 16": {},
    "cache, pages of 5": {"page_size": 5, "queries": 3, "heads_k": 2},
}


def cases() -> list[Case | CacheCase]:
    """The most important first: the time may end before the last."""
    found: list[Case | CacheCase] = []
    found += [Case(name, head_dim, **options) for name, options in _FEATURES.items() for head_dim in (64, 128)]
    found = [case for case in found if isinstance(case, CacheCase) or takes(case.dtype)]
    if find_spec("torch.nn.attention.flex_attention") is None:  # before torch 2.5
        found = [case for case in found if isinstance(case, CacheCase) or not case.of_user]
    found += [CacheCase(name, head_dim, **options) for name, options in _CACHES.items() for head_dim in (64, 128)]
    found.append(Case("v of 128 head dims, causal", 192, head_dim_v=128, causal=True))
    return found + [
        Case("causal" if i % 2 else "full", head_dim, causal=bool(i % 2)) for i, head_dim in enumerate(_OTHER_HEAD_DIMS)
    ]


def small_cases() -> list[Case | CacheCase]:
    """For the interpreter: each feature once."""
    return [case.small() for case in cases() if case.head_dim == 64]


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor]:
    """From N(0, 1); (batch, seqlen, heads, head_dim), v and dout with v's, or (total, heads, head_dim) for varlen."""
    generator = torch.Generator().manual_seed(1)

    def normal(lengths: tuple[int, ...], heads: int, dims: int) -> torch.Tensor:
        rows = (sum(lengths),) if case.is_varlen else (case.batch, lengths[0])
        width = dims + (0 if case.aligned else 1)  # rows that begin anywhere
        made = torch.randn((*rows, heads, width), generator=generator).to(device, case.dtype)
        return made[..., :dims]

    dims_v = case.head_dim_v or case.head_dim
    return {
        "q": normal(case.seqlens_q, case.heads, case.head_dim),
        "k": normal(case.seqlens_k, case.heads_k, case.head_dim),
        "v": normal(case.seqlens_k, case.heads_k, dims_v),
        "dout": normal(case.seqlens_q, case.heads, dims_v),
    }


def _cumulative(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)


def _slopes(case: Case, device: str) -> torch.Tensor | None:
    return torch.tensor([2.0**-head for head in range(1, case.heads + 1)], device=device) if case.alibi else None


def _mask(case: Case, device: str) -> torch.Tensor | None:
    if not case.mask:
        return None
    dtype, dimensions = _MASKS[case.mask]
    sizes = {"b": case.batch, "h": case.heads, "q": case.seqlens_q[0], "k": case.seqlens_k[0]}
    shape = [size if name in dimensions else 1 for name, size in sizes.items()]
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(shape, generator=generator) < 0.1
    if "q" in dimensions:
        hidden[..., 3::7, :] = True
    if dtype is torch.bool:
        return ~hidden.to(device)
    return torch.randn(shape, generator=generator).masked_fill(hidden, float("-inf")).to(device, dtype)


# Among the results where there is dropout: its signs say what is kept.
_S_DMASK = "s_dmask"


def _kept(case: Case, results: dict[str, torch.Tensor], b: int) -> torch.Tensor | None:
    """What dropout multiplies the probabilities of batch entry b by."""
    return (results[_S_DMASK][b] >= 0) / kept_share(case.dropout) if case.dropout else None


def _sinks(case: Case, device: str) -> torch.Tensor | None:
    return torch.arange(float(case.heads), device=device) - 1 if case.sinks else None


def _run_of_user(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    def softcapped(score: torch.Tensor, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return case.softcap * torch.tanh(score / case.softcap)

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx >= kv_idx

    lengths = case.seqlens_q[0], case.seqlens_k[0]
    block_mask = create_block_mask(causal, None, None, *lengths, device=q.device.type) if case.causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Any = flex_attention(q, k, v, softcapped, block_mask, enable_gqa=case.heads != case.heads_k)
    transposed: torch.Tensor = out.transpose(1, 2)
    return transposed


def _run(case: Case, inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    q, k, v = (inputs[name].detach().requires_grad_(case.has_gradients) for name in "qkv")
    if case.of_user:
        return _with_gradients(_run_of_user(case, q, k, v), {"dq": q, "dk": k, "dv": v}, inputs["dout"])
    bias = _mask(case, device)
    wanted = {"dq": q, "dk": k, "dv": v}
    if bias is not None and bias.is_floating_point():
        wanted["dbias"] = bias.requires_grad_()
    sinks = _sinks(case, device)
    if sinks is not None:
        wanted["ds_aux"] = sinks.requires_grad_()
    options: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": _slopes(case, device),
        "attn_bias": bias,
        "s_aux": sinks,
        "dropout_p": case.dropout,
        "return_attn_probs": True,
    }
    if case.is_varlen:
        starts = _cumulative(case.seqlens_q, device), _cumulative(case.seqlens_k, device)
        out, _, s_dmask = flash_attn_varlen_func(q, k, v, *starts, max(case.seqlens_q), max(case.seqlens_k), **options)
    else:
        out, _, s_dmask = flash_attn_func(q, k, v, **options)
    results = _with_gradients(out, wanted, inputs["dout"]) if case.has_gradients else {"out": out}
    return {**results, **({_S_DMASK: s_dmask} if case.dropout else {})}


def _with_gradients(out: torch.Tensor, wanted: dict[str, torch.Tensor], dout: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(out, tuple(wanted.values()), dout)
    return {"out": out.detach(), **dict(zip(wanted, gradients))}


def _sequences(case: Case) -> Iterator[tuple[Any, Any]]:
    """What selects each sequence's rows of q and of k."""
    if not case.is_varlen:
        for b in range(case.batch):
            yield b, b
        return
    at_q = at_k = 0
    for length_q, length_k in zip(case.seqlens_q, case.seqlens_k):
        yield slice(at_q, at_q + length_q), slice(at_k, at_k + length_k)
        at_q, at_k = at_q + length_q, at_k + length_k


def _worst(got: torch.Tensor, exact: Exact) -> tuple[float, float]:
    """The greatest error, and the greatest share that an error takes of what is allowed: NaN where one is."""
    if not got.numel():
        return 0.0, 0.0
    error = (got.double() - exact.value).abs()
    return error.max().item(), (error / exact.allowed).max().item()


def compare(case: Case, results: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """By tensor, its greatest error and the greatest share of what is allowed; and whether all are right."""
    device = inputs["q"].device.type
    plain = Scores(case.causal, case.window, case.softcap, _slopes(case, device), s_aux=_sinks(case, device))
    mask = _mask(case, device)
    worst = {name: [(0.0, 0.0)] for name in results if name != _S_DMASK}
    of_bias: list[Exact] = []  # by sequence
    of_sinks: list[Exact] = []
    for b, (rows_q, rows_k) in enumerate(_sequences(case)):
        bias = None if mask is None else mask[min(b, len(mask) - 1)]
        scores = replace(plain, bias=bias, kept=_kept(case, results, b))
        q, dout, k, v = inputs["q"][rows_q], inputs["dout"][rows_q], inputs["k"][rows_k], inputs["v"][rows_k]
        exact = exact_attention(q, k, v, dout, scores)
        of_bias.append(exact.pop("dbias"))
        if case.sinks:
            of_sinks.append(exact.pop("ds_aux"))
        for name, each in exact.items():
            if name not in results:
                continue
            worst[name].append(_worst(results[name][rows_k if name in ("dk", "dv") else rows_q], each))
    if mask is not None and "dbias" in results:
        worst["dbias"].append(_worst(results["dbias"], summed_bias(of_bias, mask)))
    if of_sinks:
        worst["ds_aux"].append(_worst(results["ds_aux"], Exact(*(torch.stack(each).sum(0) for each in zip(*of_sinks)))))
    return _judged(worst)


def _judged(worst: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    tensors = {}
    for name, found in worst.items():
        error, share = torch.tensor(found, dtype=torch.float64).amax(0).tolist()  # unlike max(), it keeps a NaN
        tensors[name] = {"max_error": error, "share_of_allowed": share}
    return {"tensors": tensors, "right": all(each["share_of_allowed"] <= 1 for each in tensors.values())}


def check(case: Case | CacheCase, device: str) -> dict[str, Any]:
    """What came of it; an exception is a result too."""
    row: dict[str, Any] = {"case": case.name, "head_dim": case.head_dim}
    try:
        if isinstance(case, CacheCase):
            results = cache.results_of(case, device)
            return {**row, **_judged({name: [_worst(*both)] for name, both in results.items()})}
        inputs = _inputs(case, device)
        return {**row, **compare(case, _run(case, inputs, device), inputs)}
    except Exception as error:
        return {**row, "right": False, "error": f"{type(error).__name__}: {error}"}
