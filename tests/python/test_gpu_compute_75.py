"""Every GPU test once more on the Turing code, which a newer GPU's driver translates: `pytest -m gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
    pytest.mark.skipif(
        os.environ.get("FLASH_ATTN_JIT_TARGET") == "compute_75", reason="the tests run on the Turing code already"
    ),
]


@pytest.mark.parametrize(
    "file", ["test_gpu.py", "test_gpu_bench.py", "test_gpu_options.py", "test_gpu_training.py"]
)
def test_again_through_compute_75(file):
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / file)],
        env=environment(FLASH_ATTN_JIT_TARGET="compute_75"),
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=Path(__file__).parents[2],
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
