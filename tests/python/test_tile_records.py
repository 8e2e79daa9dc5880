"""Where the default tiles come from: tools/tile_search/records has each."""

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


def check_records(kind, features, mask, found_for=None):
    """Of the default tiles with those flags, each has a record for the mask with one of the features, or with any."""
    records = [r for r in json.loads((RECORDS / f"{kind}.json").read_text()) if r["mask"] == mask]
    judged = {
        without_register_dims(tile["tile"])
        for r in records
        if found_for is None or r["features"] in found_for
        for tile in r["best"]
    }
    most = 128 if kind == "bwd_all_keys" else 256
    for head_dim in range(16, most + 1, 16):
        kernel = ["--kind", kind, "--head-dim", head_dim, *MASKS[mask], *features.split()]
        for tile in run_program("inspect", *kernel, "--emit", "tiles").stdout.decode().split():
            assert without_register_dims(tile) in judged, (head_dim, tile)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("features", ["", "--softcap", "--alibi", "--varlen"])
@pytest.mark.parametrize("kind", SEARCHED)
def test_every_default_tile_has_a_record(kind, features, mask):
    check_records(kind, features, mask, found_for=("", features))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "features", ["--bias16", "--bias32", "--boolmask", "--boolmask --onerow", "--bias16 --unpaired"]
)
@pytest.mark.parametrize("kind", SEARCHED)
def test_every_default_tile_with_an_attn_bias_has_a_record(kind, features, mask):
    """Of that, where it has rows of its own; else of what the tile was found for."""
    check_records(kind, features, mask)


@pytest.mark.parametrize("mask", MASKS)
def test_a_sink_takes_the_tiles_of_kernels_without(mask):
    for head_dim in range(16, 257, 16):
        kernel = ["inspect", "--kind", "fwd", "--head-dim", head_dim, *MASKS[mask], "--emit", "tiles"]
        assert run_program(*kernel, "--sink").stdout == run_program(*kernel).stdout != b""
