import torch


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """slot_mapping: (tokens), page * page size + row of each token, negative for none. Tokens may be fewer than rows of
    key. The caches are (pages, page size, heads, head_dim)."""
    assert kv_cache_dtype in ("auto", "float16")
    page_size, tokens = key_cache.shape[1], slot_mapping.shape[0]
    nowhere = slot_mapping < 0  # their tokens go to a page that nothing reads, so that nothing waits for the device
    slots = torch.where(nowhere, key_cache.shape[0] * page_size - 1, slot_mapping)
    pages, rows = slots // page_size, slots % page_size
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache.index_put_((pages, rows), new[:tokens])
