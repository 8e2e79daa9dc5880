"""The public functions: flash-attn 2's Python interface."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import _core
from ._arguments import (
    UNBOUNDED,
    Window,
    check_tensor,
    dropout_refusal,
    max_seqlen as read_max_seqlen,
    number,
    read_splits,
    reject_what_is_no_tensor,
    scale as read_scale,
    truth,
    window as read_window,
)
from ._autograd import Result, attention, attention_kvpacked, attention_qkvpacked
from ._options import Options, with_seed
from ._s_dmask import refuse_caches, signed_probabilities
from .errors import Refusal

_is_compiling = torch.compiler.is_compiling

# out, or (out, softmax_lse, S_dmask) with return_attn_probs
Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# The parts of the functions' documentation that they share, by the name in {braces} that stands for each.
_SHARED: dict[str, str] = {
    "running": """
    Work goes on the tensors' device and that device's current stream, and nothing waits for it. The first call that
    needs a kernel compiles it, unless the cache or a prebuilt pack has it. CPU tensors run in the interpreter where
    ``FLASH_ATTN_JIT_INTERPRET=1`` is set. Under ``torch.autocast``, float32 inputs are cast to its dtype.
""",
    "options": """
        dropout_p: the share of the probabilities that become 0, from 0.0 to below 1.0; the others grow by
            1 / (1 - dropout_p), and softmax_lse says nothing of it. Counts in steps of 2^-16, one at least where it is
            not 0.0. Which pairs stay follows from a seed, which torch's generator of q's device draws at every call,
            and from their places in the problem.
        softmax_scale: a factor for the scores before the softmax, from -1e17 to 1e17; 1/sqrt(head_dim) where None.
        causal: query i sees key j where j <= i + seqlen_k - seqlen_q (aligned bottom-right).
        window_size: (left, right), two integers or a tensor of them: query i sees key j where
            i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right. Negative is unbounded. With
            ``causal``, right is 0. A tensor on the GPU costs a synchronisation.
        softcap: a score s becomes softcap * tanh(s / softcap), from 1e-6 to 1e17; 0.0 is off.
        alibi_slopes: (num_heads) or (batch, num_heads), float32: slope * |i + seqlen_k - seqlen_q - j| is taken from
            each score. Has no gradient. Values are not checked: slope * distance up to 1e7.
        deterministic: accepted; the result is the same bits every time with either value.
        return_attn_probs: also return softmax_lse, which has a gradient as out has, and S_dmask, which has none.
""",
    "bias": """
        attn_bias: bool, float32 or q's dtype, of a shape that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)
            (varlen: the longest sequences'), read through its strides. False hides a key from a query; a number is
            added to the score, after the softcap, and -inf hides; beyond -1e15 or 1e15 it counts as that. A query that
            sees no key has out 0 and softmax_lse +inf, one all of whose numbers are below -1e6 no gradients. Numbers
            have a gradient where q may have one, of attn_bias's shape and dtype, summed in float32.
""",
    "sinks": """
        s_aux: (num_heads), float32, float16 or bfloat16, contiguous: a logit of each head, a sink, that takes part in
            the softmax of its rows as a key with a v of 0 would: out = sum of exp(s) v / (exp(s_aux) + sum of exp(s)).
            softmax_lse is the logarithm of that denominator: of a query that sees no key it is the sink, and its out 0.
            -inf is no sink; +inf is not accepted, and not looked for. Has a gradient where q may have one.
""",
    "cache_options": """
        out: a tensor for the result, like q, which is returned. It shares no memory with q, k and v. Not with inputs
            that need a gradient, as the next two.
        seqused_k: (batch), int32, contiguous: how many of each sequence's rows of k and v are used. Read on the device:
            values are not checked on a GPU, but no row beyond k and v is read.
        leftpad_k: (batch), int32, contiguous: how many rows before each sequence's keys are padding, of those used.
        num_splits: where the queries are few, the most parts that the keys are split into; 0: as many as pay. With more
            than one the parts are added in a fixed order: the same bits every time.
""",
    "cu_seqlens": """
            (batch + 1), int32, contiguous, on the tensors' device: where each sequence starts, and at last where the
            last one ends. Sequences of length 0 are allowed. Rows past the last end belong to no sequence: out and
            the gradients are undefined there.
""",
    "max_seqlen": """
            the length of the longest sequence, an int or an integer tensor of 0 dimensions; one on the GPU costs a
            synchronisation.
""",
    "raises": """
        ValueError: an argument that does not fit; names the argument, what came and what is accepted.
        UnsupportedError: a ValueError for what the device cannot do.
        NotImplementedError: an argument that is not built yet; a backward pass with create_graph=True.
        CompileError, MissingKernelError, DriverError, InterpreterError, ConfigError: RuntimeErrors, see
            ``flash_attn_jit.errors``.
""",
    "returned": """a query that sees no key has out 0 and softmax_lse +inf, or its sink; S_dmask is an empty tensor, or
        with dropout the probabilities before it, (batch, num_heads, seqlen_q, seqlen_k), of q's dtype, negative where
        they were dropped: for tests, as it takes memory for every pair.""",
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def documented(function: _Function) -> _Function:
    """Puts the shared parts into the documentation."""
    if function.__doc__:
        shared = {name: text.strip() for name, text in _SHARED.items()}
        function.__doc__ = function.__doc__.format(**shared)
    return function


def read_options(
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    attn_bias: Any = None,
    s_aux: Any = None,
    seqused_k: Any = None,
    leftpad_k: Any = None,
    block_table: Any = None,
    seqused_more: int = 0,
    num_splits: Any = 0,
) -> Options:
    """The arguments of a public function, their types checked; lengths as they are. Defaults pass with one
    comparison each."""
    if type(dropout_p) is not float or dropout_p != 0.0:
        refusal = dropout_refusal(dropout_p)
        if refusal:
            raise refusal.exception()
        dropout_p = float(dropout_p)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = read_scale(softmax_scale)
    if causal is not True and causal is not False:
        causal = truth("causal", causal)
    # Not every torch.compile traces a question about a tuple's identity.
    unbounded = not _is_compiling() and window_size is UNBOUNDED
    left, right = UNBOUNDED if unbounded else read_window(window_size)
    if type(softcap) is not float or softcap != 0.0:
        softcap = number("softcap", softcap)
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes)
    if attn_bias is not None:
        check_tensor("attn_bias", attn_bias)
    if s_aux is not None:
        check_tensor("s_aux", s_aux)
        if s_aux.dtype in (torch.float16, torch.bfloat16):
            s_aux = s_aux.float()
    if deterministic is not True and deterministic is not False:
        truth("deterministic", deterministic)
    if seqused_k is not None:
        check_tensor("seqused_k", seqused_k)
    if leftpad_k is not None:
        check_tensor("leftpad_k", leftpad_k)
    if block_table is not None:
        check_tensor("block_table", block_table)
    return Options(
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=left,
        window_right=right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        attn_bias=attn_bias,
        dropout_p=dropout_p,
        s_aux=s_aux,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        seqused_more=seqused_more,
        leftpad_k=leftpad_k,
        block_table=block_table,
        num_splits=num_splits if num_splits == 0 else read_splits(num_splits),
    )


def _output(result: Result, return_attn_probs: bool, options: Options, q: torch.Tensor, k: torch.Tensor) -> Output:
    out, softmax_lse = result
    if not return_attn_probs:
        return out
    if options.dropout_p == 0.0:
        return out, softmax_lse, torch.empty(0, dtype=out.dtype, device=out.device)
    return out, softmax_lse, signed_probabilities(q, k, softmax_lse, options)


def _seeded(options: Options, q: Any, return_attn_probs: bool) -> Options:
    """With the seed that S_dmask is to be made with as well."""
    if not return_attn_probs or not isinstance(q, torch.Tensor):
        return options
    refuse_caches(options)
    return with_seed(options, q)


@documented
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    num_splits: int = 0,
) -> Output:
    """Attention: softmax(q k^T * softmax_scale + mask) v, head by head, in fp16 with fp32 accumulation. Differentiable
    in q, k, v, attn_bias and s_aux; the gradients are the same bits every time.

    {running}

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16 or bfloat16. Head dims 1 to 512, 1 to 256 where an input
            needs a gradient. Of every tensor only the last dimension must be contiguous; the other strides are read as
            they are.
        k: (batch, seqlen_k, num_heads_k, head_dim), of q's dtype. num_heads is a multiple of num_heads_k: query head i
            reads key head i // (num_heads / num_heads_k).
        v: like k; its head dim may be another one, 1 to 256, which out then has, too.
        {options}
        {bias}
        {sinks}
        {cache_options}

    Returns:
        out (batch, seqlen_q, num_heads, v's head_dim), of q's dtype and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (batch, num_heads, seqlen_q), float32, is the natural logarithm of
        the softmax's denominator; {returned}

    Raises:
        {raises}
    """
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        attn_bias=attn_bias,
        s_aux=s_aux,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        num_splits=num_splits,
    )
    options = _seeded(options, q, return_attn_probs)
    return _output(attention(q, k, v, options, return_attn_probs, out), return_attn_probs, options, q, k)


@documented
def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    num_splits: int = 0,
) -> Output:
    """``flash_attn_func`` for k and v in one tensor. It is read through its strides, and its gradient is written as one
    tensor: nothing is copied.

    {running}

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16 or bfloat16. Only the last dimension must be contiguous.
        kv: (batch, seqlen_k, 2, num_heads_k, head_dim), of q's dtype: k is kv[:, :, 0], v is kv[:, :, 1].
        {options}
        {bias}
        {sinks}
        {cache_options}

    Returns:
        out (batch, seqlen_q, num_heads, head_dim), of q's dtype and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (batch, num_heads, seqlen_q), float32; {returned}

    Raises:
        {raises}
    """
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        attn_bias=attn_bias,
        s_aux=s_aux,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        num_splits=num_splits,
    )
    options = _seeded(options, q, return_attn_probs)
    result = attention_kvpacked(q, kv, options, return_attn_probs, out)
    return _output(result, return_attn_probs, options, q, kv.select(-3, 0))


@documented
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Output:
    """``flash_attn_func`` for q, k and v in one tensor. It is read through its strides, and its gradient is written as
    one tensor: nothing is copied.

    {running}

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), float16 or bfloat16: q is qkv[:, :, 0], k is qkv[:, :, 1], v is
            qkv[:, :, 2]. Only the last dimension must be contiguous.
        {options}
        {bias}
        {sinks}

    Returns:
        out (batch, seqlen, num_heads, head_dim), of q's dtype and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (batch, num_heads, seqlen), float32; {returned}

    Raises:
        {raises}
    """
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        attn_bias=attn_bias,
        s_aux=s_aux,
    )
    options = _seeded(options, qkv, return_attn_probs)
    result = attention_qkvpacked(qkv, options, return_attn_probs)
    return _output(result, return_attn_probs, options, qkv.select(-3, 0), qkv.select(-3, 1))


def _lengths(
    cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    reject_what_is_no_tensor(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return (
        cu_seqlens_q,
        cu_seqlens_k,
        read_max_seqlen("max_seqlen_q", max_seqlen_q),
        read_max_seqlen("max_seqlen_k", max_seqlen_k),
    )


@documented
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    num_splits: int = 0,
) -> Output:
    """``flash_attn_func`` for sequences of different lengths, one after the other without padding. Differentiable in q,
    k, v, attn_bias and s_aux; the gradients are the same bits every time.

    {running}

    Args:
        q: (total_q, num_heads, head_dim), float16 or bfloat16. Head dims 1 to 512, 1 to 256 where an input needs a
            gradient. Of every tensor only the last dimension must be contiguous; the other strides are read as they
            are.
        k: (total_k, num_heads_k, head_dim), of q's dtype. num_heads is a multiple of num_heads_k: query head i reads
            key head i // (num_heads / num_heads_k).
        v: like k; its head dim may be another one, 1 to 256, which out then has, too.
        cu_seqlens_q: of the queries:
            {cu_seqlens}
        cu_seqlens_k: the same of the keys; with ``block_table`` how many keys each sequence has, or None where
            ``seqused_k`` says so.
        max_seqlen_q: of the queries:
            {max_seqlen}
        max_seqlen_k: the same of the keys.
        {options}
        block_table: (batch, pages of a sequence), int32, contiguous in the last dimension: k and v are (pages, page
            size, num_heads_k, head_dim), and rows p * page size and on of sequence b lie in page block_table[b, p].
            Pages of any size; those of a multiple of 16 rows are the fast ones. Numbers are not checked on a GPU, but
            nothing outside of k and v is read whatever they are.
        {bias}
        {sinks}
        {cache_options}

    Returns:
        out (total_q, num_heads, v's head_dim), of q's dtype and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (num_heads, total_q), float32, is the natural logarithm of the
        softmax's denominator; {returned}

    Raises:
        {raises}
    """
    reject_what_is_no_tensor(cu_seqlens_q=cu_seqlens_q)
    if cu_seqlens_k is not None or block_table is None:
        reject_what_is_no_tensor(cu_seqlens_k=cu_seqlens_k)
    elif seqused_k is None:
        accepted = "with a block_table one of them, which says how many keys each sequence has"
        raise Refusal("cu_seqlens_k", "is None, and so is seqused_k", accepted).exception()
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        cu_seqlens_q,
        cu_seqlens_k,
        read_max_seqlen("max_seqlen_q", max_seqlen_q),
        read_max_seqlen("max_seqlen_k", max_seqlen_k),
        attn_bias=attn_bias,
        s_aux=s_aux,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        block_table=block_table,
        num_splits=num_splits,
    )
    options = _seeded(options, q, return_attn_probs)
    return _output(attention(q, k, v, options, return_attn_probs, out), return_attn_probs, options, q, k)


@documented
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    num_splits: int = 0,
) -> Output:
    """``flash_attn_varlen_func`` for k and v in one tensor. It is read through its strides, and its gradient is written
    as one tensor: nothing is copied.

    {running}

    Args:
        q: (total_q, num_heads, head_dim), float16 or bfloat16. Only the last dimension must be contiguous.
        kv: (total_k, 2, num_heads_k, head_dim), of q's dtype: k is kv[:, 0], v is kv[:, 1].
        cu_seqlens_q: of the queries:
            {cu_seqlens}
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: of the queries:
            {max_seqlen}
        max_seqlen_k: the same of the keys.
        {options}
        {bias}
        {sinks}
        {cache_options}

    Returns:
        out (total_q, num_heads, head_dim), of q's dtype and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (num_heads, total_q), float32; {returned}

    Raises:
        {raises}
    """
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        *lengths,
        attn_bias=attn_bias,
        s_aux=s_aux,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        num_splits=num_splits,
    )
    options = _seeded(options, q, return_attn_probs)
    result = attention_kvpacked(q, kv, options, return_attn_probs, out)
    return _output(result, return_attn_probs, options, q, kv.select(-3, 0))


@documented
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Output:
    """``flash_attn_varlen_func`` for q, k and v in one tensor. It is read through its strides, and its gradient is
    written as one tensor: nothing is copied.

    {running}

    Args:
        qkv: (total, 3, num_heads, head_dim), float16 or bfloat16: q is qkv[:, 0], k is qkv[:, 1], v is qkv[:, 2]. Only
            the last dimension must be contiguous.
        cu_seqlens: of queries and keys:
            {cu_seqlens}
        max_seqlen: of queries and keys:
            {max_seqlen}
        {options}
        {bias}
        {sinks}

    Returns:
        out (total, num_heads, head_dim), of q's dtype and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (num_heads, total), float32; {returned}

    Raises:
        {raises}
    """
    reject_what_is_no_tensor(cu_seqlens=cu_seqlens)
    longest = read_max_seqlen("max_seqlen", max_seqlen)
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        *lengths,
        attn_bias=attn_bias,
        s_aux=s_aux,
    )
    options = _seeded(options, qkv, return_attn_probs)
    result = attention_qkvpacked(qkv, options, return_attn_probs)
    return _output(result, return_attn_probs, options, qkv.select(-3, 0), qkv.select(-3, 1))


def interpreter_report() -> _core.InterpreterReport | None:
    """The report of the interpreter's last run in this process: shared-memory traffic and bank conflicts per kind of
    access. None before the first run. A race, an out-of-bounds access or a read of memory never written does not get
    here: it raises InterpreterError.
    """
    report = _core.interpreter_report()
    return report if report.kernel else None
