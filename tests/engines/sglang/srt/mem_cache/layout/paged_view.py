def paged_kv_view(buf, page_size, head_num, head_dim):
    """(slots, heads, head_dim) -> (pages, page size, heads, head_dim), as a view."""
    rows = buf.stride(0)
    return buf.as_strided(
        (buf.shape[0] // page_size, page_size, head_num, head_dim), (page_size * rows, rows, *buf.stride()[1:])
    )
