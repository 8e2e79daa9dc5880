"""flash-attn-jit model: what it says of a kernel and of a problem; and the data that the library took from it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS_ALL, find_nvrtc, needs_nvrtc_of_the_tables, program_path, run_program

from flash_attn_jit import _core

REPOSITORY = Path(__file__).parents[2]
PROBLEM = ["--batch", 4, "--heads", 16, "--seqlen-q", 1024]


def model(*arguments, **changes):
    done = run_program("model", *arguments, FLASH_ATTN_JIT_NVRTC=find_nvrtc(12), **changes)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def prediction(*arguments):
    return json.loads(model(*arguments, "--json"))


def test_a_prediction_in_words_and_in_json():
    flags = ["--head-dim", 64, *PROBLEM, "--profile", 3]
    text, found = model(*flags), prediction(*flags)
    assert "Tesla T4, predicted" in text and "MHz" in text and "limited by" in text
    assert found["predicted"] is True and found["card"]["name"] == "Tesla T4"
    assert 0.7 < found["useful"] < 1 and 0.7 < found["useful_under_stress"] < 1
    assert found["pipes"][found["limit"]] == max(v for pipe, v in found["pipes"].items() if pipe != "issue")
    assert len(found["loop"]["waits"]) == 3
    assert sum(found["loop"]["waits_by_reason"].values()) == pytest.approx(1)
    assert found["seconds"] > found["seconds_at_boost"] > found["problem"]["copy_seconds"]
    assert found["problem"]["copy_seconds"] > found["problem"]["dram_seconds"] > 0
    assert found["problem"]["limit"] == found["limit"]
    assert found["problem"]["useful_flops"] == 4 * 4 * 16 * 1024 * 1024 * 64
    # A whole problem reaches less than its main loop does.
    assert found["problem"]["share_of_peak"] < found["useful"]


def test_longer_sequences_take_longer_and_get_closer_to_the_loop():
    of = [prediction("--head-dim", 64, "--heads", 16, "--seqlen-q", length) for length in (512, 2048, 8192)]
    assert of[0]["seconds"] < of[1]["seconds"] < of[2]["seconds"]
    assert of[0]["problem"]["share_of_peak"] < of[2]["problem"]["share_of_peak"]
    causal = prediction("--head-dim", 64, "--causal", "--heads", 16, "--seqlen-q", 8192)
    assert 0.5 < causal["seconds"] / of[2]["seconds"] < 0.7


def test_cards():
    t4, geforce = (prediction("--head-dim", 64, *PROBLEM, "--gpu", gpu) for gpu in ("t4", "rtx2080ti"))
    # Half the rate of tensor instructions with float32 accumulators, over 68 multiprocessors and not 40.
    assert geforce["card"]["multiprocessors"] == 68
    assert geforce["loop"]["cycles"] > 1.7 * t4["loop"]["cycles"]


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_a_kernel_without_a_main_loop(head_dim):
    preprocess = prediction("--kind", "bwd_preprocess", "--head-dim", head_dim, *PROBLEM)
    assert "useful" not in preprocess and preprocess["seconds"] >= preprocess["problem"]["copy_seconds"] > 0


TOKEN = ["--heads", 32, "--gqa", 4, "--seqlen-q", 1, "--seqlen-k", 8192]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_token_over_a_cache_reads_it_nearly_as_fast_as_a_copy_would(head_dim):
    """With what puts the splits together: 85 % at least."""
    flags = ["--kind", "decode", "--head-dim", head_dim, *TOKEN]
    decode, combine = prediction(*flags), prediction("--kind", "decode_combine", "--head-dim", head_dim, *TOKEN)
    assert decode["card"]["copied_bytes_per_second"] < decode["card"]["dram_bytes_per_second"]
    assert (decode["problem"]["limit"], combine["problem"]["limit"]) == ("dram", "latency")
    assert decode["problem"]["share_of_copies"] == 1
    assert decode["problem"]["copy_seconds"] / (decode["seconds"] + combine["seconds"]) >= 0.85
    text = model(*flags)
    assert "limited by dram" in text and "its nominal 320 GB/s" in text and "the 240 that copies get" in text


def test_a_card_whose_copies_are_not_known():
    flags = ["--head-dim", 64, *PROBLEM, "--gpu", "rtx2080ti"]
    found = prediction(*flags)
    assert found["card"]["copied_bytes_per_second"] is None
    assert found["problem"]["copy_seconds"] == found["problem"]["dram_seconds"]
    assert "its nominal 616 GB/s\n" in model(*flags)


def test_a_wider_window_takes_longer():
    narrow, wide = (
        prediction("--head-dim", 64, "--window", *PROBLEM, "--window-size", size)["seconds"] for size in (64, 512)
    )
    assert narrow < wide


def test_the_bytes_of_an_attn_bias():
    flags = ["--head-dim", 64, "--batch", 2, "--heads", 4, "--seqlen-q", 128, "--seqlen-k", 256]

    def dram_bytes(*more):
        return prediction(*flags, *more)["problem"]["dram_seconds"] * 320e9

    without = dram_bytes()
    assert dram_bytes("--bias16") - without == pytest.approx(2 * 2 * 4 * 128 * 256)
    assert dram_bytes("--bias16", "--bias-batch", 1) - without == pytest.approx(2 * 4 * 128 * 256)
    assert dram_bytes("--boolmask", "--onerow", "--bias-heads", 1) - without == pytest.approx(2 * 256)
    of_rows = ["--kind", "bwd_preprocess"]  # which reads none
    assert dram_bytes(*of_rows, "--bias16", "--bias-batch", 1) == dram_bytes(*of_rows)


def test_what_is_appended_to_a_cache():
    append = ["--kind", "append", "--head-dim", 128, "--heads", 32, "--gqa", 4]
    found = prediction(*append, "--batch", 2, "--seqlen-q", 100)
    rows = 2 * 2 * 8 * 100  # of k and v
    assert found["problem"]["blocks"] == rows // 4  # a warp a row
    assert found["problem"]["dram_seconds"] == pytest.approx(2 * rows * 128 * 2 / 320e9)  # read and written


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--gpu", "a100"], "--gpu"),
        (["--batch", "4"], "--seqlen-q"),
        (["--seqlen-q", "0"], "--seqlen-q"),
        (["--seqlen-q", "64", "--gqa", "4", "--heads", "6"], "--heads"),
        (["--seqlen-q", "64", "--window"], "--window-size"),
        (["--seqlen-q", "64", "--window-size", "3"], "--window-size"),
        (["--seqlen-q", "64", "--bias-heads", "1"], "--bias-heads is given without an attn_bias"),
        (["--bias16", "--bias-batch", "1"], "--bias-batch is given without a problem"),
        (["--bias16", "--seqlen-q", "64", "--batch", "4", "--bias-batch", "3"], "--bias-batch is 3"),
        (["--bias16", "--boolmask"], "bias16"),
        (["--unpaired"], "unpaired"),
        (["--profile", "0"], "--profile"),
        (["--kind", "append", "--seqlen-q", "1", "--seqlen-k", "8192"], "--seqlen-k is given with --kind append"),
        (["--tile", "m1"], "--tile"),
    ],
)
def test_wrong_flags_are_named(flags, named):
    done = run_program("model", "--head-dim", 64, *flags)
    assert done.returncode == 2
    assert named in done.stderr.decode() and "accepted" in done.stderr.decode()


@pytest.mark.parametrize(
    ("more", "accepted"),
    [
        (["--seqlen-q", 200], "1 to 128"),
        (["--seqlen-q", 50, "--seqlen-k", 129], "1 to 128"),
        (["--seqlen-q", 100, "--tile", "m64n16w4q64l0b8k8"], "1 to 64"),
    ],
)
def test_more_keys_than_a_block_has_are_refused(more, accepted):
    done = run_program("model", "--kind", "bwd_all_keys", "--head-dim", 64, *more)
    assert done.returncode == 2 and done.stdout == b""
    assert b"--seqlen-k is " in done.stderr and done.stderr.decode().endswith(f"accepted: {accepted}\n")


def numbers(row):
    return [int(number) for number in re.findall(r"\d+", row.split("//")[0])]


def test_the_costs_of_default_tiles_are_the_models():
    """Another NVRTC makes other code: a tenth is allowed."""
    needs_nvrtc_of_the_tables()
    source = REPOSITORY / "generator" / "tile_costs.inc"
    rows = {row.split("// ")[1].strip(): row for row in source.read_text().splitlines() if row.startswith("{")}
    assert len(rows) == sum(family.has_tile_costs for family in _core.kernel_families()) * 3 * 16
    one_of_each = ["fwd causal 64", "bwd_dkdv full 32", "bwd_dq window 32", "bwd_all_keys causal 16"]
    chosen = list(rows) if TESTS_ALL else one_of_each
    command = [sys.executable, REPOSITORY / "tools" / "tile_costs" / "tile_costs.py", "--program", program_path()]
    made = subprocess.run(
        [*command, "--nvrtc", find_nvrtc(12), "--only", ",".join(chosen)], capture_output=True, text=True, check=True
    )
    found = {row.split("// ")[1].strip(): row for row in made.stdout.splitlines() if row.startswith("{")}
    assert list(found) == chosen
    for problem, row in found.items():
        assert numbers(row) == pytest.approx(numbers(rows[problem]), rel=0.1, abs=20), problem
