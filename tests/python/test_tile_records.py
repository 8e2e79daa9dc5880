"""Where the default tiles come from: tools/tile_search/records has each, of plain kernels and with a feature."""

import json
from pathlib import Path

import pytest
from conftest import run_program

from flash_attn_jit import _core

RECORDS = Path(__file__).parents[2] / "tools" / "tile_search" / "records"
MASKS = {"full": [], "causal": ["--causal"], "window": ["--window"]}


def without_register_dims(tile: str) -> str:
    """m256n16w8q64l2b7k7 less q64: a row of the tables serves smaller head dims with fewer dims in registers."""
    before, after = tile.split("q")
    return before + after[after.index("l") :]


# Not of decode: what counts there is memory, where the search goes by products.
SEARCHED = [family.word for family in _core.kernel_families() if family.has_tile_costs and family.word != "decode"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("features", ["", "--softcap", "--alibi", "--varlen"])
@pytest.mark.parametrize("kind", SEARCHED)
def test_every_default_tile_has_a_record(kind, features, mask):
    records = [r for r in json.loads((RECORDS / f"{kind}.json").read_text()) if r["mask"] == mask]
    judged = {
        without_register_dims(tile["tile"]) for r in records if r["features"] in ("", features) for tile in r["best"]
    }
    most = 128 if kind == "bwd_all_keys" else 256
    for head_dim in range(16, most + 1, 16):
        kernel = ["--kind", kind, "--head-dim", head_dim, *MASKS[mask], *features.split()]
        for tile in run_program("inspect", *kernel, "--emit", "tiles").stdout.decode().split():
            assert without_register_dims(tile) in judged, (head_dim, tile)
