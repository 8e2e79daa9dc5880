"""Dropout on a GPU: larger tensors against float64, the same bits on every tile, graphs, checkpoints, memory."""

import pytest
import torch
from attention_reference import attention, check_attention, check_gradients, leaves, normal, normal_qkv
from test_dropout import steps_of
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import flash_attn_func, flash_attn_varlen_func, route_sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def seeded(call, seed=0):
    torch.manual_seed(seed)
    return call()


@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 256])
@pytest.mark.parametrize(
    "seqlens, heads, options",
    [
        ((520, 600), (4, 2), {}),
        ((300, 1096), (2, 2), {"causal": True}),
        ((128, 128), (6, 3), {}),
        ((700, 520), (2, 1), {"window_size": (90, 30), "softcap": 5.0}),
        ((304, 520), (2, 2), {"attn_bias": "half"}),
        ((304, 1520), (2, 2), {"attn_bias": "keys"}),
    ],
    ids=str,
)
def test_out_and_gradients(seqlens, heads, options, head_dim):
    q, k, v = leaves(*normal_qkv(2, *seqlens, *heads, head_dim, device="cuda"))
    options = dict(options)
    if options.get("attn_bias") == "half":
        options["attn_bias"] = normal(heads[0], *seqlens, seed=5, device="cuda")
    if options.get("attn_bias") == "keys":
        options["attn_bias"] = torch.arange(seqlens[1], device="cuda") < 900
        options["attn_bias"] = options["attn_bias"][None, None, None]
    out, lse, s_dmask = seeded(lambda: flash_attn_func(q, k, v, 0.2, return_attn_probs=True, **options))
    kept = (s_dmask >= 0).double() / steps_of(0.2)  # of pairs that are hidden it does not matter
    share = (s_dmask[s_dmask != 0] > 0).double().mean().item()
    assert abs(share - 0.8) < 0.01
    plain = {name: value for name, value in options.items() if name != "attn_bias"}
    if "attn_bias" in options:
        plain["attn_bias"] = options["attn_bias"]
    check_attention(out.detach(), lse.detach(), q.detach(), k.detach(), v.detach(), kept=kept, **plain)
    dout = normal(*out.shape, seed=9, device="cuda")
    got = torch.autograd.grad(out, (q, k, v), dout)
    inputs = leaves(*(x.double() for x in (q, k, v)))
    check_gradients(got, torch.autograd.grad(attention(*inputs, kept=kept, **plain)[0], inputs, dout.double()))
    again = seeded(lambda: flash_attn_func(q, k, v, 0.2, **options))
    assert torch.equal(out, again)
    for first, second in zip(got, torch.autograd.grad(again, (q, k, v), dout)):
        assert torch.equal(first, second)


def test_sequences_and_few_queries():
    q, k, v = normal_qkv(3, 1, 700, 4, 1, 64, device="cuda")
    expected = seeded(lambda: flash_attn_func(q, k, v, 0.3))
    starts = [torch.arange(4, dtype=torch.int32, device="cuda") * n for n in (1, 700)]
    got = seeded(lambda: flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), *starts, 1, 700, 0.3))
    assert torch.equal(got, expected.flatten(0, 1))


def test_every_replay_of_a_graph_draws_anew():
    q, k, v = leaves(*normal_qkv(2, 300, 300, 4, 2, 64, device="cuda"))
    dout = normal(2, 300, 4, 64, seed=9, device="cuda")

    def step():
        out = flash_attn_func(q, k, v, 0.3, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    torch.manual_seed(4)
    graph.replay()
    first = [x.clone() for x in results]
    graph.replay()
    assert not torch.equal(first[0], results[0])
    torch.manual_seed(4)
    for got, replayed in zip(step(), first):  # a graph's draw is the one that the generator would have made
        assert torch.equal(got, replayed)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_keeps_the_same(use_reentrant):
    inputs = leaves(*normal_qkv(2, 300, 300, 4, 2, 64, device="cuda"))
    dout = normal(2, 300, 4, 64, seed=9, device="cuda")

    def layer(q, k, v):
        return flash_attn_func(q, k, v, 0.3)

    expected = torch.autograd.grad(seeded(lambda: layer(*inputs)), inputs, dout)
    out = seeded(lambda: checkpoint(layer, *inputs, use_reentrant=use_reentrant))
    torch.manual_seed(9)
    out.backward(dout)
    for leaf, gradient in zip(inputs, expected):
        assert torch.equal(leaf.grad, gradient)


def test_a_layer_in_training_is_routed():
    layer = torch.nn.TransformerEncoderLayer(128, 2, 128, dropout=0.1, batch_first=True, device="cuda").half().train()
    x = normal(2, 300, 128, seed=3, device="cuda").requires_grad_()
    with route_sdpa() as router:
        first, second = (seeded(lambda: layer(x)) for _ in range(2))
    assert router.counts == {"flash_attn_jit": 2, "torch": 0} and torch.equal(first, second)
    assert torch.autograd.grad(first.float().sum(), x)[0].isfinite().all()


def test_nothing_grows_with_the_pairs():
    q, k, v = leaves(*normal_qkv(1, 4096, 4096, 2, 2, 64, device="cuda"))
    flash_attn_func(q, k, v, 0.1).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flash_attn_func(q, k, v, 0.1)
    torch.autograd.grad(out, (q, k, v), out.detach())
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096  # an eighth of the pairs' in float16
