"""Colours, marks and words of the charts and the page: each in one place, with its two themes."""

from typing import NamedTuple


class Colour(NamedTuple):
    """Charts are drawn in the light one; in the page a CSS variable of the role's name takes its place."""

    light: str
    dark: str


ROLES = {
    "surface": Colour("#fefefe", "#161b22"),
    "page": Colour("#f3f5f7", "#0d1117"),
    "ink": Colour("#1c2127", "#e8ecf1"),
    "muted": Colour("#525c68", "#a6b1bd"),
    "grid": Colour("#dfe3e8", "#30373f"),
    "edge": Colour("#c6ccd3", "#3d4650"),
    "link": Colour("#0b5bd0", "#84b8ff"),
    "tensor": Colour("#1f63c4", "#78aefc"),
    "lsu": Colour("#b24a07", "#ff9f57"),
    "xu": Colour("#1a7a43", "#63cf86"),
    "issue": Colour("#8536b6", "#cd98ff"),
    "fma": Colour("#ad2a66", "#ff8abd"),
    "alu": Colour("#6d6400", "#d8cb4b"),
    "dram": Colour("#00727f", "#4dd0e1"),
    "other": Colour("#4d5966", "#aab5c1"),
    "rival": Colour("#c02323", "#ff8178"),
    "winner": Colour("#e7f0fd", "#1d2c43"),
    "warning": Colour("#fff3d1", "#3b2f0c"),
    "warned": Colour("#5e4700", "#f4d57c"),
}


class Mark(NamedTuple):
    """How what limits a kernel is drawn: never by colour alone."""

    role: str
    marker: str  # matplotlib's
    symbol: str  # the same in text
    words: str


_LIMITS = {
    "tensor": Mark("tensor", "o", "●", "tensor cores"),
    "lsu": Mark("lsu", "s", "■", "shared memory and loads (lsu)"),
    "xu": Mark("xu", "^", "▲", "exponentials (xu)"),
    "issue": Mark("issue", "D", "◆", "issue slots"),
    "fma": Mark("fma", "v", "▼", "fp32 (fma)"),
    "alu": Mark("alu", "P", "✚", "integers (alu)"),
    "dram": Mark("dram", "p", "⬟", "memory (dram)"),
}
_UNKNOWN = Mark("other", "h", "⬢", "not known")
RIVAL = Mark("rival", "X", "✖", "PyTorch's SDPA")


def mark_of(limited_by: str) -> Mark:
    if not limited_by:
        return _UNKNOWN
    return _LIMITS.get(limited_by, _UNKNOWN._replace(words=limited_by))


OTHER_LABELS = {
    "sdpa_efficient": "SDPA memory-efficient",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_math": "SDPA math",
}
KIND_WORDS = {
    "fwd": "forward",
    "fwd_wide": "forward of head dims above 256",
    "bwd_preprocess": "backward, preprocess",
    "bwd_dkdv": "backward, dK and dV",
    "bwd_dq": "backward, dQ",
    "bwd_all_keys": "backward, all keys in a block",
    "bwd_dbias": "backward, the gradient of attn_bias",
    "decode": "forward of few queries",
    "decode_combine": "forward of few queries, splits put together",
    "append": "rows into a cache of keys and values",
}
KIND_MARKS = {
    "fwd": Mark("tensor", "o", "●", KIND_WORDS["fwd"]),
    "fwd_wide": Mark("tensor", "H", "⬣", KIND_WORDS["fwd_wide"]),
    "bwd_dkdv": Mark("lsu", "s", "■", KIND_WORDS["bwd_dkdv"]),
    "bwd_dq": Mark("xu", "^", "▲", KIND_WORDS["bwd_dq"]),
    "bwd_all_keys": Mark("fma", "v", "▼", KIND_WORDS["bwd_all_keys"]),
    "bwd_dbias": Mark("other", "d", "◇", KIND_WORDS["bwd_dbias"]),
    "bwd_preprocess": Mark("issue", "D", "◆", KIND_WORDS["bwd_preprocess"]),
    "decode": Mark("dram", "p", "⬟", KIND_WORDS["decode"]),
    "decode_combine": Mark("alu", "P", "✚", KIND_WORDS["decode_combine"]),
    "append": Mark("other", "h", "⬢", KIND_WORDS["append"]),
}


def theme(name: str) -> str:
    """CSS declarations of every role's variable, for "light" or "dark"."""
    return "".join(f"--{role}:{getattr(colour, name)};" for role, colour in ROLES.items())
