"""The default pack of sm_75 with both NVRTCs, and the runtime on a pack with NVRTC hidden."""

import json

import pytest
from conftest import GROUP_SIZES, TESTS_ALL, find_nvrtc, run_program, run_python

# Whatever its place in the search, an empty folder that is named must end it; the second call proves that it does.
LOOK_UP = f"""
import json
from flash_attn_jit import MissingKernelError, _core
_core.set_python_search_path([])
specs = _core.select_kernels(["fwd"], [64, 128], [False, True], {GROUP_SIZES}, "sm_75")
origins = [_core.process_library().find_or_compile(spec, "sm_75")["origin"] for spec in specs]
(not_there, *_) = _core.select_kernels(["fwd"], [80], [False], [1], "sm_75")
try:
    _core.process_library().find_or_compile(not_there, "sm_75")
except MissingKernelError as error:
    missing = dict(message=str(error), spec=error.spec, command=error.prebuild_command)
print(json.dumps(dict(origins=origins, missing=missing, not_there=not_there)))
"""


@pytest.mark.parametrize("major", [12, 13])
def test_no_kernel_spills(major, request):
    pack = request.getfixturevalue(f"pack_{major}")
    kernels = pack.kernels()
    assert len(kernels) >= 2 * 2 * len(GROUP_SIZES) * 2  # head dims x masks x groups x accesses, at least
    assert {kernel["origin"] for kernel in kernels} == {"cache"}
    assert all(0 < kernel["registers"] <= 255 and f"{major}." in kernel["built_by"] for kernel in kernels)
    spills = {kernel["name"]: (kernel["spill_stores"], kernel["spill_loads"]) for kernel in kernels}
    assert {name: bytes for name, bytes in spills.items() if bytes != (0, 0)} == {}


def test_everything_that_the_runtime_may_choose_is_there_with_nvrtc_hidden(pack_12, tmp_path):
    empty = tmp_path / "nothing"
    empty.mkdir()
    done = run_python(
        LOOK_UP,
        FLASH_ATTN_JIT_PREBUILT=pack_12.folder,
        FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
        FLASH_ATTN_JIT_NVRTC=empty,
        VIRTUAL_ENV=None,
        CONDA_PREFIX=None,
        CUDA_HOME=None,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["origins"]) == {"prebuilt"}
    missing = result["missing"]
    assert missing["spec"] == result["not_there"]
    assert missing["command"] in missing["message"]
    for part in ("flash-attn-jit prebuild", "--arch sm_75", "--head-dims 80", "--gqa 1"):
        assert part in missing["command"]


def test_the_pack_holds_what_the_jit_makes(pack_12, tmp_path):
    code = """
import hashlib, json, sys
from flash_attn_jit import _core
specs = _core.select_kernels(["fwd"], [64], [False, True], [1], "sm_75")
library = _core.open_pack_for_writing(FOLDER) if FOLDER else _core.process_library()
kernels = [library.find_or_compile(spec, "sm_75") for spec in specs]
compared = ("name", "registers", "built_by", "dynamic_smem", "origin")
print(json.dumps([{key: kernel[key] for key in compared} for kernel in kernels]))
"""
    results = []
    for folder in (str(pack_12.folder), None):
        done = run_python(
            f"FOLDER = {folder!r}\n" + code,
            FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
            FLASH_ATTN_JIT_NVRTC=find_nvrtc(12),
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    packed, compiled = results
    assert {kernel.pop("origin") for kernel in packed} == {"cache"}
    assert {kernel.pop("origin") for kernel in compiled} == {"compiled"}
    assert packed == compiled


def test_manifest_lists_the_files(pack_12):
    manifest = json.loads((pack_12.folder / "manifest.json").read_text())
    files = sorted(path.name for path in pack_12.folder.glob("*.kernel"))
    assert sorted(entry["file"] for entry in manifest["kernels"]) == files
    assert len(files) == pack_12.result["built"] + pack_12.result["skipped"]


def test_a_second_run_builds_nothing(pack_12):
    before = {path: path.read_bytes() for path in pack_12.folder.glob("*.kernel")}
    again = pack_12.build()
    assert (again["built"], again["skipped"]) == (0, len(before))
    assert {path: path.read_bytes() for path in pack_12.folder.glob("*.kernel")} == before


# `make test` looks at the head dim whose kernels, of dQ and of dK and dV, take most registers.
HEAD_DIMS, GROUPS = ([32, 64, 96], [1, 4]) if TESTS_ALL else ([64], [4])


def test_no_backward_kernel_spills_up_to_head_dim_96(tmp_path):
    numbers = [",".join(map(str, values)) for values in (HEAD_DIMS, GROUPS)]
    for options in (
        ["--causal", "both", "--window"],
        ["--causal", "both", "--varlen", "yes"],
        ["--causal", "yes", "--alibi", "yes"],
        ["--causal", "yes", "--softcap", "yes"],
    ):
        done = run_program(
            *("prebuild", "--arch", "sm_75", "--kinds", "bwd", "--head-dims", numbers[0], "--gqa", numbers[1]),
            *(*options, "--out", tmp_path, "--nvrtc", find_nvrtc(12)),
        )
        assert done.returncode == 0, done.stderr.decode()
    kernels = json.loads((tmp_path / "manifest.json").read_text())["kernels"]
    # The preprocess kernel, one for all masks, with 2 accesses; else kinds x accesses x tiles for large and small
    # problems, 8 for each of 3 masks, 2 with varlen, ALiBi, softcap. Plain ones with aligned loads have a tile between:
    # with 2 masks for dQ at 32 and 64 and for dK and dV at 32, with full masks for dK and dV at 64.
    between = sum({32: 4, 64: 3}.get(head_dim, 0) for head_dim in HEAD_DIMS)
    assert len(kernels) == len(HEAD_DIMS) * (2 + len(GROUPS) * 8 * (3 + 2 + 1 + 1)) + len(GROUPS) * between
    spills = {kernel["spec"]: (kernel["spill_stores"], kernel["spill_loads"]) for kernel in kernels}
    assert {spec: bytes for spec, bytes in spills.items() if bytes != (0, 0)} == {}
