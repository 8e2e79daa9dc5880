"""The default pack of sm_75 with both NVRTCs, the runtime on a pack with NVRTC hidden, the pack that a wheel brings."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import (
    GROUP_SIZES,
    TESTS_ALL,
    environment,
    find_nvrtc,
    needs_nvrtc_of_the_tables,
    program_path,
    run_program,
    run_python,
)

SOURCE = Path(__file__).parents[2]
TINY = "--kinds fwd --head-dims 8 --causal no --gqa 1"

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


@pytest.mark.parametrize("major", [12, 13] if TESTS_ALL else [12])
def test_no_kernel_spills(major, request):
    pack = request.getfixturevalue(f"pack_{major}")
    kernels = pack.kernels()
    assert len(kernels) >= 2 * 2 * len(GROUP_SIZES) * 2  # head dims x masks x groups x accesses, at least
    assert {kernel["origin"] for kernel in kernels} == {"cache"}
    assert all(0 < kernel["registers"] <= 255 and f"{major}." in kernel["built_by"] for kernel in kernels)
    if major == 12:
        needs_nvrtc_of_the_tables()
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
# Options of prebuild, and how many kernels of dK and dV, of dQ and of all three they make, for 2 accesses and for large
# and small problems: 12 for each mask.
FEATURES: dict[tuple[str, ...], int] = {
    ("--causal", "both", "--window"): 3 * 12,
    ("--causal", "yes", "--alibi", "yes"): 12,
}
if TESTS_ALL:
    FEATURES |= {("--causal", "both", "--varlen", "yes"): 2 * 12, ("--causal", "yes", "--softcap", "yes"): 12}


def test_no_backward_kernel_spills_up_to_head_dim_96(tmp_path):
    numbers = [",".join(map(str, values)) for values in (HEAD_DIMS, GROUPS)]
    for options in FEATURES:
        done = run_program(
            *("prebuild", "--arch", "sm_75", "--kinds", "bwd", "--head-dims", numbers[0], "--gqa", numbers[1]),
            *(*options, "--out", tmp_path, "--nvrtc", find_nvrtc(12)),
        )
        assert done.returncode == 0, done.stderr.decode()
    kernels = json.loads((tmp_path / "manifest.json").read_text())["kernels"]
    # The preprocess kernel is one for all masks, with 2 accesses. Plain ones with aligned loads have a tile between:
    # with 2 masks for dQ at 32 and 64 and for dK and dV at 32, with full masks for dK and dV at 64.
    between = sum({32: 4, 64: 3}.get(head_dim, 0) for head_dim in HEAD_DIMS)
    assert len(kernels) == len(HEAD_DIMS) * (2 + len(GROUPS) * sum(FEATURES.values())) + len(GROUPS) * between
    needs_nvrtc_of_the_tables()
    spills = {kernel["spec"]: (kernel["spill_stores"], kernel["spill_loads"]) for kernel in kernels}
    known = {"bwd_dkdv hdim64 fp16 causal alibi gqa1 vec16 m128n16w4q64l1b8k8": (4, 4)}
    assert {spec: bytes for spec, bytes in spills.items() if bytes != (0, 0)} == {
        spec: bytes for spec, bytes in known.items() if spec in spills
    }


def verify(pack, *more, **changes):
    done = run_program("pack", "verify", pack, "--json", *more, **changes)
    return done.returncode, json.loads(done.stdout)


def test_a_pack_that_anybody_zips(pack_12, tmp_path):
    """Python's zipfile writes what the program reads, and reads what the program writes."""
    theirs = tmp_path / "theirs.zip"
    with zipfile.ZipFile(theirs, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(pack_12.folder.iterdir()):
            archive.write(path, path.name)
        archive.writestr("tuning/tesla_t4/x.json", "{}")
    theirs.chmod(0o644)
    code, verdict = verify(theirs)
    assert (code, verdict["faults"]) == (0, [])
    assert verdict["kernels"] == len(list(pack_12.folder.glob("*.kernel"))) and verdict["records"] == 1

    with zipfile.ZipFile(tmp_path / "compressed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(pack_12.folder / "manifest.json", "manifest.json")
    done = run_program("pack", "verify", tmp_path / "compressed.zip")
    assert done.returncode == 1 and b"compressed" in done.stderr


def bundle(output, flags, **changes):
    """What the build of a wheel does where FLASH_ATTN_JIT_BUNDLE is set."""
    command = ["cmake", f"-DPROGRAM={program_path()}", "-DARCH=sm_75", f"-DFLAGS={flags}", f"-DPREFIX={sys.prefix}"]
    return subprocess.run(
        [*command, f"-DOUTPUT={output}", "-P", str(SOURCE / "python" / "bundle_pack.cmake")],
        env=environment(**changes),
        capture_output=True,
        text=True,
    )


OF_BUNDLE = """
import json
from flash_attn_jit import MissingKernelError, _core
library = _core.process_library()
(spec, *_) = _core.select_kernels(["fwd"], [8], [False], [1], "sm_75")
(not_there, *_) = _core.select_kernels(["fwd"], [8], [True], [1], "sm_75")
origin = library.find_or_compile(spec, "sm_75")["origin"]
try:
    library.find_or_compile(not_there, "sm_75")
except MissingKernelError as error:
    print(json.dumps(dict(origin=origin, message=str(error), command=error.prebuild_command)))
"""


def test_a_bundled_pack_serves_offline_and_holds_what_the_jit_makes(tmp_path):
    import flash_attn_jit

    copy = tmp_path / "site" / "flash_attn_jit"
    shutil.copytree(
        Path(flash_attn_jit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "bundled_pack.zip")
    )
    pack = copy / "bundled_pack.zip"
    done = bundle(pack, TINY, FLASH_ATTN_JIT_NVRTC=find_nvrtc(12))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in copy.glob("bundled_pack*")] == ["bundled_pack.zip"]
    with zipfile.ZipFile(pack) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("manifest.json"))
    assert all(name.startswith("nvrtc 12.") for name in manifest["built_by"])

    code, verdict = verify(pack, "--rebuild", "--nvrtc", find_nvrtc(12))
    assert (code, verdict["faults"]) == (0, [])
    assert verdict["rebuilt"] == verdict["kernels"] == len(manifest["kernels"]) > 0

    cache = tmp_path / "cache"
    done = run_python(OF_BUNDLE, PYTHONPATH=copy.parent, FLASH_ATTN_JIT_OFFLINE=1, FLASH_ATTN_JIT_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["origin"] == "prebuilt" and not list(cache.glob("*"))
    assert found["command"] in found["message"] and "FLASH_ATTN_JIT_OFFLINE is 1" in found["message"]
    assert str(pack) in found["message"] and "--causal yes" in found["command"]


def test_a_bundle_needs_nvrtc_12(tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for nvrtc, reason in (
        (find_nvrtc(13), "cannot load the machine code of the NVRTC found: 13."),
        (nothing, "no NVRTC"),
    ):
        done = bundle(tmp_path / "pack.zip", "--pack default", FLASH_ATTN_JIT_NVRTC=nvrtc)
        assert done.returncode != 0 and reason in done.stderr
        assert "pip install 'nvidia-cuda-nvrtc-cu12" in " ".join(done.stderr.split())
        assert not (tmp_path / "pack.zip").exists()


@pytest.mark.skipif(not TESTS_ALL, reason="builds a wheel: some minutes")
def test_a_wheel_brings_the_default_pack(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)),
            *(f"-Cbuild-dir={tmp_path / 'build'}", str(SOURCE)),
        ],
        env=environment(
            FLASH_ATTN_JIT_BUNDLE="sm_75",
            FLASH_ATTN_JIT_NVRTC=find_nvrtc(12),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.getinfo("flash_attn_jit/bundled_pack.zip").compress_size < 8 << 20
        archive.extract("flash_attn_jit/bundled_pack.zip", tmp_path)
    code, verdict = verify(tmp_path / "flash_attn_jit" / "bundled_pack.zip")
    assert (code, verdict["faults"]) == (0, [])
    assert verdict["kernels"] >= 2 * 2 * 4 * 3 * 2  # head dims x masks x groups x kernels x accesses


def test_two_processes_write_one_zip(tmp_path):
    pack = tmp_path / "pack.zip"
    kernels = ["--arch", "sm_75", "--kinds", "fwd", "--causal", "no", "--gqa", "1", "--out", pack]
    writers = [
        subprocess.Popen(
            [program_path(), "prebuild", "--head-dims", str(head_dim), *map(str, kernels)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for head_dim in (8, 24)
    ]
    for writer in writers:
        _, told = writer.communicate(timeout=120)
        assert writer.returncode == 0, told
    run_program("pack", "verify", pack)
    shown = json.loads(run_program("pack", "show", pack, "--json").stdout)
    head_dims = {kernel["spec"].split()[1] for kernel in shown["kernels"]}
    assert head_dims == {"hdim8", "hdim24"}
