"""What the library has to say goes to Python's logger flash_attn_jit."""

import json

from conftest import find_nvrtc, run_python

FIND = """
import json, logging, sys
from flash_attn_jit import _core
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append((record.levelname, record.getMessage()))
logger = logging.getLogger("flash_attn_jit")
logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(Keep())
(spec, *_) = _core.select_kernels(["fwd"], [64], [False], [1], "sm_75")
kernel = _core.process_library().find_or_compile(spec, "sm_75")
print(json.dumps({"records": records, "origin": kernel["origin"], "seconds": kernel["seconds"]}))
"""


def find(cache):
    done = run_python(FIND, FLASH_ATTN_JIT_CACHE_DIR=cache, FLASH_ATTN_JIT_NVRTC=find_nvrtc(12))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_slow_compile_logs_one_line(tmp_path):
    first = find(tmp_path / "cache")
    assert first["origin"] == "compiled"
    lines = [message for level, message in first["records"] if level == "INFO"]
    assert len(lines) == (first["seconds"] > 0.5)
    again = find(tmp_path / "cache")
    assert (again["origin"], again["records"]) == ("cache", [])


def test_a_broken_file_is_a_warning(tmp_path):
    find(tmp_path / "cache")
    (kernel,) = (tmp_path / "cache").glob("*.kernel")
    kernel.write_bytes(kernel.read_bytes()[:-1])
    again = find(tmp_path / "cache")
    assert again["origin"] == "compiled"
    warnings = [message for level, message in again["records"] if level == "WARNING"]
    assert len(warnings) == 1 and kernel.name in warnings[0]
