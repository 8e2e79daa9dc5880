"""flash_attn_func on CPU tensors, through the interpreter, against float64."""

import threading
import time

import numpy
import pytest
import torch
from attention_reference import attention, check_attention, normal, normal_qkv

import flash_attn_jit
from flash_attn_jit import flash_attn_func


def check(q, k, v, **arguments):
    out, softmax_lse, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True, **arguments)
    check_attention(out, softmax_lse, q, k, v, **arguments)
    assert s_dmask.numel() == 0
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [1, 8, 33, 64, 96, 128, 256])
def test_head_dims(head_dim, causal):
    check(*normal_qkv(1, 70, 90, 2, 1, head_dim), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 130), (130, 1), (64, 64), (65, 63), (129, 257)])
def test_lengths(seqlens, causal):
    check(*normal_qkv(2, *seqlens, 2, 2, 64), causal=causal)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (7, 1)])
def test_groups(heads):
    check(*normal_qkv(2, 40, 50, *heads, 64), causal=True)


@pytest.mark.parametrize("softmax_scale", [None, 0.3, 1, 0.0, -0.2, numpy.float32(0.25)])
def test_softmax_scale(softmax_scale):
    check(*normal_qkv(1, 40, 50, 1, 1, 64), softmax_scale=softmax_scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 0, 4), (1, 4, 0), (1, 0, 0)], ids=str)
def test_empty(shape, causal):
    batch, seqlen_q, seqlen_k = shape
    q, k, v = normal_qkv(batch, seqlen_q, seqlen_k, 2, 1, 64)
    out = check(q, k, v, causal=causal)
    assert not out.any()


def test_rows_that_see_no_key():
    q, k, v = normal_qkv(1, 9, 4, 1, 1, 64)
    out, softmax_lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :5].any() and out[:, 5:].any()
    assert softmax_lse[0, 0].isposinf().tolist() == [True] * 5 + [False] * 4


def heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_a_wider_row(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 24), float("nan"), dtype=t.dtype)
    wide[..., 8 : 8 + t.shape[-1]] = t
    return wide[..., 8 : 8 + t.shape[-1]]


def off_16_byte_alignment(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    wide[..., 1 : 1 + t.shape[-1]] = t
    return wide[..., 1 : 1 + t.shape[-1]]


@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize("layout", [heads_first, part_of_a_wider_row, off_16_byte_alignment])
def test_strides(layout, head_dim):
    q, k, v = (layout(t) for t in normal_qkv(2, 30, 40, 2, 1, head_dim))
    out = check(q, k, v, causal=True)
    assert out.is_contiguous()


def test_packed_qkv_slices():
    qkv = normal(2, 33, 3, 2, 64)
    check(*qkv.unbind(2))


def test_expanded_keys():
    q, k, v = normal_qkv(3, 20, 30, 2, 2, 64)
    check(q, k[:1, :, :1].expand(3, 30, 2, 64), v)


@pytest.mark.parametrize("causal", [1, numpy.bool_(True)], ids=["int", "numpy"])
def test_causal_as_another_languages_true(causal):
    q, k, v = normal_qkv(1, 20, 20, 1, 1, 64)
    assert torch.equal(flash_attn_func(q, k, v, causal=causal), flash_attn_func(q, k, v, causal=True))


def test_the_same_tensor_thrice():
    q = normal(1, 30, 2, 64)
    check(q, q, q)


def test_out_alone_by_default():
    q, k, v = normal_qkv(1, 20, 20, 1, 1, 64)
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    check_attention(out, None, q, k, v)


def test_deterministic_is_the_same_bits():
    q, k, v = normal_qkv(1, 70, 70, 2, 1, 64)
    assert torch.equal(flash_attn_func(q, k, v), flash_attn_func(q, k, v, deterministic=True))


@pytest.mark.parametrize("window_size", [(-1, -1), [-1, -1], torch.tensor([-1, -1])], ids=["tuple", "list", "tensor"])
def test_an_unbounded_window_in_every_form(window_size):
    q, k, v = normal_qkv(1, 20, 20, 1, 1, 64)
    assert torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v))


def test_a_leaf_runs_where_grad_mode_is_off():
    q, k, v = normal_qkv(1, 20, 20, 1, 1, 64)
    expected = flash_attn_func(q, k, v)
    q.requires_grad_()
    with torch.no_grad():
        assert torch.equal(flash_attn_func(q, k, v), expected)
    with torch.inference_mode():
        assert torch.equal(flash_attn_func(q, k, v), expected)


def test_nan_reaches_its_head_alone():
    q, k, v = normal_qkv(1, 20, 20, 2, 2, 64)
    clean = flash_attn_func(q, k, v)
    v[0, 3, 0, 5] = float("nan")
    out = flash_attn_func(q, k, v)
    assert out[0, :, 0, 5].isnan().all()
    assert torch.equal(out[0, :, 1], clean[0, :, 1])


def test_report_of_the_last_run():
    q, k, v = normal_qkv(1, 300, 70, 2, 2, 64)
    flash_attn_func(q, k, v)
    report = flash_attn_jit.interpreter_report()
    assert "fwd" in report.kernel and "hdim64" in report.kernel
    assert report.blocks >= 2
    assert all(count.cycles >= count.ideal_cycles > 0 for count in report.shared.values()) and report.shared
    assert report.kernel in str(report)


def test_other_threads_run_while_a_kernel_is_interpreted():
    q, k, v = normal_qkv(2, 257, 257, 4, 4, 64)
    flash_attn_func(q, k, v)  # compiled before the clock starts
    running = threading.Event()
    ticks = 0

    def tick():
        nonlocal ticks
        while not running.is_set():
            time.sleep(0.001)
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    ticks_before = ticks
    start = time.monotonic()
    flash_attn_func(q, k, v)
    seconds = time.monotonic() - start
    ticks_during = ticks - ticks_before
    running.set()
    ticker.join()
    # A GIL that is held lets no tick through; a loaded machine lets fewer than one a millisecond.
    assert ticks_during >= 3, f"{ticks_during} ticks in {seconds:.3f} s"


def test_two_threads():
    results = {}

    def work(seed):
        q = normal(1, 70, 2, 64, seed=seed)
        results[seed] = (flash_attn_func(q, q, q, causal=True), q)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for out, q in results.values():
        check_attention(out, None, q, q, q, causal=True)


def test_the_reference_is_pytorchs():
    q, k, v = (t.double() for t in normal_qkv(2, 20, 20, 2, 2, 16))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    torch.testing.assert_close(attention(q, k, v, causal=True)[0], expected.transpose(1, 2))
