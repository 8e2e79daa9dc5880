"""One torch operator with a fake implementation: torch.compile, fake tensors, transforms."""

import pytest
import torch
from attention_reference import NO_OPTIONS, check_attention, normal, normal_qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_jit
from flash_attn_jit import flash_attn_func

OP = torch.ops.flash_attn_jit.forward.default
BACKWARD = torch.ops.flash_attn_jit.backward.default
CU_SEQLENS = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
# As NO_OPTIONS, with everything on.
ALL_OPTIONS = (0.3, False, 7, 3, 2.0, torch.tensor([0.5, 0.25]), CU_SEQLENS, CU_SEQLENS, 15, 15)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """A function that several tests compile would reach torch.compile's limit of recompilations."""
    torch.compiler.reset()


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


CAUSAL = (NO_OPTIONS[0], True, *NO_OPTIONS[2:])


def test_opcheck_of_forward():
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    torch.library.opcheck(OP, (q, k, v, *CAUSAL))
    torch.library.opcheck(OP, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, *NO_OPTIONS))
    torch.library.opcheck(OP, (q[0], k[0, :20], v[0, :20], *ALL_OPTIONS))


def backward_arguments(q, k, v, options, gradients=None):
    out, softmax_lse = OP(q, k, v, *options)
    gradients = [torch.empty_like(t) for t in (q, k, v)] if gradients is None else gradients
    return (normal(*out.shape, seed=9), q, k, v, out, softmax_lse, *gradients, *options)


def test_opcheck_of_backward():
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    torch.library.opcheck(BACKWARD, backward_arguments(q, k, v, CAUSAL))
    torch.library.opcheck(BACKWARD, backward_arguments(q, k, v, CAUSAL, [torch.empty_like(q), None, None]))
    torch.library.opcheck(
        BACKWARD, backward_arguments(q, k, v, CAUSAL, [None, torch.empty_like(k), torch.empty_like(v)])
    )
    torch.library.opcheck(BACKWARD, backward_arguments(q[0], k[0, :20], v[0, :20], ALL_OPTIONS))


def test_opcheck_of_backward_into_a_packed_gradient():
    qkv = normal(2, 20, 3, 2, 64)
    dqkv = torch.empty_like(qkv)
    torch.library.opcheck(BACKWARD, backward_arguments(*qkv.unbind(2), NO_OPTIONS, dqkv.unbind(2)))


def test_backward_writes_what_it_is_given_and_nothing_else():
    q, k, v = normal_qkv(1, 20, 30, 2, 1, 64)
    whole = backward_arguments(q, k, v, CAUSAL)
    assert BACKWARD(*whole) is None
    wide = torch.full((1, 20, 2, 80), 7.0, dtype=torch.float16)
    BACKWARD(*whole[:6], wide[..., 8:72], None, None, *CAUSAL)
    assert (
        torch.equal(wide[..., 8:72], whole[6]) and (wide[..., :8] == 7).all() and (wide[..., 72:] == 7).all()
    )
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    BACKWARD(*whole[:6], None, dk, dv, *CAUSAL)
    assert torch.equal(dk, whole[7]) and torch.equal(dv, whole[8])


def lengths(of):
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    return (cu_seqlens, 13) if of == "qkv" else (cu_seqlens, cu_seqlens, 13, 13)


FORMS = {
    "flash_attn_func": lambda: normal_qkv(1, 20, 20, 2, 1, 64),
    "flash_attn_kvpacked_func": lambda: (normal(1, 20, 2, 64), normal(1, 20, 2, 1, 64, seed=1)),
    "flash_attn_qkvpacked_func": lambda: (normal(1, 20, 3, 2, 64),),
    "flash_attn_varlen_func": lambda: (*(t[0] for t in normal_qkv(1, 20, 20, 2, 1, 64)), *lengths("q, k, v")),
    "flash_attn_varlen_kvpacked_func": lambda: (normal(20, 2, 64), normal(20, 2, 1, 64), *lengths("q, kv")),
    "flash_attn_varlen_qkvpacked_func": lambda: (normal(20, 3, 2, 64), *lengths("qkv")),
}


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (5, 3), "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_a_compiled_training_step(name, options):
    """One graph, forward and backward, and the plain call's gradients."""

    def loss(*arguments):
        out, softmax_lse, _ = getattr(flash_attn_jit, name)(*arguments, return_attn_probs=True, **options)
        return (out.float() ** 2).sum(), softmax_lse

    def run(function):
        arguments = FORMS[name]()
        inputs = [
            t.requires_grad_() for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()
        ]
        total, softmax_lse = function(*arguments)
        return [softmax_lse, *torch.autograd.grad(total, inputs)]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled), run(loss)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_compiled_step_of_one_input(which):
    def gradient(function):
        inputs = list(normal_qkv(1, 20, 30, 2, 1, 64))
        inputs[which].requires_grad_()
        return torch.autograd.grad(function(*inputs).float().square().sum(), inputs[which])[0]

    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), gradient(flash_attn_func))


def test_compile_under_autocast():
    q, k, v = (t.float().requires_grad_() for t in normal_qkv(1, 20, 30, 2, 1, 64))
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.float16):
        out, expected = compiled(q, k, v), flash_attn_func(q, k, v)
    assert torch.equal(out, expected)
    gradients = (torch.autograd.grad(t.float().sum(), (q, k, v)) for t in (out, expected))
    for got, wanted in zip(*gradients):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layout", ["plain", "heads first"])
def test_fake_result_is_laid_out_as_the_real_one(layout):
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    if layout == "heads first":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    real = OP(q, k, v, *NO_OPTIONS)
    with FakeTensorMode() as mode:
        fake = OP(*(mode.from_tensor(t) for t in (q, k, v)), *NO_OPTIONS)
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


class Recorder(TorchDispatchMode):
    """Remembers the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_both_operators():
    q, k, v = (t.requires_grad_() for t in normal_qkv(1, 8, 8, 1, 1, 64))
    with Recorder() as recorder:
        flash_attn_func(q, k, v).sum().backward()
    assert OP in recorder.seen and BACKWARD in recorder.seen


def test_a_backward_alone_under_a_mode_goes_by_the_operator():
    q, k, v = (t.requires_grad_() for t in normal_qkv(1, 8, 8, 1, 1, 64))
    out = flash_attn_func(q, k, v)
    with Recorder() as recorder:
        out.sum().backward()
    assert BACKWARD in recorder.seen


class Subclass(torch.Tensor):
    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_the_operator():
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    out = flash_attn_func(q.as_subclass(Subclass), k, v)
    assert isinstance(out, Subclass) and OP in Subclass.seen
    assert torch.equal(out.as_subclass(torch.Tensor), flash_attn_func(q, k, v))


def test_the_profiler_sees_the_operator():
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    with torch.profiler.profile() as profile:
        flash_attn_func(q, k, v)
    assert "flash_attn_jit::forward" in {event.key for event in profile.key_averages()}


def test_a_tensor_that_is_negated_when_read():
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    for i in range(3):
        tensors = [q, k, v]
        tensors[i] = torch._neg_view(-tensors[i])
        assert torch.equal(flash_attn_func(*tensors), flash_attn_func(q, k, v))


def test_make_fx_records_the_operators():
    q, k, v = (t.requires_grad_() for t in normal_qkv(1, 8, 8, 1, 1, 64))

    def step(q, k, v):
        return torch.autograd.grad(flash_attn_func(q, k, v).float().sum(), (q, k, v))

    targets = {str(node.target) for node in make_fx(step)(q, k, v).graph.nodes}
    assert {"flash_attn_jit.forward.default", "flash_attn_jit.backward.default"} <= targets


def test_a_tensor_that_outlived_its_transform():
    kept = []

    def keep(q):
        kept.append(q)
        return q.float().sum()

    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    torch.func.grad(keep)(q)
    assert torch.equal(flash_attn_func(kept[0], k, v), flash_attn_func(q, k, v))
