"""S_dmask, with which flash-attn shows its tests what dropout did."""

import torch

from ._bias_gradient import of_sequences
from ._options import Options, has_cache
from .errors import Refusal

_LEAST = 2.0**-24  # float16's least number: what was dropped is told by its sign


def signed_probabilities(q: torch.Tensor, k: torch.Tensor, softmax_lse: torch.Tensor, options: Options) -> torch.Tensor:
    """The softmax of a call, (batch, num_heads, seqlen_q, seqlen_k), of q's dtype, negative where dropout dropped it;
    of cu_seqlens the longest sequences', 0 beyond a sequence's own lengths.

    It is a gradient of attn_bias, P (kept dP scale - delta): where every dP is 1 and delta half of scale, that is half
    of scale times what is wanted."""
    with torch.no_grad():
        q, k, softmax_lse = q.detach(), k.detach(), softmax_lse.detach()
        if options.cu_seqlens_q is None and k.shape[1] == 1:
            q, k, softmax_lse, options = _as_sequences(q, k, softmax_lse, options)
        seqlen_k = k.shape[1] if options.cu_seqlens_q is None else options.max_seqlen_k
        if seqlen_k == 1:  # the gradient of the bias of one key would be made of softmax_lse's
            options = options._replace(max_seqlen_k=2)
        bias = _bias_of_all_pairs(q, k, options)
        scale = 1 / kept_share(options.dropout_p)
        found = torch.ops.flash_attn_jit.backward(
            *(_first_dim(q), q, k, _first_dim(k), torch.zeros_like(q), softmax_lse),
            torch.full_like(softmax_lse, -scale / 2),
            [False, False, False, True, False],
            *options._replace(attn_bias=bias),
        )
        signed = found[3] * (2 / scale)
        signed = torch.where((signed < 0) & (signed > -_LEAST), -_LEAST, signed)
        lse = softmax_lse
        if options.cu_seqlens_q is not None:
            lse = of_sequences(lse, options.cu_seqlens_q, options.max_seqlen_q)
        signed = signed.masked_fill(lse.isnan()[..., None], float("nan"))  # of which the kernel makes 0
        return signed[..., :seqlen_k].to(q.dtype)


def refuse_caches(options: Options) -> None:
    """Before anything runs."""
    if options.dropout_p != 0.0 and has_cache(options):
        came = "is True with dropout_p and keys in a cache, which is not built yet"
        raise Refusal("return_attn_probs", came, "False", error=NotImplementedError).exception()


def kept_share(dropout_p: float) -> float:
    """As the kernels count it."""
    return min(max(int((1 - dropout_p) * 2**16 + 0.5), 1), 2**16 - 1) / 2**16


def _first_dim(like: torch.Tensor) -> torch.Tensor:
    ones = torch.zeros_like(like)
    ones[..., 0] = 1
    return ones


def _as_sequences(
    q: torch.Tensor, k: torch.Tensor, softmax_lse: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Options]:
    """The entries of a batch one behind the other: sequences may be said to be longer than they are."""
    (batch, seqlen_q), seqlen_k = q.shape[:2], k.shape[1]
    ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    options = options._replace(
        cu_seqlens_q=ends * seqlen_q, cu_seqlens_k=ends * seqlen_k, max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k
    )
    return q.flatten(0, 1), k.flatten(0, 1), softmax_lse.transpose(0, 1).flatten(1).contiguous(), options


def _bias_of_all_pairs(q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor:
    """The call's attn_bias in float32, or zeros, expanded: its gradient has a number for each pair."""
    if options.cu_seqlens_q is None:
        whole = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    else:
        whole = len(options.cu_seqlens_q) - 1, q.shape[1], options.max_seqlen_q, options.max_seqlen_k
    bias = options.attn_bias
    if bias is None:
        bias = q.new_zeros((1, 1, 1, 1), dtype=torch.float32)
    elif bias.dtype is torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, float("-inf"))
    return bias.float()[(None,) * (4 - bias.dim())].expand(whole)
