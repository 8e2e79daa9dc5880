"""The package in a process that has other work: Ctrl-C, other threads, ignored signals, names that are no UTF-8."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import environment, run_python

ATTENTION = """
import os, signal, sys, threading, time, torch
from flash_attn_jit import flash_attn_func
def inputs(seqlen):
    torch.manual_seed(0)
    return [torch.randn(1, seqlen, 1, 128).half().requires_grad_() for _ in range(3)]
def forward(seqlen):
    return flash_attn_func(*inputs(seqlen))
def backward(seqlen):
    q, k, v = inputs(seqlen)
    out = flash_attn_func(q, k[:, :128], v[:, :128])
    out.backward(torch.ones_like(out))
    return q.grad
"""


@pytest.mark.parametrize("work", ["forward", "backward"])
def test_an_interpreted_kernel_ends_on_ctrl_c(work):
    done = run_python(
        ATTENTION
        + textwrap.dedent(
            f"""
            {work}(128)
            sent = []
            def interrupt():
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.7, interrupt).start()
            try:
                while True:
                    {work}(16384)
            except KeyboardInterrupt:
                print("took", time.monotonic() - sent[0])
            time.sleep(0.3)  # it was one KeyboardInterrupt
            assert torch.equal({work}(128), {work}(128))
            print("and goes on")
            """
        )
    )
    assert done.returncode == 0, done.stderr
    took, goes_on = done.stdout.splitlines()
    assert float(took.split()[1]) < 2 and goes_on == "and goes on"


def test_a_signal_handler_runs_while_a_kernel_does_and_may_call_another():
    done = run_python(
        ATTENTION
        + textwrap.dedent(
            """
            plain, small = forward(2048), forward(128)
            seen = []
            def handler(*_):
                with torch.enable_grad():  # autograd calls forward() without, which decides about the kernel
                    seen.append(torch.equal(forward(128), small))
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.3)
            begin = time.monotonic()
            while len(seen) < 2 or time.monotonic() < begin + 1:
                assert torch.equal(forward(2048), plain)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(all(seen))
            """
        )
    )
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("number", "handler", "raised"),
    [
        ("SIGINT", "signal.default_int_handler", "KeyboardInterrupt"),
        ("SIGUSR1", "lambda *_: open('/no/such/file')", "FileNotFoundError"),
    ],
)
def test_what_a_signal_handler_raises_is_not_lost_in_the_logger(number, handler, raised, tmp_path):
    """The signal comes while the library tells of a slow compile, in the one kernel of forward and in one of three."""
    wrapper = tmp_path / "cxx"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *--version*) ;; *) sleep 0.6;; esac\nexec c++ "$@"\n')
    wrapper.chmod(0o755)
    done = run_python(
        ATTENTION
        + textwrap.dedent(
            f"""
            import logging
            class Send(logging.Handler):
                sent = False
                def emit(self, record):
                    if not self.sent:
                        self.sent = True
                        os.kill(os.getpid(), signal.{number})
                        for _ in range(1000):
                            pass
            signal.signal(signal.{number}, {handler})
            logger = logging.getLogger("flash_attn_jit")
            logger.setLevel(logging.INFO)
            caught = []
            for work in (forward, backward):
                logger.addHandler(sends := Send())
                try:
                    work(128)
                except {raised}:
                    caught.append(work.__name__)
                logger.removeHandler(sends)
                work(128)
            print(*caught)
            """
        ),
        FLASH_ATTN_JIT_CXX=wrapper,
        FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
    )
    assert done.returncode == 0 and done.stdout == "forward backward\n", done.stdout + done.stderr


def test_ignored_children_do_not_hide_the_compiler(tmp_path):
    done = run_python(
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        + ATTENTION
        + "print(forward(128).isfinite().all())",
        FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
    )
    assert done.returncode == 0 and done.stdout == "tensor(True)\n", done.stderr


def test_a_compiler_that_writes_nothing(tmp_path):
    wrapper = tmp_path / "cxx"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *--version*) echo a compiler;; esac\nexit 0\n')
    wrapper.chmod(0o755)
    done = run_python(
        ATTENTION + "forward(128)", FLASH_ATTN_JIT_CXX=wrapper, FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache"
    )
    assert "flash_attn_jit.errors.CompileError" in done.stderr and "wrote no object" in done.stderr
    assert "source: " in done.stderr


def test_the_first_backward_call_compiles_side_by_side(tmp_path):
    """Each compile waits, at most five seconds, until three are under way."""
    wrapper, mark, running = tmp_path / "cxx", tmp_path / "mark", tmp_path / "running"
    running.mkdir()
    wrapper.write_text(
        f"""#!/bin/sh
if [ -e "{mark}" ]; then
    touch "{running}/$$"
    for i in 1 2 3 4 5 6 7 8 9 10; do [ $(ls "{running}" | wc -l) -ge 3 ] && break; sleep 0.5; done
    ls "{running}" | wc -l >> "{tmp_path}/counts"
fi
exec c++ "$@"
"""
    )
    wrapper.chmod(0o755)
    done = run_python(
        ATTENTION
        + "q, k, v = inputs(128)\nout = flash_attn_func(q, k, v)\n"
        + f"open({str(mark)!r}, 'w').close()\nout.backward(torch.ones_like(out))",
        FLASH_ATTN_JIT_CXX=wrapper,
        FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "counts").read_text().split() == ["3", "3", "3"]


def test_texts_that_are_no_utf8(tmp_path):
    """In the module's search path, in paths of errors and warnings, in a compiler's words."""
    folder = os.fsencode(tmp_path) + b"/not-\xff-utf8"
    os.mkdir(folder)
    wrapper = os.path.join(folder, b"cxx")
    with open(wrapper, "w") as file:
        file.write(
            "#!/bin/sh\ncase \"$*\" in *--version*) echo a compiler;; *) printf 'f\\374r nichts'; exit 1;; esac\n"
        )
    os.chmod(wrapper, 0o755)
    code = textwrap.dedent(
        """
        import json, os, sys
        sys.path.append(os.fsdecode(b"/no/such/\\xff"))
        import torch, flash_attn_jit
        q = torch.randn(1, 8, 1, 64).half()
        try:
            flash_attn_jit.flash_attn_func(q, q, q)
        except flash_attn_jit.CompileError as error:
            print(json.dumps([str(error), error.log, os.path.exists(error.source_path)]))
        """
    )
    values = {os.fsencode(name): os.fsencode(value) for name, value in environment().items()}
    values[b"FLASH_ATTN_JIT_CACHE_DIR"] = folder + b"/cache"
    values[b"FLASH_ATTN_JIT_CXX"] = wrapper
    done = subprocess.run([sys.executable, "-c", code], env=values, cwd=tmp_path, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    message, log, kept = json.loads(done.stdout)
    assert log == "f\ufffdr nichts" and log in message and "not-\ufffd-utf8/cache" in message and kept
    values[b"FLASH_ATTN_JIT_CXX"] = folder
    done = subprocess.run([sys.executable, "-c", code], env=values, cwd=tmp_path, capture_output=True, timeout=600)
    assert b"errors.ConfigError" in done.stderr and "not-\ufffd-utf8".encode() in done.stderr


# A driver whose calls take their time.
DRIVER = """
#include <unistd.h>
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { usleep(500000); *version = 12040; return 0; }
int cuDeviceGetCount(int* count) { *count = 0; return 0; }
ENTRY_POINTS
}
"""
OTHER_ENTRY_POINTS = (
    "cuGetErrorName cuGetErrorString cuDeviceGet cuDeviceGetName cuDeviceGetAttribute cuDevicePrimaryCtxRetain "
    "cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuModuleLoadData cuModuleUnload cuModuleGetFunction cuFuncSetAttribute "
    "cuFuncGetAttribute cuLaunchKernel cuLinkCreate_v2 cuLinkAddData_v2 cuLinkComplete cuLinkDestroy "
    "cuThreadExchangeStreamCaptureMode cuDeviceGetPCIBusId cuOccupancyMaxActiveBlocksPerMultiprocessor cuMemGetInfo_v2 "
    "cuMemAlloc_v2 cuMemFree_v2 cuMemcpyHtoD_v2 cuMemcpyDtoH_v2 cuMemsetD8_v2 cuMemcpyDtoDAsync_v2 cuStreamCreate "
    "cuStreamDestroy_v2 cuStreamSynchronize cuStreamIsCapturing cuEventCreate cuEventDestroy_v2 cuEventRecord "
    "cuEventSynchronize cuEventElapsedTime"
).split()

COUNT_TURNS = """
import threading, time
from flash_attn_jit import _core
thread = threading.Thread(target=lambda: _core.CALL)
thread.start()
turns = 0
while thread.is_alive():
    time.sleep(0.01)
    turns += 1
print(turns)
"""


@pytest.mark.parametrize("call", ["devices()", "process_library()"])
def test_other_threads_run_while_the_driver_is_opened(call, tmp_path):
    source = tmp_path / "driver.cpp"
    entry_points = "\n".join(f"int {name}() {{ return 0; }}" for name in OTHER_ENTRY_POINTS)
    source.write_text(DRIVER.replace("ENTRY_POINTS", entry_points))
    subprocess.run(["c++", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    done = run_python(COUNT_TURNS.replace("CALL", call), LD_LIBRARY_PATH=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


@pytest.mark.parametrize("call", ["open_pack_for_writing", "write_manifest"])
def test_other_threads_run_while_files_are_read(call, tmp_path):
    """Many bytes of templates, many kernel files."""
    templates, pack = tmp_path / "templates", tmp_path / "pack"
    shutil.copytree(Path(__file__).parents[2] / "templates", templates)
    pack.mkdir()
    if call == "open_pack_for_writing":
        (templates / "more.cuh").write_bytes(b"/" * (1 << 29))
    else:
        for i in range(20000):
            (pack / f"kernel.{i:064x}.kernel").write_bytes(b"no kernel")
    done = run_python(COUNT_TURNS.replace("CALL", f"{call}({str(pack)!r})"), FLASH_ATTN_JIT_TEMPLATES=templates)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
