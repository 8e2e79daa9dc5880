"""tune() and autotune() without a GPU: a libcuda that plays one, and processes that play the one that measures."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_program, run_python

import flash_attn_jit
from flash_attn_jit import DriverError, _core, _tuning, autotune, tune

ROOT = Path(__file__).parents[2]

# Finds every candidate right, those with blocks of 64 rows twice as fast as others.
WORKER = """
while read -r line; do
  case "$line" in
    *'"do":"setup"'*) echo '{"figures":{"power_limit_watts":null,"gigabytes":240.0,"tflops":50.5,"unknown_state":"no NVML"}}' ;;
    *'"do":"check"'*) echo '{"is_broken":false,"checked":{"fault":null,"error":0.001,"error_allowed":0.01,"blocks_per_multiprocessor":2}}' ;;
    *'"tile":"m64n'*) echo '{"is_broken":false,"burst":{"fault":null,"seconds":0.0005,"clock_mhz":null,"power_watts":null,"temperature_celsius":null,"throttled_by":[]}}' ;;
    *) echo '{"is_broken":false,"burst":{"fault":null,"seconds":0.001,"clock_mhz":null,"power_watts":null,"temperature_celsius":null,"throttled_by":[]}}' ;;
  esac
done
"""  # noqa: E501

PLAYED_WORKER = f"""
import json, logging, os, signal, sys, threading, time
import flash_attn_jit
from flash_attn_jit import _core, _tuning
_tuning._worker_command = lambda: ["/bin/sh", "-c", {WORKER!r}]
"""


@pytest.fixture(scope="module")
def t4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose libcuda.so.1 plays a driver with a T4."""
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "t4.cpp").write_text(
        '#include "tests/cpp/stub_libcuda/stub_control.h"\n'
        'static const bool t4 = (stub_control()->reset(12040, {StubDevice{"Tesla T4", 75, 40}}), true);\n'
    )
    stub = ROOT / "tests/cpp/stub_libcuda/stub_libcuda.cpp"
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{ROOT}", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(["c++", *options, str(stub), str(folder / "t4.cpp")], check=True)
    return folder


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, ["preset or head_dims is missing", "llama-3-8b", "64,128"]),
        ({"preset": "eliza"}, ["preset is 'eliza'", "llama-3-8b"]),
        ({"preset": 7}, ["preset is 7"]),
        ({"preset": "gpt2", "head_dims": 64}, ["preset and head_dims are both given", "one of them"]),
        ({"head_dims": 64}, ["seqlens is missing"]),
        ({"head_dims": 257, "seqlens": 64}, ["head_dims is '257'", "1 to 256"]),
        ({"head_dims": [64, 0], "seqlens": 64}, ["head_dims is '0'", "1 to 256"]),
        ({"head_dims": 64.0, "seqlens": 64}, ["head_dims is 64.0", "an integer"]),
        ({"head_dims": "64", "seqlens": 64}, ["head_dims is '64'", "an integer"]),
        ({"head_dims": True, "seqlens": 64}, ["head_dims is True", "an integer"]),
        ({"head_dims": 64, "seqlens": -5}, ["seqlens is '-5'", "1 to 1048576"]),
        ({"head_dims": 64, "seqlens": 2**70}, ["seqlens is '2147483647'", "1 to 1048576"]),
        ({"head_dims": 64, "seqlens": 64, "batch": 0}, ["batch is '0'", "1 to 65536"]),
        ({"head_dims": 64, "seqlens": 64, "heads": 0}, ["heads is '0'"]),
        ({"head_dims": 64, "seqlens": 64, "gqa": 3}, ["gqa is '3'", "does not divide heads, 16"]),
        ({"head_dims": 64, "seqlens": 64, "causal": "no"}, ["causal is 'no'"]),
        ({"head_dims": 64, "seqlens": 64, "kinds": "sideways"}, ["kinds is 'sideways'", "fwd, bwd, decode"]),
        ({"head_dims": 64, "seqlens": 64, "kinds": []}, ["kinds is []"]),
        ({"head_dims": 64, "seqlens": 64, "budget_seconds": 0}, ["budget_seconds is 0", "from 1 to"]),
        ({"head_dims": 64, "seqlens": 64, "budget_seconds": float("nan")}, ["budget_seconds is nan"]),
        ({"head_dims": 64, "seqlens": 64, "device": "cpu"}, ["device is 'cpu'", "CUDA device"]),
        ({"head_dims": 64, "seqlens": 64, "device": 1.5}, ["device is 1.5"]),
        ({"head_dims": 64, "seqlens": 64, "afresh": "yes"}, ["afresh is 'yes'"]),
    ],
)
def test_a_bad_argument_is_named(arguments, words):
    with pytest.raises(ValueError) as caught:
        tune(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_autotune_checks_its_arguments_and_does_not_nest():
    for arguments, name in [((0,), "budget_seconds"), (("long",), "budget_seconds")]:
        with pytest.raises(ValueError, match=name):
            autotune(*arguments)
    with pytest.raises(ValueError, match="seconds_each"):
        autotune(seconds_each=-1)
    with autotune() as tuning:
        assert tuning.problems == []
        with pytest.raises(ValueError, match="is on already"), autotune():
            pass
        assert tuning.problems == []
    with pytest.raises(ZeroDivisionError), autotune():
        raise ZeroDivisionError
    with autotune():  # that one has ended
        pass


def test_the_docstrings_name_every_argument():
    for function in (tune, autotune):
        for name in inspect.signature(function).parameters:
            assert re.search(rf"^        {name}: ", function.__doc__, re.MULTILINE), name
    fields = _tuning.TunedProblem.__dataclass_fields__
    assert all(name in _tuning.TunedProblem.__doc__ for name in fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver():
    with pytest.raises(DriverError, match="libcuda"):
        tune(head_dims=64, seqlens=64)
    with autotune() as tuning:
        assert tuning.problems == []


INTERPRET = """
import torch, flash_attn_jit
q = torch.randn(1, 16, 1, 16).half().requires_grad_()
def call():
    flash_attn_jit.flash_attn_func(q, q, q).sum().backward()
"""


def test_the_interpreter_has_nothing_to_tune_which_is_said_once():
    code = "with flash_attn_jit.autotune() as tuning:\n    call()\n    call()\nprint(tuning.problems)"
    done = run_python(INTERPRET + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert done.stderr.count("there is nothing to tune") == 1


def test_nothing_is_timed_without_being_asked(tmp_path, t4):
    """No call starts a process that measures, nor leaves a record; neither does looking at the GPU."""
    cache = tmp_path / "cache"
    code = INTERPRET + (
        "import os\n"
        "from flash_attn_jit import _core\n"
        "call()\n"
        "assert _core.devices()[0]['name'] == 'Tesla T4' and _core.loaded_kernels(0) == []\n"
        "children = os.popen(f'cat /proc/{os.getpid()}/task/*/children').read().split()\n"
        "print(len(children) - 1)\n"  # the one that asks
    )
    done = run_python(code, LD_LIBRARY_PATH=t4, FLASH_ATTN_JIT_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"
    assert any(cache.iterdir()) and not (cache / "tuning").exists()
    assert "autotune" not in done.stderr


def tuned(t4: Path, cache: Path, arguments: str, **changes: str) -> list[dict[str, Any]]:
    code = PLAYED_WORKER + (
        "import dataclasses\n"
        f"problems = flash_attn_jit.tune({arguments})\n"
        "print(json.dumps([dataclasses.asdict(problem) for problem in problems]))\n"
    )
    done = run_python(code, LD_LIBRARY_PATH=t4, FLASH_ATTN_JIT_CACHE_DIR=cache, **changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("clock, power, temperature and throttling are not recorded: no NVML") <= 1
    return json.loads(done.stdout)


def test_what_is_found_is_returned_kept_and_known(tmp_path, t4):
    arguments = "head_dims=16, seqlens=[500, 512], heads=4, batch=2, kinds='fwd', budget_seconds=3"
    first = tuned(t4, tmp_path, arguments)
    assert len(first) == 1  # both lengths are of one class
    problem = first[0]
    assert problem["kernel"] == "fwd hdim16 fp16 full gqa1 vec16"
    assert problem["problem_class"] == "fwd hdim16 fp16 full gqa1 vec16 q512 k512 bh8"
    assert (problem["batch"], problem["num_heads"], problem["seqlen_q"]) == (2, 4, 500)
    assert problem["newly_measured"] >= 1 and problem["winner"] and problem["rule"]
    record = problem["record"]
    assert record["format"] == "flash-attn-jit tuning record" and record["winner"] == problem["winner"]
    assert record["environment"]["peak_tflops"] == 50.5 and record["environment"]["driver"] == "12.4"
    (kept,) = (tmp_path / "tuning").glob("*/*.json")
    assert json.loads(kept.read_text()) == record

    again = tuned(t4, tmp_path, arguments)
    measured = {c["tile"] for c in record["candidates"] if c["outcome"] == "measured"}
    new = {c["tile"] for c in again[0]["record"]["candidates"] if c["outcome"] == "measured"}
    assert measured <= new and again[0]["newly_measured"] <= len(new - measured)


def test_decode_is_tuned_where_it_is_asked_for_and_reported(tmp_path, t4):
    sizes = "head_dims=16, seqlens=4000, heads=8, gqa=4, batch=2, causal=True"
    problems = tuned(t4, tmp_path, sizes + ", kinds='decode', budget_seconds=4")
    kernel = "decode hdim16 fp16 causal gqa4 vec16"
    assert [problem["problem_class"] for problem in problems] == [f"{kernel} q4 k4096 bh16", f"{kernel} q16 k4096 bh16"]
    assert [(problem["seqlen_q"], problem["seqlen_k"]) for problem in problems] == [(1, 4000), (16, 4000)]
    for problem in problems:
        assert problem["kernel"] == kernel and problem["num_heads_k"] == 2
        assert problem["newly_measured"] >= 1 and problem["winner"] and problem["winner_seconds"], problem["rule"]
        compiled = [c for c in problem["record"]["candidates"] if c["outcome"] in ("measured", "pruned")]
        assert all(c["predicted_seconds"] > 0 and c["limited_by"] for c in compiled)  # the model reads its code
    assert [problem["kernel"].split()[0] for problem in tuned(t4, tmp_path, sizes + ", budget_seconds=1")] == ["fwd"]

    database, page = tmp_path / "database.json", tmp_path / "page.html"
    assert run_program("tune", "--export", database, FLASH_ATTN_JIT_CACHE_DIR=tmp_path).returncode == 0
    done = run_program("report", "--json", "--database", database)
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(done.stdout)["classes"] if row["problem"]["kernel"] == kernel]
    assert [row["winner"]["tile"] for row in rows] == [problem["winner"] for problem in problems]
    report = [sys.executable, "-m", "flash_attn_jit.report", "--database", database, "--html", page]
    assert subprocess.run(report, capture_output=True).returncode == 0
    assert kernel in page.read_text() and "forward of few queries" in page.read_text()


NVML = """
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return ""; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void**) { return 0; }
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned* milliwatts) { *milliwatts = 70000; return 0; }
}
"""


def test_the_report_tells_another_power_limit(tmp_path, t4):
    (problem,) = tuned(t4, tmp_path / "cache", "head_dims=16, seqlens=64, heads=1, budget_seconds=2")
    record = problem["record"]
    machine = tmp_path / "machine"
    machine.mkdir()
    (machine / "nvml.cpp").write_text(NVML)
    options = ["-shared", "-fPIC", "-o", str(machine / "libnvidia-ml.so.1")]
    subprocess.run(["c++", *options, str(machine / "nvml.cpp")], check=True)
    database = tmp_path / "database.json"
    for watts, told in ((60, ["power limit 60 W, here 70 W"]), (70, []), (None, [])):
        record["environment"]["power_limit_watts"] = watts
        content = {"format": "flash-attn-jit tuning database", "version": 1, "records": [record]}
        database.write_text(json.dumps(content))
        done = run_program("report", "--json", "--database", database, LD_LIBRARY_PATH=f"{t4}:{machine}")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)["classes"]
        assert [difference for difference in row["differs"] if "power" in difference] == told


def test_offline_nothing_is_tuned(tmp_path, t4):
    code = (
        PLAYED_WORKER
        + """
def told(function):
    try:
        function()
    except flash_attn_jit.ConfigError as error:
        return str(error)
print(json.dumps([told(lambda: flash_attn_jit.tune(head_dims=16, seqlens=64)),
                  told(lambda: flash_attn_jit.autotune().__enter__())]))
"""
    )
    done = run_python(code, LD_LIBRARY_PATH=t4, FLASH_ATTN_JIT_CACHE_DIR=tmp_path, FLASH_ATTN_JIT_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    for message in json.loads(done.stdout):
        assert "FLASH_ATTN_JIT_OFFLINE is '1', and tuning compiles" in message
    assert not list(tmp_path.rglob("*.json"))


def test_what_the_budget_does_not_reach_says_so(tmp_path, t4):
    problems = tuned(t4, tmp_path, "head_dims=[16, 32, 48, 64], seqlens=64, kinds=['fwd', 'bwd'], budget_seconds=1")
    backward = ["bwd_preprocess", "bwd_dkdv", "bwd_dq", "bwd_all_keys"]
    assert [p["kernel"].split()[0] for p in problems] == ["fwd", *backward] * 4
    last = problems[-1]
    assert last["winner"] is None and last["record"] is None and last["problem_class"] is None
    assert last["rule"]


def test_the_process_that_measures_needs_no_torch():
    script = Path(_tuning.__file__).with_name("_tune_worker.py")
    command = _tuning._worker_command()
    assert command[0] == sys.executable and command[3:] == [str(script), _core.__file__]
    asked = subprocess.run(command, input='{"do":"dance"}\n', capture_output=True, text=True, timeout=60, cwd="/")
    assert asked.returncode == 0, asked.stderr
    assert "'dance' comes before 'setup'" in json.loads(asked.stdout)["error"]


def test_the_process_that_measures_checks_kernels(tmp_path, t4):
    """The true one, on a GPU whose kernels do nothing: it finds them wrong."""
    code = (
        "import flash_attn_jit\n"
        "(problem,) = flash_attn_jit.tune(head_dims=16, seqlens=64, heads=1, budget_seconds=6)\n"
        "print(problem.winner, problem.rule)\n"
    )
    done = run_python(code, LD_LIBRARY_PATH=t4, FLASH_ATTN_JIT_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None ") and "off by" in done.stdout


HANG = """
_tuning._worker_command = lambda: ["/bin/sh", "-c", "exec sleep 100"]
threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.time()
try:
    flash_attn_jit.tune(head_dims=16, seqlens=64, heads=1, budget_seconds=60)
except KeyboardInterrupt:
    print("stopped", time.time() - begin < 30)
"""


def test_ctrl_c_ends_it(tmp_path, t4):
    """And other threads run meanwhile: one of them presses it."""
    done = run_python(PLAYED_WORKER + HANG, LD_LIBRARY_PATH=t4, FLASH_ATTN_JIT_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "stopped True\n", done.stderr


def test_a_device_that_is_not_there(tmp_path, t4):
    code = "import flash_attn_jit\nflash_attn_jit.tune(head_dims=16, seqlens=64, device=3)"
    done = run_python(code, LD_LIBRARY_PATH=t4, FLASH_ATTN_JIT_CACHE_DIR=tmp_path)
    assert "DriverError" in done.stderr and "no CUDA device 3; the driver sees 1" in done.stderr


def test_the_names_are_public():
    for name in ("tune", "autotune", "TunedProblem"):
        assert name in flash_attn_jit.__all__
