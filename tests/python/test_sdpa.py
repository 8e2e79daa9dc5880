"""sdpa() and route_sdpa() beside PyTorch's scaled_dot_product_attention in float32."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from attention_reference import normal
from conftest import needs_torch, needs_traced_function_modes, run_python
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import flash_attn_jit
from flash_attn_jit import UnsupportedError, _sdpa, route_sdpa, sdpa

SEQLENS = [(70, 70), (33, 90), (90, 33), (1, 40), (40, 1)]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """A function that several tests compile would reach torch.compile's limit of recompilations."""
    torch.compiler.reset()


def heads_first(*shape_q, seqlen_k, heads_k=None):
    """query (..., heads, seqlen_q, head_dim), key and value"""
    *batch, heads, _, head_dim = shape_q
    shape_k = (*batch, heads if heads_k is None else heads_k, seqlen_k, head_dim)
    return normal(*shape_q, seed=1), normal(*shape_k, seed=2), normal(*shape_k, seed=3)


def torchs(query, key, value, **arguments):
    if torch.__version__ < "2.5" and arguments.pop("enable_gqa", False):  # which came with that version
        group_size = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(group_size, -3) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, **arguments)


def check(query, key, value, function=sdpa, **arguments):
    """Out and gradients within fp16's reach of PyTorch's in float32."""
    ours = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    theirs = [t.detach().float().requires_grad_() for t in (query, key, value)]
    out, expected = function(*ours, **arguments), torchs(*theirs, **arguments)
    assert out.shape == expected.shape and out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)
    dout = normal(*out.shape, seed=9)
    gradients = zip(torch.autograd.grad(out, ours, dout), torch.autograd.grad(expected, theirs, dout.float()))
    for got, wanted in gradients:
        torch.testing.assert_close(got.float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_lengths(seqlens, is_causal):
    check(*heads_first(2, 2, seqlens[0], 64, seqlen_k=seqlens[1]), is_causal=is_causal)


@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_groups(heads_k):
    check(*heads_first(2, 4, 20, 64, seqlen_k=30, heads_k=heads_k), enable_gqa=True)


def test_scale():
    check(*heads_first(1, 2, 20, 64, seqlen_k=30), scale=0.3)


@pytest.mark.parametrize("batch", [(2, 3), (1, 2, 2), ()], ids=str)
def test_other_ranks(batch):
    check(*heads_first(*batch, 2, 20, 64, seqlen_k=30), is_causal=True)


def test_two_dimensions():
    check(normal(20, 64), normal(30, 64, seed=1), normal(30, 64, seed=2))


def test_sequence_first_memory():
    query, key, value = (t.transpose(1, 2) for t in heads_first(1, 20, 2, 64, seqlen_k=2, heads_k=30))
    check(query, key, value, is_causal=True)


Q, K, V = heads_first(1, 4, 8, 64, seqlen_k=8)


def check_causal_bias(query, key, value, make_bias, function=sdpa):
    bias = make_bias(query.shape[-2], key.shape[-2])
    sees_keys = bias._materialize().any(-1, keepdim=True)  # PyTorch gives NaN for the others
    ours = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    theirs = [t.detach().float().requires_grad_() for t in (query, key, value)]
    out = function(*ours, bias)
    # Some key for a query that sees none, whose gradient is masked below.
    expected = F.scaled_dot_product_attention(*theirs, bias._materialize() | ~sees_keys) * sees_keys
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)
    dout = normal(*out.shape, seed=9)
    gradients = zip(torch.autograd.grad(out, ours, dout), torch.autograd.grad(expected, theirs, dout.float()))
    for got, wanted in gradients:
        torch.testing.assert_close(got.float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("make_bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_causal_biases(seqlens, make_bias):
    tensors = heads_first(1, 2, seqlens[0], 64, seqlen_k=seqlens[1])
    check_causal_bias(*tensors, make_bias)
    compiled = torch.compile(sdpa, backend="aot_eager", fullgraph=True, dynamic=False)
    check_causal_bias(*tensors, make_bias, compiled)


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("make_bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("seqlens", [(8, 20), (20, 8)], ids=str)
@pytest.mark.parametrize("where", ["here", "in a thread", "in a checkpoint"])
def test_routed_causal_biases(where, seqlens, make_bias):
    if where == "in a checkpoint":
        needs_torch("2.8", "torch.utils.checkpoint takes a causal bias")

    def attend(*arguments):
        if where == "in a checkpoint":
            return checkpoint(F.scaled_dot_product_attention, *arguments, use_reentrant=False)
        run = in_a_thread if where == "in a thread" else lambda function, *args: function(*args)
        return run(F.scaled_dot_product_attention, *arguments)

    def routed(*arguments):
        with route_sdpa() as router:
            out = attend(*arguments)
        assert router.counts == {"flash_attn_jit": 1, "torch": 0}
        return out

    check_causal_bias(*heads_first(1, 2, seqlens[0], 64, seqlen_k=seqlens[1]), make_bias, routed)


@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_causal_biases_that_fall_back(where):
    run = in_a_thread if where == "in a thread" else lambda function, *args: function(*args)
    query, key, value = (t.float() for t in heads_first(1, 2, 8, 64, seqlen_k=20))
    for make_bias in (causal_lower_right, causal_upper_left):
        with route_sdpa() as router:
            out = run(F.scaled_dot_product_attention, query, key, value, make_bias(8, 20))
        assert torch.equal(out, F.scaled_dot_product_attention(query, key, value, make_bias(8, 20)))
        assert router.counts == {"flash_attn_jit": 0, "torch": 1} and "float32" in str(router)
    with route_sdpa(), pytest.raises(RuntimeError):
        run(F.scaled_dot_product_attention, Q, K, V, causal_lower_right(5, 6))
    with route_sdpa(), pytest.raises(ValueError, match="causal=True"):
        run(F.scaled_dot_product_attention, Q, K, V, causal_lower_right(8, 8), 0.0, True)


def test_causal_biases_imported_inside_of_the_router():
    done = run_python(
        """
import sys, torch, torch.nn.functional as F, flash_attn_jit
q, k = (torch.randn(1, 2, n, 16).half() for n in (8, 20))
with flash_attn_jit.route_sdpa() as router:
    assert "torch.nn.attention.bias" not in sys.modules
    from torch.nn.attention.bias import CausalBias, causal_lower_right
    before = CausalBias._dispatch
    out = F.scaled_dot_product_attention(q, k, k, causal_lower_right(8, 20))
assert router.counts == {"flash_attn_jit": 1, "torch": 0}, router
assert CausalBias._dispatch is before
expected = F.scaled_dot_product_attention(q, k, k, causal_lower_right(8, 20))
torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
"""
    )
    assert done.returncode == 0, done.stderr


def test_compiled_causal_biases():
    needs_traced_function_modes()
    targets, bias = Targets(), causal_lower_right(8, 20)
    tensors = heads_first(1, 2, 8, 64, seqlen_k=20)
    compiled = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, bias), backend=targets, fullgraph=True)
    with route_sdpa():
        out = compiled(*tensors)
    assert "flash_attn_jit.forward.default" in targets.graphs[0]
    torch.testing.assert_close(out, sdpa(*tensors, bias))


@pytest.mark.parametrize(
    "error, words, changes",
    [
        (ValueError, "^dropout_p is 1.0.*to below 1.0", {"dropout_p": 1.0}),
        (ValueError, "^attn_mask is .* 5 queries and 6 keys.* 8 and 8", {"attn_mask": causal_upper_left(5, 6)}),
        (ValueError, "^is_causal is True", {"attn_mask": causal_lower_right(8, 8), "is_causal": True}),
        (ValueError, "^scale is a Tensor", {"scale": torch.tensor(1.0)}),
        (ValueError, "^scale is inf", {"scale": float("inf")}),
        (ValueError, r"^scale is 1e\+18.*-1e\+17 to 1e\+17", {"scale": 1e18}),
        (ValueError, "^is_causal", {"is_causal": None}),
        (ValueError, "^enable_gqa", {"enable_gqa": 3.0}),
        (ValueError, "^query is a list", {"query": [1]}),
        (ValueError, r"^query has dtype torch.float32.*query.to\(torch.float16\)", {"query": Q.float()}),
        (ValueError, "^value has dtype torch.bfloat16 and query torch.float16", {"value": V.bfloat16()}),
        (UnsupportedError, "^value has head_dim 257 and query 64", {"value": V.new_zeros((*V.shape[:-1], 257))}),
        (ValueError, "^key has head_dim 32 and query 64", {"key": K[..., :32]}),
        (ValueError, "^value has shape .* key", {"value": V[..., :5, :]}),
        (ValueError, "^key has batch dimensions", {"key": K.expand(2, -1, -1, -1)}),
        (ValueError, "^key has 3 dimensions and query 4", {"key": K[0]}),
        (ValueError, "^key has 2 heads.*enable_gqa=True", {"key": K[:, :2], "value": V[:, :2]}),
        (
            ValueError,
            "^query has 4 heads and key 3",
            {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        ),
        (ValueError, r"^query has strides.*query.contiguous\(\)", {"query": Q.mT.contiguous().mT}),
        (ValueError, "^key is on device meta and query on cpu", {"key": K.to("meta")}),
        (ValueError, "^key is of layout", {"key": K.to_sparse()}),
        (
            UnsupportedError,
            "^query has head_dim 513",
            {n: normal(1, 2, 8, 513) for n in ("query", "key", "value")},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(error, words, changes):
    with pytest.raises(error, match=words):
        sdpa(**{"query": Q, "key": K, "value": V, **changes})


def test_meta_tensors_give_shapes():
    query, key, value = (t.to("meta") for t in (Q, K, V))
    assert sdpa(query, key, value, is_causal=True).shape == Q.shape


def test_under_autocast():
    query, key, value = (t.float() for t in (Q, K, V))
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(sdpa(query, key.bfloat16().float(), value), sdpa(Q, K.bfloat16(), V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sdpa(Q, K, V)
    assert torch.equal(out, sdpa(Q.bfloat16(), K.bfloat16(), V.bfloat16()))


@pytest.mark.parametrize("function", [F.scaled_dot_product_attention, imported_before], ids=["F", "imported"])
def test_routed(function):
    with route_sdpa() as router:
        check(*heads_first(1, 2, 20, 64, seqlen_k=30), function=function, is_causal=True)
    # check() calls PyTorch's in float32 as well.
    assert router.counts == {"flash_attn_jit": 1, "torch": 1}
    assert router.reasons == {"query has dtype torch.float32. Cast it: query.to(torch.float16)": 1}
    assert "1 calls ran in flash_attn_jit, 1 in PyTorch" in str(router)
    assert "1 x query has dtype torch.float32" in repr(router)


def test_outside_of_the_router_nothing_is_routed():
    router = route_sdpa()
    with router:
        pass
    F.scaled_dot_product_attention(Q, K, V)
    assert router.counts == {"flash_attn_jit": 0, "torch": 0}


def nested(tensor):
    return torch.nested.nested_tensor([tensor[0].float()])


@pytest.mark.parametrize(
    "reason, changes",
    [
        ("dropout_p", {"dropout_p": 1.0}),
        (
            "query has dtype torch.float32. Cast it: query.to(torch.float16)",
            {"query": Q.float(), "key": K.float(), "value": V.float()},
        ),
        ("value has head_dim 257", {"value": V.new_zeros((*V.shape[:-1], 257))}),
        ("batch dimensions", {"query": Q.expand(2, -1, -1, -1)}),
        ("strides", {"query": Q.mT.contiguous().mT}),
        ("scale is 1e+18", {"scale": 1e18}),
        ("Subclass", {"query": Q.as_subclass(type("Subclass", (torch.Tensor,), {}))}),
        ("nested", {name: nested(t) for name, t in (("query", Q), ("key", K), ("value", V))}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_falls_back(reason, changes):
    with route_sdpa() as router:
        F.scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, **changes})
    assert router.counts == {"flash_attn_jit": 0, "torch": 1}
    assert [reason in each for each in router.reasons] == [True]


def test_pytorchs_own_errors_stay():
    with route_sdpa(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, K[..., :32], V)
    with route_sdpa(), pytest.raises(TypeError):
        F.scaled_dot_product_attention(Q, K)


def test_transforms_fall_back():
    query, key, value = (t.float() for t in (Q, K, V))
    with route_sdpa() as router:
        torch.func.grad(lambda q: F.scaled_dot_product_attention(q, key, value).sum())(query)
        torch.vmap(F.scaled_dot_product_attention)(Q[None], K[None], V[None])
    assert router.counts["flash_attn_jit"] == 0 and "transform" in str(router)


def test_autocast_is_sdpas():
    query, key, value = (t.float().requires_grad_() for t in (Q, K, V))
    with route_sdpa() as router, torch.autocast("cpu", dtype=torch.float16):
        out = F.scaled_dot_product_attention(query, key, value)
        out.float().sum().backward()
    with torch.autocast("cpu", dtype=torch.float16):
        assert F.scaled_dot_product_attention(query, key, value).dtype == out.dtype == torch.float16
    assert router.counts == {"flash_attn_jit": 1, "torch": 0} and query.grad.dtype == torch.float32
    with route_sdpa() as router, torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}


def test_multi_head_attention_that_trains():
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(64, 2, batch_first=True).half()
    x = normal(2, 20, 64)
    expected = layer(x, x, x, need_weights=False)[0]
    expected_gradients = torch.autograd.grad(expected.float().sum(), list(layer.parameters()))
    with route_sdpa() as router:
        out = layer(x, x, x, need_weights=False)[0]
    gradients = torch.autograd.grad(out.float().sum(), list(layer.parameters()))
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=1e-2)
    for got, wanted in zip(gradients, expected_gradients):
        torch.testing.assert_close(got, wanted, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_layer(train):
    layer = torch.nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True).half().train(train)
    x = normal(2, 20, 64)
    with torch.set_grad_enabled(train), route_sdpa() as router:
        out = layer(x)
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    torch.testing.assert_close(out, layer(x), atol=1e-2, rtol=1e-2)


class Targets:
    """A torch.compile backend that remembers what its graphs call."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


def test_compiled_calls_are_routed_inside_a_router_alone():
    needs_traced_function_modes()
    targets = Targets()
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        backend=targets,
        fullgraph=True,
    )
    with route_sdpa() as router:
        inside = compiled(Q, K, V)
        compiled(Q, K, V)
    assert "flash_attn_jit.forward.default" in targets.graphs[0] and len(targets.graphs) == 1
    torch.testing.assert_close(compiled(Q, K, V), inside, atol=2e-3, rtol=2e-3)
    assert not any("flash_attn_jit" in target for target in targets.graphs[1])
    assert router.counts == {"flash_attn_jit": 0, "torch": 0}


@pytest.mark.parametrize("seqlens", SEQLENS[:3], ids=str)
def test_a_compiled_training_step(seqlens):
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True, dynamic=True)

    def routed(*tensors, **arguments):
        with route_sdpa():
            return compiled(*tensors, **arguments)

    check(*heads_first(1, 2, seqlens[0], 64, seqlen_k=seqlens[1]), function=routed, is_causal=True)


def test_compiled_calls_that_cannot_be_routed():
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    tensors = [t.float().requires_grad_() for t in (Q, K, V)]
    with route_sdpa():
        out = compiled(*tensors)
    assert out.requires_grad
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors))


def test_a_compiled_multi_head_attention():
    layer = torch.nn.MultiheadAttention(64, 2, batch_first=True).half()
    x = normal(2, 20, 64)
    compiled = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0], backend="aot_eager")
    with route_sdpa():
        out = compiled(x)
    torch.testing.assert_close(out, layer(x, x, x, need_weights=False)[0], atol=2e-3, rtol=1e-2)


def test_sdpa_compiles():
    compiled = torch.compile(sdpa, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q, K, V, is_causal=True), sdpa(Q, K, V, is_causal=True))


def test_a_gpu_is_asked_once_when_a_tensor_is_on_it(monkeypatch):
    asked = []

    def get_device_capability(ordinal):
        asked.append(ordinal)
        return {3: (7, 0), 4: (7, 5)}[ordinal]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    monkeypatch.setattr(_sdpa, "_capabilities", {})
    assert "sm_70" in _sdpa.platform_refusal(torch.device("cuda", 3)).reason()
    assert _sdpa.platform_refusal(torch.device("cuda", 4)) is None
    assert _sdpa.platform_refusal(torch.device("cuda", 3)) and asked == [3, 4]


def test_the_compiler_asks_for_a_gpu_when_it_traces(monkeypatch):
    monkeypatch.setattr(_sdpa, "_capabilities", {3: (7, 0), 4: (7, 5)})

    def count_refusals(x):
        return x + sum(_sdpa.platform_refusal(torch.device("cuda", n)) is not None for n in (3, 4))

    compiled = torch.compile(count_refusals, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1
    _sdpa._capabilities[4] = (7, 0)  # not looked at again: no guard, no recompilation
    assert compiled(torch.zeros(())) == 1


def test_without_the_interpreter():
    done = run_python(
        """
import torch, torch.nn.functional as F, flash_attn_jit
q = torch.randn(1, 2, 8, 64).half()
with flash_attn_jit.route_sdpa() as router:
    F.scaled_dot_product_attention(q, q, q)
assert router.counts == {"flash_attn_jit": 0, "torch": 1} and "device cpu" in str(router), router
try:
    flash_attn_jit.sdpa(q, q, q)
except ValueError as error:
    assert "FLASH_ATTN_JIT_INTERPRET=1" in str(error), error
else:
    raise AssertionError("it ran")
""",
        FLASH_ATTN_JIT_INTERPRET=None,
    )
    assert done.returncode == 0, done.stderr


def test_both_are_exported():
    assert {"sdpa", "route_sdpa"} <= set(flash_attn_jit.__all__)
