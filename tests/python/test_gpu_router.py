"""route_sdpa() on a GPU, whose backward passes run in threads of autograd's own: `pytest -m gpu`."""

import threading

import pytest
import torch
import torch.nn.functional as F
from attention_reference import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import route_sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def layer(x):
    x = torch.tanh(x)
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def gradient(function, x):
    x = x.detach().requires_grad_()
    function(x).float().square().sum().backward()
    return x.grad


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpointing(where, use_reentrant):
    x = normal(2, 4, 128, 64, device="cuda")
    expected = gradient(layer, x)
    x.requires_grad_()
    with route_sdpa() as router:
        loss = checkpoint(layer, x, use_reentrant=use_reentrant).float().square().sum()
        if where == "inside":
            loss.backward()
    if where == "outside":
        loss.backward()
    torch.testing.assert_close(x.grad, expected, atol=1e-2, rtol=1e-2)
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


def test_threads():
    x = normal(2, 4, 128, 64, device="cuda")
    outs = []
    with route_sdpa() as router:
        threads = [threading.Thread(target=lambda: outs.append(layer(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert router.counts == {"flash_attn_jit": 4, "torch": 0}
    for out in outs:
        torch.testing.assert_close(out, layer(x), atol=2e-3, rtol=2e-3)


def test_data_parallel_replicas():
    class Model(nn.Module):
        def forward(self, x):
            return layer(x)

    devices = list(range(torch.cuda.device_count()))
    x = normal(2 * len(devices), 4, 128, 64, device="cuda")
    with route_sdpa() as router:
        out = nn.DataParallel(Model(), devices)(x)
    assert router.counts == {"flash_attn_jit": len(devices), "torch": 0}
    torch.testing.assert_close(out, layer(x), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_layer_in_another_thread(train):
    module = nn.TransformerEncoderLayer(128, 2, 128, dropout=0.0, batch_first=True, device="cuda", dtype=torch.float16)
    module.train(train)
    x, outs = normal(2, 64, 128, device="cuda"), []

    def run():
        with torch.set_grad_enabled(train):
            outs.append(module(x))

    run()
    with route_sdpa() as router:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    torch.testing.assert_close(outs[1], outs[0], atol=1e-2, rtol=1e-2)


def test_what_is_not_routed_has_pytorchs_gradient():
    x = normal(2, 4, 128, 320, device="cuda")  # whose gradient no kernel makes

    def attention(x):
        return F.scaled_dot_product_attention(x, x, x)

    expected = gradient(attention, x)
    with route_sdpa() as router:
        got = gradient(attention, x)
    assert router.counts == {"flash_attn_jit": 0, "torch": 1}
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_grouped_heads_in_a_compiled_graph():
    q, k = normal(1, 8, 128, 64, device="cuda"), normal(1, 2, 128, 64, device="cuda")
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), backend=backend, fullgraph=True
    )
    with route_sdpa():
        out = compiled(q, k)
    assert "flash_attn_jit.forward.default" in targets
    expected = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
