"""What needs a GPU: `pytest -m gpu`. test_gpu_compute_75.py repeats it on the Turing code."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_reference import (
    check_attention,
    check_gradients,
    error_bound,
    exact_gradients,
    head_dims,
    normal,
    normal_qkv,
)
from conftest import environment, run_python
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_jit
from flash_attn_jit import flash_attn_func

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
TARGET = os.environ.get("FLASH_ATTN_JIT_TARGET", "native")


@pytest.fixture(autouse=True)
def full_float32():
    """SDPA's math in float32 proper, not in TF32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def qkv(*shape):
    return normal_qkv(*shape, device="cuda")


def sdpa_math(q, k, v, causal):
    """PyTorch's plain attention in float32, causal aligned bottom-right, 0 where a query sees no key."""
    group_size = q.shape[2] // k.shape[2]
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group_size, 1) for t in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        mask = mask.tril(k.shape[2] - q.shape[2])
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return torch.where(mask.any(-1)[:, None], out, 0.0).transpose(1, 2)


def check(q, k, v, causal=False):
    """Against SDPA's math in float32, and against float64 with softmax_lse."""
    out, softmax_lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    error = (out.float() - sdpa_math(q, k, v, causal)).abs().max().item()
    assert error <= error_bound(q, k, v, causal)
    check_attention(out, softmax_lse, q, k, v, causal=causal)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", head_dims())
def test_head_dims(head_dim, causal):
    check(*qkv(2, 257, 300, 4, 2, head_dim), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen_q", [1, 63, 64, 65, 127, 129, 257, 1000])
def test_lengths(seqlen_q, head_dim, causal):
    for seqlen_k in (1, 63, 64, 65, 127, 129, 257, 1000):
        check(*qkv(1, seqlen_q, seqlen_k, 2, 2, head_dim), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 2), (7, 1), (16, 2)], ids=str)
def test_groups(heads, head_dim, causal):
    check(*qkv(3, 150, 200, *heads, head_dim), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_problem_that_fills_the_device(head_dim, causal):
    check(*qkv(4, 1024, 1024, 16, 16, head_dim), causal)


@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 0, 4), (1, 4, 0)], ids=str)
def test_empty(shape):
    q, k, v = qkv(*shape, 2, 1, 64)
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert not out.any() and softmax_lse.isposinf().all()


def gradients_of(q, k, v, dout, causal):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    return torch.autograd.grad(flash_attn_func(q, k, v, causal=causal), (q, k, v), dout)


def check_backward(q, k, v, causal=False):
    dout = normal(*q.shape, seed=4, device="cuda")
    check_gradients(gradients_of(q, k, v, dout, causal), exact_gradients(q, k, v, dout, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", head_dims())
def test_backward_head_dims(head_dim, causal):
    check_backward(*qkv(2, 257, 300, 4, 2, head_dim), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen_q", [1, 63, 64, 65, 129, 257, 1000])
def test_backward_lengths(seqlen_q, head_dim, causal):
    for seqlen_k in (1, 63, 64, 65, 129, 257, 1000):
        check_backward(*qkv(1, seqlen_q, seqlen_k, 2, 2, head_dim), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)], ids=str)
def test_backward_groups(heads, head_dim, causal):
    check_backward(*qkv(3, 150, 200, *heads, head_dim), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_that_fills_the_device(head_dim, causal):
    check_backward(*qkv(4, 1024, 1024, 16, 16, head_dim), causal)


def test_backward_gives_the_same_bits_every_time():
    q, k, v = qkv(2, 500, 700, 8, 2, 64)
    dout = normal(*q.shape, seed=4, device="cuda")
    first = gradients_of(q, k, v, dout, True)
    for _ in range(49):
        for a, b in zip(first, gradients_of(q, k, v, dout, True)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_errors_beside_sdpa_flash(head_dim, causal):
    """Maximum and root mean square at most twice those of SDPA's flash backend, 5 seeds."""
    for seed in range(5):
        q, k, v, dout = (normal(1, 1024, 4, head_dim, seed=4 * seed + i, device="cuda") for i in range(4))
        exact = exact_gradients(q, k, v, dout, causal=causal)
        inputs = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*inputs, is_causal=causal)
        flash = torch.autograd.grad(out, inputs, dout.transpose(1, 2))
        for name, ours, theirs, expected in zip(("dq", "dk", "dv"), gradients_of(q, k, v, dout, causal), flash, exact):
            error, other = (ours.double() - expected), (theirs.transpose(1, 2).double() - expected)
            assert error.abs().max() <= 2 * other.abs().max(), (seed, name)
            assert error.square().mean() <= 4 * other.square().mean(), (seed, name)


def heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_a_wider_row(t, before=8, after=16):
    wide = torch.full((*t.shape[:-1], before + t.shape[-1] + after), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., before : before + t.shape[-1]] = t
    return wide[..., before : before + t.shape[-1]]


def off_16_byte_alignment(t):
    return part_of_a_wider_row(t, before=1, after=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("layout", [heads_first, part_of_a_wider_row, off_16_byte_alignment])
def test_strides(layout, head_dim, causal):
    check(*(layout(t) for t in qkv(2, 200, 300, 4, 2, head_dim)), causal)


def test_packed_qkv_slices():
    packed = normal(2, 200, 3, 4, 64, device="cuda")
    check(*packed.unbind(2))


def test_expanded_keys():
    q, k, v = qkv(3, 100, 130, 4, 4, 64)
    check(q, k[:1, :, :1].expand(3, 130, 4, 64), v)


def test_offsets_beyond_2_to_the_31():
    elements = 2**31 + 2**21
    if torch.cuda.mem_get_info()[0] < 2 * elements + (1 << 30):
        pytest.skip("needs 5.3 GB of free GPU memory")
    storage = torch.empty(elements, dtype=torch.float16, device="cuda")
    far = storage.as_strided((2, 200, 2, 64), (2**31, 128, 64, 1))
    far.copy_(normal(2, 200, 2, 64, device="cuda"))
    q, k, v = qkv(2, 100, 200, 2, 2, 64)
    check(q, far, v)
    check(q, k, far)
    check(far, k, v)


def test_head_dims_off_the_grid_copy_nothing():
    q, k, v = qkv(2, 500, 500, 4, 4, 33)
    flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    made = sum(-(-t.numel() * t.element_size() // 512) * 512 for t in (out, softmax_lse))
    assert torch.cuda.max_memory_allocated() - before <= made


def test_the_same_bits_every_time():
    q, k, v = qkv(2, 700, 700, 8, 2, 128)
    first = flash_attn_func(q, k, v, causal=True)
    for _ in range(20):
        assert torch.equal(flash_attn_func(q, k, v, causal=True), first)


def late_copy(stream, destination, source):
    """On `stream`: a long wait, then the data. A kernel on any other stream reads what was there before."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        destination.copy_(source)


def test_current_stream():
    q, k, v = qkv(1, 200, 200, 2, 2, 64)
    expected = flash_attn_func(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late_copy(stream, late, q)
    with torch.cuda.stream(stream):
        out = flash_attn_func(late, k, v)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert torch.equal(out, expected)


def test_current_stream_without_the_exchange_interface():
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
del torch.Tensor.__dlpack_c_exchange_api__
from attention_reference import normal_qkv
from flash_attn_jit import _core, flash_attn_func
assert not _core.uses_exchange_api()
q, k, v = normal_qkv(1, 200, 200, 2, 2, 64, device="cuda")
expected = flash_attn_func(q, k, v)
late = torch.zeros_like(q)
torch.cuda.synchronize()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    torch.cuda._sleep(200_000_000)
    late.copy_(q)
    out = flash_attn_func(late, k, v)
stream.synchronize()
assert torch.equal(out, expected)
"""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        code = code.replace("del torch.Tensor.__dlpack_c_exchange_api__\n", "")
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_two_threads_each_on_its_stream():
    inputs = [qkv(2, 300, 300, 4, 2, 104) for _ in range(2)]  # a head dim that no other test loads
    torch.cuda.synchronize()
    failures = []

    def work(tensors, causal):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    out = flash_attn_func(*tensors, causal=causal)
                torch.cuda.current_stream().synchronize()
                check_attention(out, None, *tensors, causal=causal)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(inputs[i], bool(i))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_current():
    q, k, v = (t.to("cuda:1") for t in qkv(1, 200, 200, 2, 2, 64))
    with torch.cuda.device(0):
        out = flash_attn_func(q, k, v, causal=True)
        assert torch.cuda.current_device() == 0
    check_attention(out, None, q, k, v, causal=True)
    with pytest.raises(ValueError, match="k is on device cuda:0 and q on cuda:1"):
        flash_attn_func(q, k.to("cuda:0"), v)


@pytest.mark.parametrize("causal", [False, True])
def test_cuda_graph(causal):
    q, k, v = qkv(2, 300, 300, 4, 2, 128)
    flash_attn_func(q, k, v, causal=causal)  # loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, softmax_lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    for seed in (10, 11):
        for i, tensor in enumerate((q, k, v)):
            tensor.copy_(normal(*tensor.shape, seed=seed + 5 * i, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        check_attention(out, softmax_lse, q, k, v, causal=causal)


def test_compiled_with_inductor():
    pytest.importorskip("triton")
    q, k, v = qkv(1, 200, 200, 4, 2, 64)

    def layer(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True) + 1

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v))


@pytest.mark.parametrize("name", ["k", "v"])
def test_devices_that_differ(name):
    tensors = dict(zip("qkv", qkv(1, 20, 20, 2, 2, 64)))
    tensors[name] = tensors[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on device cpu and q on cuda:0"):
        flash_attn_func(**tensors)


def test_float32():
    q, k, v = (t.float() for t in qkv(1, 20, 20, 2, 2, 64))
    with pytest.raises(ValueError, match=r"q has dtype torch\.float32.*q\.to\(torch\.float16\)"):
        flash_attn_func(q, k, v)


SANITIZED = """
import torch
from attention_reference import check_attention, check_gradients, exact_gradients, normal, normal_qkv
from flash_attn_jit import flash_attn_func
for head_dim in (64, 128, 33):
    for causal in (False, True):
        for seqlens in ((130, 200), (65, 63)):
            host = normal_qkv(1, *seqlens, 4, 2, head_dim)
            inputs = [t.cuda().requires_grad_() for t in host]
            out = flash_attn_func(*inputs, causal=causal)
            check_attention(out.detach().cpu(), None, *host, causal=causal)
            dout = normal(*out.shape, seed=4)
            gradients = torch.autograd.grad(out, inputs, dout.cuda())
            check_gradients([t.cpu() for t in gradients], exact_gradients(*host, dout, causal=causal))
"""


def compute_sanitizer():
    cuda_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = [
        shutil.which("compute-sanitizer"),
        cuda_home / "bin/compute-sanitizer",
        cuda_home / "compute-sanitizer/compute-sanitizer",
    ]
    found = [str(place) for place in places if place and Path(place).exists()]
    if not found:
        pytest.skip("compute-sanitizer is neither on PATH nor below CUDA_HOME")
    return found[0]


# Under memcheck a process that has called torch.autograd.grad() may abort as it ends ("terminate called without an
# active exception"), in 5 of 20 runs with a torch.autograd.Function alone: a thread of PyTorch's is still there.
AT_ONCE = """
import os
os._exit(0)
"""


def sanitize(tool: str, script: str) -> None:
    command = [
        compute_sanitizer(),
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--report-api-errors",
        "no",
        sys.executable,
        "-c",
        script + AT_ONCE,
    ]
    # Without torch's pool every tensor is an allocation of its own, so that memcheck knows where it ends.
    done = subprocess.run(
        command,
        env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING=1, PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    print(f"{TARGET} {tool}: {summary}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary and all("0 errors" in line for line in summary)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitize(tool, SANITIZED)


def test_rows_beyond_a_max_seqlen_of_zero():
    """No block runs for them: out is 0, softmax_lse +inf and every gradient 0, none of them what lay in memory."""
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32, device="cuda")
    inputs = [t[0].cuda().requires_grad_() for t in normal_qkv(1, 20, 20, 2, 2, 64)]
    allowed = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for max_q, max_k in ((0, 20), (0, 0), (20, 0)):
            out, softmax_lse, _ = flash_attn_jit.flash_attn_varlen_func(
                *inputs, cu_seqlens, cu_seqlens, max_q, max_k, return_attn_probs=True
            )
            dq, dk, dv = torch.autograd.grad(out, inputs, torch.ones_like(out))
            if max_q == 0:
                assert not out.any() and (softmax_lse == float("inf")).all() and not dq.any()
            assert not dk.any() and not dv.any()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = allowed


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_packed_step(backend):
    attend = flash_attn_jit.flash_attn_qkvpacked_func
    gradients = []
    for function in (torch.compile(attend, fullgraph=True, backend=backend), attend):
        qkv = normal(2, 70, 3, 2, 64).cuda().requires_grad_()
        gradients.append(torch.autograd.grad(function(qkv, causal=True).float().square().sum(), qkv)[0])
    torch.testing.assert_close(*gradients)


def test_the_current_stream_without_private_names():
    """A torch that has neither DLPack's exchange interface nor its own function for the raw stream."""
    done = run_python(
        """
import torch
del torch.Tensor.__dlpack_c_exchange_api__, torch._C._cuda_getCurrentRawStream
from flash_attn_jit import _core, flash_attn_func
assert not _core.uses_exchange_api()
q = torch.randn(1, 70, 2, 64, dtype=torch.float16, device="cuda")
expected = flash_attn_func(q, q, q)
torch.cuda.synchronize()
stream = torch.cuda.Stream()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=stream):  # a launch on another stream than the captured one would fail
    out = flash_attn_func(q, q, q)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out, expected)
"""
    )
    assert done.returncode == 0, done.stderr
