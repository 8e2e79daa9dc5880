"""One torch operator with a fake implementation: torch.compile, fake tensors, transforms."""

import pytest
import torch
from attention_reference import check_attention, normal_qkv
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_jit import flash_attn_func

OP = torch.ops.flash_attn_jit.forward.default


class CountingBackend:
    """A torch.compile backend that runs the graph as it is and remembers it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append(graph)
        return graph.forward

    def operators(self):
        return [
            node.target for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"
        ]


def test_one_operator_and_no_graph_break():
    backend = CountingBackend()

    @torch.compile(fullgraph=True, backend=backend)
    def layer(q, k, v):
        return flash_attn_func(q, k, v, causal=True, softmax_scale=0.2, deterministic=True) + 1

    q, k, v = normal_qkv(1, 20, 20, 2, 1, 64)
    assert torch.equal(layer(q, k, v), flash_attn_func(q, k, v, causal=True, softmax_scale=0.2) + 1)
    assert len(backend.graphs) == 1
    assert [target for target in backend.operators() if "flash_attn_jit" in str(target)] == [OP]


@pytest.mark.parametrize("window_size", [(-1, -1), [-1, -1]], ids=["tuple", "list"])
def test_compile_through_aot_autograd(window_size):
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    q, k, v = normal_qkv(1, 20, 30, 2, 1, 64)
    arguments = {"causal": True, "window_size": window_size, "return_attn_probs": True}
    for result, expected in zip(compiled(q, k, v, **arguments), flash_attn_func(q, k, v, **arguments)):
        assert torch.equal(result, expected) and result.stride() == expected.stride()


def test_compile_with_other_lengths():
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (5, 9, 33):
        q, k, v = normal_qkv(1, seqlen, seqlen + 3, 2, 2, 64)
        check_attention(compiled(q, k, v), None, q, k, v)


def test_compiled_call_refuses_what_the_plain_one_refuses():
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 64)
    with pytest.raises(ValueError, match=r"q has dtype torch\.float32"):
        compiled(q.float(), k, v)


def test_opcheck():
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    torch.library.opcheck(OP, (q, k, v, None, True))
    torch.library.opcheck(OP, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, 0.3, False))


@pytest.mark.parametrize("layout", ["plain", "heads first"])
def test_fake_result_is_laid_out_as_the_real_one(layout):
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    if layout == "heads first":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    real = OP(q, k, v, None, False)
    with FakeTensorMode() as mode:
        fake = OP(*(mode.from_tensor(t) for t in (q, k, v)), None, False)
    for a, b in zip(fake, real):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors_give_shapes():
    q, k, v = (t.to("meta") for t in normal_qkv(2, 20, 30, 4, 2, 64))
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.device.type == "meta" and out.shape == q.shape
    assert softmax_lse.shape == (2, 4, 20) and softmax_lse.dtype == torch.float32


def test_fake_tensors_of_another_rank():
    with FakeTensorMode():
        q = torch.empty(8, 2, 64, dtype=torch.float16)
        with pytest.raises(ValueError, match="q has 3 dimensions"):
            flash_attn_func(q, q, q)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    q, k, v = (t.unflatten(0, (2, 1)) for t in normal_qkv(2, 20, 20, 2, 2, 64))
    batched = torch.vmap(flash_attn_func)(q, k, v)
    for i in range(2):
        assert torch.equal(batched[i], flash_attn_func(q[i], k[i], v[i]))


def test_functional_gradient_is_refused():
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 64)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: flash_attn_func(q, k, v).float().sum())(q)
