"""``scaled_dot_product_attention`` on these kernels, and which of its calls they take."""

from typing import Any

import torch

from . import _core
from ._arguments import device_refusal, dropout_refusal, number, reject_what_is_no_tensor, truth
from ._autograd import attention_heads_first
from ._dtypes import HALVES, takes
from ._options import Options
from .errors import Refusal, UnsupportedError, kind_text

__all__ = ["sdpa"]

# The compiled module's limits, and what it says of them.
_OLDEST_GPU = _core.oldest_sm
MOST_HEAD_DIM, MOST_HEAD_DIM_OF_GRADIENTS = _core.most_head_dim, _core.most_head_dim_of_gradients
_ACCEPTED = _core.accepted


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on these kernels: its layout, its rules. Differentiable.

    Two rules differ from ``flash_attn_func``'s: heads come before the sequence, and the causal mask is aligned
    top-left: query i sees key j where j <= i, however long the two are. Under ``torch.autocast`` the inputs are cast
    as SDPA casts them, all but float64 to its dtype.

    Args:
        query: (..., num_heads, seqlen_q, head_dim), float16 or bfloat16, with at least 2 dimensions. Head dims 1 to
            512, 1 to 256 where an input needs a gradient. Of every tensor only the last dimension must be contiguous.
        key: (..., num_heads_k, seqlen_k, head_dim), with query's dtype and number of dimensions. Nothing is broadcast.
        value: like key; to 256 with a head_dim of its own.
        attn_mask: None; or bool, float32 or of query's dtype, of a shape that broadcasts to (..., num_heads, seqlen_q,
            seqlen_k): False hides a key from a query, a number is added to the score (beside a query of 4 dimensions at
            least 2, as in PyTorch); or a causal mask of ``torch.nn.attention.bias``: ``causal_upper_left(seqlen_q,
            seqlen_k)``, which is what is_causal does, or ``causal_lower_right(seqlen_q, seqlen_k)``: query i sees key j
            where j <= i + seqlen_k - seqlen_q. A query that sees no key gives 0. Masks are read through their strides
            and not copied, but for one of more than 4 dimensions that is expanded over some of those before the heads.
            Of those dimensions it has all or none; or from some one on, with the heads, where query, key and value can
            be read as if these were one dimension. One of numbers has a gradient.
        dropout_p: the share of the probabilities that become 0: see ``flash_attn_func``. From 0.0 to below 1.0.
        is_causal: query i sees key j where j <= i.
        scale: a factor for the scores before the softmax; 1/sqrt(head_dim) where None.
        enable_gqa: num_heads may be a multiple of num_heads_k: query head i reads key head
            i // (num_heads / num_heads_k). Where False they must be equal.

    Returns:
        out, query's shape and dtype. In memory the sequence comes before the heads, as with SDPA's flash backend.

    Raises:
        ValueError: an argument that does not fit; names it, what came and what is accepted.
        IndexError: an attn_mask of less than 2 dimensions beside a query of 4.
        UnsupportedError: a ValueError for a head dim or a GPU that these kernels do not have.
        NotImplementedError: a backward pass with create_graph=True.
    """
    if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)):
        reject_what_is_no_tensor(query=query, key=key, value=value)
    if is_causal is not True and is_causal is not False:
        is_causal = truth("is_causal", is_causal)
    if enable_gqa is not True and enable_gqa is not False:
        enable_gqa = truth("enable_gqa", enable_gqa)
    if scale is not None:
        scale = number("scale", scale)
    refusal = find_refusal(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if refusal:
        raise refusal.exception()
    try:
        return attention(query, key, value, attn_mask, float(dropout_p), is_causal, scale)
    except ValueError as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise refusal.exception() from None


def is_causal_bias(attn_mask: Any) -> bool:
    """Whether it is one of torch.nn.attention.bias, a module that is slow to import and may not be there."""
    return type(attn_mask).__module__ == "torch.nn.attention.bias"


def find_refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> Refusal | None:
    """Why these arguments cannot be taken; None where they can, but for what refusal_of() tells."""
    if dropout_p != 0.0:
        refusal = dropout_refusal(dropout_p)
        if refusal:
            return refusal
    device, cast = query.device, _autocast_dtype(query)
    return (
        platform_refusal(device)
        or tensor_refusal("query", query, query, cast)
        or tensor_refusal("key", key, query, cast)
        or tensor_refusal("value", value, query, cast)
        or _shape_refusal(query, key, value, enable_gqa)
        or (_mask_refusal(query, key, value, attn_mask, is_causal) if attn_mask is not None else None)
    )


_NAMES = {"q": "query", "k": "key", "v": "value", "softmax_scale": "scale"}


def refusal_of(error: ValueError) -> Refusal | None:
    """Why the compiled module refuses a call that find_refusal() has let through: its scale, or its size. Nothing has
    run then. None for an error that is no refusal."""
    refusal: Refusal | None = getattr(error, "refusal", None)
    return refusal and refusal._replace(argument=_NAMES.get(refusal.argument, refusal.argument))


def _mask_refusal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, is_causal: bool
) -> Refusal | None:
    if is_causal:
        return Refusal("is_causal", "is True and attn_mask is given", "one of the two")
    if is_causal_bias(mask):
        return _bias_refusal(query, key, mask)
    if not isinstance(mask, torch.Tensor):
        return Refusal("attn_mask", f"is {kind_text(mask)}", "None or a torch.Tensor")
    if mask.device != query.device:
        return device_refusal("attn_mask", mask.device, "query", query.device)
    dtype = _dtype_of(query, _autocast_dtype(query))
    if mask.layout is not torch.strided or mask.is_nested or mask.dtype not in (torch.bool, torch.float32, dtype):
        came = "is a nested tensor" if mask.is_nested else f"has dtype {mask.dtype} and layout {mask.layout}"
        return Refusal("attn_mask", came, f"a strided tensor of torch.bool, torch.float32 or {dtype}")
    whole = (*query.shape[:-1], key.shape[-2])
    if mask.dim() < 2 and len(whole) == 4:  # where PyTorch raises it, but for its math backend
        advice = "Use attn_mask[None]" if mask.dim() else ""
        return Refusal("attn_mask", f"has {mask.dim()} dimensions and query 4", "2 to 4", advice, IndexError)
    if not (1 <= mask.dim() <= len(whole) and all(n in (1, size) for n, size in zip(mask.shape[::-1], whole[::-1]))):
        return Refusal("attn_mask", f"has shape {tuple(mask.shape)}", f"a shape that broadcasts to {whole}")
    if len(whole) <= 4:
        return None
    batch_dims = _batch_dims(query, mask)
    if batch_dims == query.dim() - 3:
        return None
    if batch_dims is None or not all(_are_one(tensor, batch_dims) for tensor in (query, key, value)):
        return Refusal(
            "attn_mask",
            f"has shape {tuple(mask.shape)}, of which no one stride leads from head to head of all batches",
            "all dimensions before the heads, or none",
            f"Use attn_mask.expand{(*whole[:-3], -1, -1, -1)}, which is copied",
        )
    return None


def _batch_dims(query: torch.Tensor, mask: torch.Tensor | None) -> int | None:
    """How many of query's first dimensions are the kernels' batch; the others before the sequence are their heads. All
    but one, unless a mask is broadcast over some of them alone. None where no number leaves it one stride for each."""
    outer = query.shape[:-2]
    most = max(len(outer) - 1, 0)
    if mask is None or len(outer) <= 2:
        return most
    of_mask = (*(1 for _ in range(query.dim() - mask.dim())), *mask.shape[:-2])
    for batch_dims in range(most, -1, -1):
        parts = slice(batch_dims), slice(batch_dims, None)
        if all(set(of_mask[part]) <= {1} or of_mask[part] == outer[part] for part in parts):
            return batch_dims
    return None


def _are_one(tensor: torch.Tensor, first: int) -> bool:
    """Whether its dimensions from there to the heads are one, as they lie in memory."""
    shape, strides = tensor.shape, tensor.stride()
    return all(strides[d] == shape[d + 1] * strides[d + 1] for d in range(first, tensor.dim() - 3))


def _bias_refusal(query: torch.Tensor, key: torch.Tensor, bias: Any) -> Refusal | None:
    lengths = query.shape[-2], key.shape[-2]
    if lengths == (bias.seq_len_q, bias.seq_len_kv):
        return None
    return Refusal(
        "attn_mask",
        f"is a causal mask of {bias.seq_len_q} queries and {bias.seq_len_kv} keys, and there are "
        f"{lengths[0]} and {lengths[1]}",
        "a mask of query's and key's lengths",
    )


def tensor_refusal(name: str, tensor: torch.Tensor, query: torch.Tensor, cast: torch.dtype | None) -> Refusal | None:
    """Why a tensor cannot be taken beside that query, or as it, under autocast to `cast`."""
    rank, device = query.dim(), query.device
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
        return Refusal(name, f"is {kind}", "a strided tensor")
    if tensor.dim() < 2 or tensor.dim() != rank:
        return Refusal(
            name,
            f"has {tensor.dim()} dimensions and query {rank}",
            "2 or more, (..., heads, seqlen, head_dim), query, key and value alike",
        )
    if tensor.device != device:
        return device_refusal(name, tensor.device, "query", device)
    dtype, of_query = _dtype_of(tensor, cast), _dtype_of(query, cast)
    if not takes(dtype) or dtype is not of_query:
        return _dtype_refusal(name, tensor, dtype, of_query)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        advice = f"Use {name}.contiguous()"
        return Refusal(name, f"has strides {tensor.stride()}", _ACCEPTED["last_dim"], advice)
    return None


def _dtype_refusal(name: str, tensor: torch.Tensor, dtype: torch.dtype, of_query: torch.dtype) -> Refusal:
    came = f"has dtype {tensor.dtype}" + ("" if dtype is tensor.dtype else f", {dtype} under autocast")
    advice = f"Cast it: {name}.to(torch.float16)"
    if takes(dtype):
        return Refusal(name, f"{came} and query {of_query}", "query's dtype", f"Cast it: {name}.to({of_query})")
    if dtype is not torch.bfloat16:
        return Refusal(name, came, _ACCEPTED["dtype"], advice)
    return Refusal(name, f"{came}, and FLASH_ATTN_JIT_BFLOAT16 is refuse", "torch.float16", advice, UnsupportedError)


ACCEPTED_WITH_GRADIENTS = f"1 to {MOST_HEAD_DIM_OF_GRADIENTS} where one does"


def need_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them is given to autograd."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _shape_refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> Refusal | None:
    *batch, _, head_dim = query.shape
    if not 1 <= head_dim <= MOST_HEAD_DIM:
        return Refusal("query", f"has head_dim {head_dim}", _ACCEPTED["head_dim"], error=UnsupportedError)
    if key.shape[-1] != head_dim:
        return Refusal("key", f"has head_dim {key.shape[-1]} and query {head_dim}", "query's")
    if not 1 <= value.shape[-1] <= MOST_HEAD_DIM:
        return Refusal("value", f"has head_dim {value.shape[-1]}", _ACCEPTED["head_dim"], error=UnsupportedError)
    most = max(head_dim, value.shape[-1])
    if most > MOST_HEAD_DIM_OF_GRADIENTS and value.shape[-1] != head_dim:
        came = f"has head_dim {value.shape[-1]} and query {head_dim}"
        return Refusal("value", came, f"query's, or both 1 to {MOST_HEAD_DIM_OF_GRADIENTS}", error=UnsupportedError)
    if head_dim > MOST_HEAD_DIM_OF_GRADIENTS and need_gradient(query, key, value):
        came = f"has head_dim {head_dim}, and an input needs a gradient"
        return Refusal("query", came, ACCEPTED_WITH_GRADIENTS, error=UnsupportedError)
    for name, tensor in (("key", key), ("value", value)):
        *batch_k, _, _ = tensor.shape
        if batch_k[:-1] != batch[:-1]:
            return Refusal(
                name,
                f"has batch dimensions {tuple(batch_k[:-1])} and query {tuple(batch[:-1])}",
                "query's: nothing is broadcast",
            )
    if value.shape[:-1] != key.shape[:-1]:
        came = f"has shape {tuple(value.shape)} and key {tuple(key.shape)}"
        return Refusal("value", came, "key's but for the last dimension")
    if query.dim() == 2:
        return None
    heads, heads_k = query.shape[-3], key.shape[-3]
    if heads == heads_k:
        return None
    if not enable_gqa:
        return Refusal("key", f"has {heads_k} heads and query {heads}", "query's, or enable_gqa=True")
    if heads_k == 0 or heads % heads_k:
        return Refusal("query", f"has {heads} heads and key {heads_k}", "a multiple of key's")
    return None


_capabilities: dict[int, tuple[int, int]] = {}  # of a GPU's ordinal


def _capability(ordinal: int) -> tuple[int, int] | None:
    """Asked where a tensor is on that GPU, so that CUDA is up already: nothing here may start it. None without CUDA,
    where a tensor that says it is on a GPU is a tracer's."""
    if ordinal not in _capabilities:
        if not torch.cuda.is_available():
            return None
        _capabilities[ordinal] = torch.cuda.get_device_capability(ordinal)
    return _capabilities[ordinal]


def _interprets() -> bool:
    return _core.interprets()


# What torch.compiler.assume_constant_result() does, which imports the compiler: torch.compile runs these two when it
# traces, and goes by their results.
_function: Any
for _function in (_capability, _interprets):
    _function._dynamo_marked_constant = True


def platform_refusal(device: torch.device) -> Refusal | None:
    kind = device.type
    if kind == "cuda":
        capability = _capability(device.index)
        # Numbers, because not every torch's compiler compares tuples.
        if capability is None or 10 * capability[0] + capability[1] >= _OLDEST_GPU:
            return None
        came = f"is on {device}, an sm_{capability[0]}{capability[1]}"
        return Refusal("query", came, _ACCEPTED["gpu"], error=UnsupportedError)
    if kind == "meta" or (kind == "cpu" and _interprets()):
        return None
    return Refusal("query", f"is on device {device}", _ACCEPTED["device"])


_MULTIPLIES_BFLOAT16 = 80


def refusal_where_others_are_better(query: torch.Tensor) -> Refusal | None:
    """Why a call that these kernels take is left to whoever else takes it: GPUs that multiply bfloat16 lose nothing of
    its range."""
    device = query.device
    if device.type != "cuda" or _dtype_of(query, _autocast_dtype(query)) is not torch.bfloat16:
        return None
    capability = _capability(device.index)
    if capability is None or 10 * capability[0] + capability[1] < _MULTIPLIES_BFLOAT16:
        return None
    came = f"has dtype torch.bfloat16 on {device}, an sm_{capability[0]}{capability[1]}, which multiplies it as it is"
    return Refusal("query", came, "an older GPU, or torch.float16")


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast casts to on the tensor's device; None where it is off."""
    device = tensor.device.type
    if device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _dtype_of(tensor: torch.Tensor, cast: torch.dtype | None) -> torch.dtype:
    """The dtype that SDPA would see: autocast casts every floating dtype but float64."""
    if cast is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor.dtype
    return cast


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """What find_refusal() let through."""
    dtype = query.dtype
    if dtype not in HALVES or key.dtype is not dtype or value.dtype is not dtype or _autocast_dtype(query) is not None:
        dtype = _dtype_of(query, _autocast_dtype(query))
        query, key, value = (x.to(dtype) for x in (query, key, value))
    right, bias, batch_dims = -1, None, max(query.dim() - 3, 0)
    if attn_mask is not None:
        if is_causal_bias(attn_mask):
            is_causal = True
        else:
            if query.dim() > 4:
                batch_dims = _batch_dims(query, attn_mask) or 0
            bias, attn_mask = _bias_of(attn_mask, query.dim(), batch_dims), None
    if is_causal and (attn_mask is None or attn_mask.variant.name != "LOWER_RIGHT"):
        seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
        if seqlen_q > seqlen_k:
            # The window is aligned bottom-right: the query's own key there is i + seqlen_k - seqlen_q.
            is_causal, right = False, seqlen_q - seqlen_k
        elif seqlen_q < seqlen_k:
            # No query sees a key past the last query's. Among the others the two alignments are one.
            key, value = key[..., :seqlen_q, :], value[..., :seqlen_q, :]
    options = Options(softmax_scale=scale, causal=is_causal, window_right=right, attn_bias=bias, dropout_p=dropout_p)
    if query.dim() == 4:
        return attention_heads_first(query, key, value, options)
    query_4, key_4, value_4 = (_of_rank_4(tensor, batch_dims) for tensor in (query, key, value))
    out = attention_heads_first(query_4, key_4, value_4, options)
    return out.reshape(query.shape)


def _bias_of(mask: torch.Tensor, rank: int, batch_dims: int) -> torch.Tensor:
    """As the kernels of a query of that rank take it."""
    if rank <= 4 or mask.dim() <= 3:
        return mask
    return _of_rank_4(mask[(None,) * (rank - mask.dim())], batch_dims)


def _of_rank_4(tensor: torch.Tensor, batch_dims: int) -> torch.Tensor:
    """(batch, heads, ..., ...): the first dimensions make the batch, the others before the last two the heads."""
    if tensor.dim() == 2:
        return tensor[None, None]
    tensor = tensor.flatten(batch_dims, -3)
    return tensor.flatten(0, -4) if batch_dims else tensor[None]
