"""The program flash-attn-jit as the package installs it, on real kernels; tests/cpp/test_program.cpp has its flags."""

import json
import subprocess

import pytest
from conftest import (
    environment,
    find_nvrtc,
    needs_nvrtc_of_the_tables,
    program_path,
    run_program,
    run_python,
)


def succeeds(*arguments, **changes):
    done = run_program(*arguments, **changes)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def inspect(emit, *more):
    return succeeds("inspect", "--kind", "fwd", "--head-dim", 64, *more, "--emit", emit)


def test_version():
    from importlib.metadata import version

    assert version("flash-attn-jit") in succeeds("--version").decode()


def test_devices():
    library = find_nvrtc(12)
    assert str(library) in succeeds("devices").decode()
    found = json.loads(succeeds("devices", "--json"))
    assert str(library) in json.dumps(found) and "devices" in found


def test_devices_lists_every_place_where_nvrtc_is_not(tmp_path):
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    text = run_program("devices", FLASH_ATTN_JIT_NVRTC=nowhere).stdout.decode()
    assert str(nowhere) in text


def test_inspect_ptx():
    ptx = inspect("ptx").decode()
    assert ".target sm_75" in ptx and ".entry" in ptx


def test_inspect_cubin(tmp_path):
    cubin = inspect("cubin")
    assert cubin[:4] == b"\x7fELF"
    succeeds("inspect", "--head-dim", 64, "--emit", "cubin", "-o", tmp_path / "kernel.cubin")
    assert (tmp_path / "kernel.cubin").read_bytes() == cubin


@pytest.mark.parametrize("head_dim", [64, 128])
def test_inspect_resources(head_dim):
    resources = json.loads(succeeds("inspect", "--head-dim", head_dim, "--causal", "--emit", "resources"))
    assert resources["threads"] % 32 == 0
    assert 0 < resources["registers"] <= 255
    assert resources["static_smem"] + resources["dynamic_smem"] <= 64 << 10
    assert resources["useful_mma"] > 0 and resources["seconds"] > 0
    assert resources["tile"].startswith("m")
    needs_nvrtc_of_the_tables()
    assert (resources["spill_stores"], resources["spill_loads"]) == (0, 0)


def test_inspect_a_tile_by_its_text():
    tile = json.loads(inspect("resources"))["tile"]
    assert inspect("spec", "--tile", tile) == inspect("spec")
    assert inspect("spec", "--tile", "auto") == inspect("spec")
    assert inspect("tiles").decode().split()[0] == tile


def prebuild(out, *more, **changes):
    return run_program(
        "prebuild",
        "--arch",
        "sm_75",
        "--kinds",
        "fwd",
        "--head-dims",
        "64",
        "--causal",
        "no",
        "--gqa",
        "1",
        "--out",
        out,
        *more,
        **changes,
    )


def test_prebuild_then_skip(tmp_path):
    first = prebuild(tmp_path / "pack", "--json", "--jobs", 1)
    assert first.returncode == 0, first.stderr.decode()
    built = json.loads(first.stdout)["built"]
    assert built >= 2 and first.stderr.decode().count("\n") >= built  # a line of progress a kernel
    assert (tmp_path / "pack" / "manifest.json").exists()

    again = json.loads(prebuild(tmp_path / "pack", "--json").stdout)
    assert (again["built"], again["skipped"], again["failures"]) == (0, built, [])


def test_prebuild_builds_what_is_broken_again(tmp_path):
    assert prebuild(tmp_path / "pack").returncode == 0
    kernel = min((tmp_path / "pack").glob("*.kernel"))
    whole = kernel.read_bytes()
    kernel.write_bytes(whole[: len(whole) // 2])
    again = prebuild(tmp_path / "pack", "--json")
    assert again.returncode == 0, again.stderr.decode()
    assert json.loads(again.stdout)["built"] == 1
    assert len(kernel.read_bytes()) > len(whole) // 2


@pytest.fixture
def cache(tmp_path):
    """A cache with two kernels in it, as the interpreter's first calls leave them."""
    folder = tmp_path / "cache"
    code = """
from flash_attn_jit import _core
for spec in _core.select_kernels(["fwd"], [64], [False], [1], "sm_75")[:2]:
    _core.process_library().find_or_compile(spec, "sm_75")
"""
    done = run_python(code, FLASH_ATTN_JIT_CACHE_DIR=folder)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("*.kernel"))) == 2
    return folder


def of_cache(folder, *arguments):
    return json.loads(succeeds("cache", *arguments, "--json", FLASH_ATTN_JIT_CACHE_DIR=folder))


def test_cache_list(cache):
    kernels = of_cache(cache, "list")["kernels"]
    assert len(kernels) == 2
    assert all(kernel["valid"] and kernel["spec"].startswith("fwd hdim64") for kernel in kernels)


def test_cache_verify(cache):
    assert of_cache(cache, "verify")["broken"] == []
    kernel = min(cache.glob("*.kernel"))
    content = bytearray(kernel.read_bytes())
    content[-10] ^= 1
    kernel.write_bytes(content)
    done = run_program("cache", "verify", "--json", FLASH_ATTN_JIT_CACHE_DIR=cache)
    assert done.returncode == 1
    assert [entry["file"] for entry in json.loads(done.stdout)["broken"]] == [kernel.name]


def test_cache_prune(cache):
    sizes = sorted(path.stat().st_size for path in cache.glob("*.kernel"))
    of_cache(cache, "prune", "--max-bytes", sum(sizes))
    assert len(list(cache.glob("*.kernel"))) == 2
    of_cache(cache, "prune", "--max-bytes", sizes[1])
    assert len(list(cache.glob("*.kernel"))) == 1


def test_cache_clear_leaves_what_is_not_its_own(cache):
    (cache / "note.txt").write_text("mine")
    of_cache(cache, "clear")
    assert [path.name for path in cache.iterdir() if path.suffix in (".kernel", ".txt")] == ["note.txt"]


def test_output_that_cannot_be_written():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [str(program_path()), "cache", "path"], stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert done.returncode != 0 and b"output" in done.stderr
