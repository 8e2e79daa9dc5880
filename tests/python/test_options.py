"""Windows, softcap and ALiBi, forward and backward, in the interpreter, against float64."""

import pytest
import torch
from attention_reference import check_attention, check_gradients, exact_gradients, normal, normal_qkv
from conftest import needs_torch

from flash_attn_jit import flash_attn_func

SLOPES = torch.tensor([0.5, 0.0625])
OPTIONS = [
    {"window_size": (5, 0)},
    {"window_size": (0, 0)},
    {"window_size": (7, 3)},
    {"window_size": (-1, 4)},
    {"window_size": (20, -1)},
    {"window_size": (9, 30), "causal": True},
    {"window_size": (1000, 1000)},
    {"softcap": 2.0},
    {"softcap": 30.0, "causal": True},
    {"alibi_slopes": SLOPES},
    {"alibi_slopes": SLOPES, "causal": True},
    {"alibi_slopes": torch.stack([SLOPES, -SLOPES])},
    {"alibi_slopes": SLOPES, "softcap": 5.0, "window_size": (12, 6), "softmax_scale": 0.2},
]


@pytest.mark.parametrize("seqlens", [(70, 70), (33, 90), (90, 33)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_out_and_gradients(options, seqlens):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, *seqlens, 2, 1, 64))
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check_attention(out.detach(), softmax_lse, q.detach(), k.detach(), v.detach(), **options)
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, exact_gradients(q, k, v, dout, **options))


@pytest.mark.parametrize("window_size", [[5, 2], torch.tensor([5, 2])], ids=["list", "tensor"])
def test_a_window_in_every_form(window_size):
    q, k, v = normal_qkv(1, 30, 30, 1, 1, 64)
    assert torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v, window_size=(5, 2)))


@pytest.mark.parametrize("window_size", [(-7, -1), (2**40, 10**30)], ids=str)
def test_windows_that_hide_nothing(window_size):
    q, k, v = normal_qkv(1, 30, 30, 1, 1, 64)
    assert torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v))


@pytest.mark.parametrize("window_size", [(5,), (5, 2.0), "ab", torch.tensor([5.0, 2.0]), torch.tensor([5])], ids=str)
def test_windows_of_another_kind(window_size):
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    with pytest.raises(ValueError, match=r"^window_size is .*accepted: two integers"):
        flash_attn_func(q, k, v, window_size=window_size)


@pytest.mark.parametrize("capture", [False, True], ids=["plain", "capture_scalar_outputs"])
def test_a_window_in_a_tensor_compiles(capture):
    if not capture:
        needs_torch("2.10", "AOTAutograd traces a read number without capture_scalar_outputs")
    compiled = torch.compile(
        lambda q, k, v, window: flash_attn_func(q, k, v, window_size=window), fullgraph=True, backend="aot_eager"
    )
    q, k, v = normal_qkv(1, 30, 30, 1, 1, 64)
    for window in ((3, 4), (8, 0)):
        expected = flash_attn_func(q, k, v, window_size=window)
        with torch._dynamo.config.patch(capture_scalar_outputs=capture):
            assert torch.equal(compiled(q, k, v, torch.tensor(window)), expected)


@pytest.mark.parametrize("softcap", [-1.0, 1e-7, 1e18, 1e300, float("nan"), float("inf"), "5"], ids=str)
def test_softcaps_out_of_range(softcap):
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    with pytest.raises(ValueError, match=r"^softcap is"):
        flash_attn_func(q, k, v, softcap=softcap)


@pytest.mark.parametrize("softcap", [1e-6, 1e17])
def test_the_ends_of_softcaps_range_are_in_it(softcap):
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    check_attention(flash_attn_func(q, k, v, softcap=softcap), None, q, k, v, softcap=softcap)


@pytest.mark.parametrize("softmax_scale", [1e17, -1e17])
def test_the_ends_of_softmax_scales_range_are_in_it(softmax_scale):
    q, k, v = torch.zeros(3, 1, 8, 1, 64, dtype=torch.float16)  # other scores lose all accuracy there
    assert not flash_attn_func(q, k, v, softmax_scale=softmax_scale).any()


def test_causal_is_a_window():
    q, k, v = normal_qkv(1, 30, 50, 1, 1, 64)
    for window_size in ((-1, -1), (-1, 5)):
        causal = flash_attn_func(q, k, v, causal=True, window_size=window_size)
        torch.testing.assert_close(causal, flash_attn_func(q, k, v, window_size=(-1, 0)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("softmax_scale", [None, 1e-9])
def test_slopes_up_to_the_end_of_their_range(softmax_scale):
    """Every key is far from the first queries: the nearest one takes all the weight, and nothing is NaN."""
    q, k, v = (torch.randn(1, n, 2, 16).half().requires_grad_() for n in (64, 4, 4))
    slopes = torch.tensor([1e7 / 63, -1e7 / 63])
    out = flash_attn_func(q, k, v, softmax_scale=softmax_scale, alibi_slopes=slopes)
    out.backward(torch.ones_like(out))
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor.isfinite().all()
    torch.testing.assert_close(out[0, :60, 0], v[0, 0, 0].expand(60, 16), rtol=2e-3, atol=0)
    torch.testing.assert_close(out[0, :60, 1], v[0, 3, 1].expand(60, 16), rtol=2e-3, atol=0)


def test_slopes_need_not_require_a_gradient_where_grad_mode_is_off():
    q, k, v = normal_qkv(1, 20, 20, 2, 2, 64)
    with torch.no_grad():
        out = flash_attn_func(q, k, v, alibi_slopes=torch.nn.Parameter(SLOPES))
    assert torch.equal(out, flash_attn_func(q, k, v, alibi_slopes=SLOPES))


@pytest.mark.parametrize(
    "alibi_slopes",
    [SLOPES.half(), SLOPES.double(), torch.ones(3), torch.ones(2, 2), torch.ones(1, 1, 2)],
    ids=str,
)
def test_slopes_that_do_not_fit(alibi_slopes):
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 64)
    with pytest.raises(ValueError, match="alibi_slopes"):
        flash_attn_func(q, k, v, alibi_slopes=alibi_slopes)
