"""Calls beside other processes: forks, waits, users without a home."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest
from conftest import environment, hear_ctrl_c, run_python

CALL = """
import torch, flash_attn_jit
q = torch.randn(1, 20, 1, 16).half()
print("calling", flush=True)
flash_attn_jit.flash_attn_func(q, q, q)
"""

FORK_WHILE_A_THREAD_COMPILES = """
import glob, os, signal, threading, time
import torch, flash_attn_jit
def call():
    q = torch.randn(1, 20, 1, 200).half()
    flash_attn_jit.flash_attn_func(q, q, q)
thread = threading.Thread(target=call)
thread.start()
while not glob.glob(PATTERN):
    time.sleep(0.002)
child = os.fork()
if child == 0:
    signal.alarm(60)
    call()
    os._exit(0)
thread.join()
print(os.waitpid(child, 0)[1])
"""


def child_status_of(pattern, **changes):
    """How a child ended that was forked once a file of that name was there."""
    done = run_python(f"PATTERN = {str(pattern)!r}\n" + FORK_WHILE_A_THREAD_COMPILES, **changes)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_process_forked_while_a_thread_compiles_can_call_too(tmp_path):
    assert child_status_of(tmp_path / "cache" / "*.lock", FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache") == 0


def test_a_process_forked_while_a_thread_looks_for_the_compiler_can_call_too(tmp_path):
    compiler = tmp_path / "slow-to-tell-its-version"
    compiler.write_text(
        f'#!/bin/sh\nif [ $1 = --version ]; then touch {tmp_path}/started; sleep 1; fi\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    status = child_status_of(
        tmp_path / "started", FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache", FLASH_ATTN_JIT_CXX=compiler
    )
    assert status == 0


FORK_WHILE_A_THREAD_OPENS_NVRTC = """
import os, signal, threading, time
from flash_attn_jit import MissingKernelError, _core
(spec,) = _core.select_kernels(["bwd_preprocess"], [64], [False], [1], "sm_75")[:1]
library = _core.process_library()
def call():
    try:
        library.find_or_compile(spec, "sm_75")
    except MissingKernelError:
        return 0
    return 1
thread = threading.Thread(target=call)
thread.start()
while not os.path.exists(STARTED):
    time.sleep(0.002)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(call())
thread.join()
print(os.waitpid(child, 0)[1])
"""


def test_a_process_forked_while_a_thread_opens_nvrtc_can_call_too(tmp_path):
    started, library, source = tmp_path / "started", tmp_path / "libnvrtc.so.12", tmp_path / "slow.cpp"
    source.write_text(
        "#include <fstream>\n#include <unistd.h>\n"
        f'[[gnu::constructor]] static void open() {{ std::ofstream("{started}"); usleep(1000000); }}\n'
    )
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    done = run_python(
        f"STARTED = {str(started)!r}\n" + FORK_WHILE_A_THREAD_OPENS_NVRTC,
        FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
        FLASH_ATTN_JIT_NVRTC=library,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0


def test_a_wait_for_another_process_is_told_and_ends_on_ctrl_c(tmp_path):
    cache = tmp_path / "cache"
    done = run_python(CALL, FLASH_ATTN_JIT_CACHE_DIR=cache)  # the file's name has the key
    assert done.returncode == 0, done.stderr
    (kernel,) = cache.glob("*.kernel")
    kernel.unlink()
    lock = cache / (kernel.name.split(".")[-2] + ".lock")
    with open(lock, "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [sys.executable, "-c", CALL],
            preexec_fn=hear_ctrl_c,  # noqa: PLW1509  it takes no lock
            env=environment(FLASH_ATTN_JIT_CACHE_DIR=cache),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = waiting.stderr.readline()
            while said and str(lock) not in said:  # torch may have something to say as well
                said = waiting.stderr.readline()
            assert "waiting for" in said
            waiting.send_signal(signal.SIGINT)
            _, error = waiting.communicate(timeout=20)
        finally:
            waiting.kill()
    assert waiting.returncode != 0
    assert error.strip().splitlines()[-1] == "KeyboardInterrupt"


WITHOUT_A_HOME = """
import os, torch, flash_attn_jit
q = torch.randn(1, 20, 1, 16).half()
os.setgroups([])
os.setgid(54321)
os.setuid(54321)  # no entry in /etc/passwd
for _ in range(2):
    flash_attn_jit.flash_attn_func(q, q, q)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_a_user_without_a_home_is_served_from_memory():
    done = run_python(WITHOUT_A_HOME, HOME=None, XDG_CACHE_HOME=None, FLASH_ATTN_JIT_CACHE_DIR=None)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "memory only" in line]
    assert len(warnings) == 1
    assert "HOME" in warnings[0] and "FLASH_ATTN_JIT_CACHE_DIR" in warnings[0]
