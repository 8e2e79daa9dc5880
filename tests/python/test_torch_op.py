"""The torch operators with their fake implementations and derivatives: compilers, tracers, modes, transforms."""

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from attention_reference import NO_OPTIONS, check_attention, normal, normal_qkv
from conftest import needs_torch
from functorch.compile import make_boxed_compiler  # type: ignore[import-untyped]
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import flash_attn_jit
from flash_attn_jit import flash_attn_func
from flash_attn_jit._options import Options

OP = torch.ops.flash_attn_jit.forward.default
BACKWARD = torch.ops.flash_attn_jit.backward.default
CU_SEQLENS = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
# With everything on.
ALL_OPTIONS = Options(
    softmax_scale=0.3,
    window_left=7,
    window_right=3,
    softcap=2.0,
    alibi_slopes=torch.tensor([0.5, 0.25]),
    cu_seqlens_q=CU_SEQLENS,
    cu_seqlens_k=CU_SEQLENS,
    max_seqlen_q=15,
    max_seqlen_k=15,
    has_backward=True,
)


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
        return [node.target for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"]


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


CAUSAL = NO_OPTIONS._replace(causal=True)


def test_opcheck_of_forward():
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    torch.library.opcheck(OP, (q, k, v, *CAUSAL))
    torch.library.opcheck(OP, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, *NO_OPTIONS))
    torch.library.opcheck(OP, (q[0], k[0, :20], v[0, :20], *ALL_OPTIONS))


def backward_arguments(q, k, v, options, wanted=(True, True, True)):
    out, softmax_lse = OP(q, k, v, *options)
    return (normal(*out.shape, seed=9), q, k, v, out, softmax_lse, None, list(wanted), *options)


def test_opcheck_of_forward_with_inputs_that_need_gradients():
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 20, 30, 2, 1, 64))
    torch.library.opcheck(OP, (q, k, v, *CAUSAL))
    kv, qkv = (normal(20, parts, 2, 64).requires_grad_() for parts in (2, 3))
    torch.library.opcheck(torch.ops.flash_attn_jit.forward_kvpacked.default, (q[0].detach(), kv, *ALL_OPTIONS))
    torch.library.opcheck(torch.ops.flash_attn_jit.forward_qkvpacked.default, (qkv, *ALL_OPTIONS))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_opcheck_of_backward(wanted):
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    torch.library.opcheck(BACKWARD, backward_arguments(q, k, v, CAUSAL, wanted))
    torch.library.opcheck(BACKWARD, backward_arguments(q[0], k[0, :20], v[0, :20], ALL_OPTIONS, wanted))


def test_backward_of_packed_tensors():
    qkv = normal(2, 20, 3, 2, 64)
    dout, q, k, v, out, softmax_lse, dlse, _, *options = backward_arguments(*qkv.unbind(2), CAUSAL)
    expected = torch.stack(BACKWARD(dout, q, k, v, out, softmax_lse, dlse, [True] * 3, *options)[:3], 2)
    backward = torch.ops.flash_attn_jit.backward_qkvpacked.default
    arguments = (dout, qkv, out, softmax_lse, dlse, [True], *options)
    assert torch.equal(backward(*arguments)[0], expected)
    torch.library.opcheck(backward, arguments)
    backward = torch.ops.flash_attn_jit.backward_kvpacked.default
    arguments = (dout, q, qkv[:, :, 1:], out, softmax_lse, dlse, [False, True], *options)
    dq, dkv, *_ = backward(*arguments)
    assert dq.numel() == 0 and torch.equal(dkv, expected[:, :, 1:])
    torch.library.opcheck(backward, arguments)


def test_backward_gives_what_is_wanted():
    q, k, v = normal_qkv(1, 20, 150, 2, 1, 64)  # with fewer keys one kernel would make all, and round otherwise
    whole = BACKWARD(*backward_arguments(q, k, v, CAUSAL))
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        gradients = BACKWARD(*backward_arguments(q, k, v, CAUSAL, wanted))
        for gradient, expected, needed in zip(gradients, whole, wanted):
            assert torch.equal(gradient, expected) if needed else gradient.numel() == 0


def test_operators_of_packed_tensors_refuse_other_shapes():
    q, qkv = normal(1, 8, 2, 64), normal(1, 8, 3, 2, 64)
    with pytest.raises(ValueError, match=r"^kv has size 3 in dimension 2"):
        torch.ops.flash_attn_jit.forward_kvpacked(q, qkv, *NO_OPTIONS)
    with pytest.raises(ValueError, match=r"^qkv has 4 dimensions"):
        torch.ops.flash_attn_jit.forward_qkvpacked(q, *NO_OPTIONS)


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5])
def test_one_argument_of_backward_on_the_meta_device(which):
    arguments = list(backward_arguments(*normal_qkv(1, 8, 8, 1, 1, 64), NO_OPTIONS))
    arguments[which] = arguments[which].to("meta")
    with pytest.raises(ValueError, match=r"is on device .*accepted: all on one device"):
        BACKWARD(*arguments)


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
        inputs = [t.requires_grad_() for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
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
        # Inside a transform the forward kernel, outside that of few queries.
        torch.testing.assert_close(batched[i], flash_attn_func(q[i], k[i], v[i]), atol=1e-3, rtol=1e-3)


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
    seen: ClassVar[list[Any]] = []

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


# ---- graphs that others record ----


class Layer(torch.nn.Module):
    """Attention of a linear projection, in one of the forms that the functions take."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.attend = torch.nn.Linear(32, 96).half(), attend

    def forward(self, x):
        return self.attend(self.project(x).unflatten(-1, (3, 2, 16))).flatten(-2)


def of_separate(qkv):
    return flash_attn_func(*qkv.unbind(2), causal=True)


def of_alibi(qkv):
    return flash_attn_func(*qkv.unbind(2), alibi_slopes=torch.tensor([0.5, 0.25]))


def of_sdpa(qkv):
    return flash_attn_jit.sdpa(*(t.transpose(1, 2) for t in qkv.unbind(2))).transpose(1, 2)


def of_varlen(qkv):
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    return flash_attn_jit.flash_attn_varlen_qkvpacked_func(qkv[0], cu_seqlens, 15)


def of_varlen_by_a_global(qkv):
    return flash_attn_jit.flash_attn_varlen_qkvpacked_func(qkv[0], CU_SEQLENS, 15)


ATTENDS = {
    "separate": of_separate,
    "kvpacked": lambda qkv: flash_attn_jit.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:]),
    "qkvpacked": lambda qkv: flash_attn_jit.flash_attn_qkvpacked_func(qkv, window_size=(5, 2)),
    "varlen": of_varlen,
    "varlen by a global": of_varlen_by_a_global,
    "alibi": of_alibi,
    "sdpa": of_sdpa,
}


def by_make_fx(layer, x):
    names, values = zip(*layer.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    graph = make_fx(call)(x, *values)
    return lambda x: graph(x, *values)


RECORDERS = {
    "jit.trace": torch.jit.trace,
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "make_fx": by_make_fx,
    "compile": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "error:.*autograd kernel")
@pytest.mark.parametrize("record", RECORDERS)
@pytest.mark.parametrize("attend", ATTENDS)
def test_a_recorded_graph_keeps_the_gradient(attend, record):
    """Of the projection, which it reaches through attention alone; and no warning that a derivative is missing."""
    if (attend, record) == ("varlen by a global", "export"):
        needs_torch("2.8", "torch.export takes a tensor that is a global")
    x = normal(1, 20, 32)
    flash_attn_jit.sdpa(*normal_qkv(1, 8, 8, 2, 2, 16))  # learns outside of any tracer what runs here
    layer = Layer(ATTENDS[attend])
    recorded = RECORDERS[record](layer, x)
    out = recorded(x)
    assert torch.equal(out, layer(x))
    parameters = list((recorded if record == "export" else layer).parameters())
    gradients = torch.autograd.grad(out.float().square().sum(), parameters)
    expected = torch.autograd.grad(layer(x).float().square().sum(), list(layer.parameters()))
    for gradient, wanted in zip(gradients, expected):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "attend",
    [
        lambda x, y: flash_attn_func(x, y, y),
        lambda x, y: flash_attn_func(x, x, x),
        lambda x, y: flash_attn_jit.sdpa(x, y, y),
        lambda x, y: flash_attn_jit.flash_attn_kvpacked_func(x, torch.stack((y, y), 2)),
    ],
    ids=["q, k, k", "q, q, q", "sdpa", "kvpacked"],
)
def test_one_tensor_given_twice_in_a_compiled_call(attend, backend):
    x, y = (t.requires_grad_() for t in normal_qkv(1, 8, 8, 2, 2, 64)[:2])
    flash_attn_jit.sdpa(x, x, x)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    results = [
        torch.autograd.grad(f(x, y).float().square().sum(), (x, y), allow_unused=True) for f in (compiled, attend)
    ]
    for got, expected in zip(*results):
        assert (got is None) == (expected is None)
        if got is not None:  # the sum of the two gradients is rounded in another order
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("form", ["kvpacked", "qkvpacked"])
def test_a_packed_gradient_is_not_copied_in_a_compiled_step(form):
    recorded = []

    def remember(graph, _):
        recorded.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    inputs = {"kvpacked": ((1, 8, 2, 64), (1, 8, 2, 2, 64)), "qkvpacked": ((1, 8, 3, 2, 64),)}[form]
    tensors = [normal(*shape).requires_grad_() for shape in inputs]
    attend = getattr(flash_attn_jit, f"flash_attn_{form}_func")
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=make_boxed_compiler(remember)))
    compiled(*tensors).sum().backward()
    assert any(f"backward_{form}" in target for target in recorded)
    assert not [t for t in recorded if any(word in t for word in ("stack", "cat", "copy", "clone"))]


def count_graphs(function, calls):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for call in calls:
        # A window's kernel may be another where the compiler has it as a number of its own.
        torch.testing.assert_close(compiled(*call), function(*call), atol=1e-3, rtol=1e-3)
    return counter.frame_count


def attending_to(window):
    return lambda q, k, v, w: flash_attn_func(q, k, v, window_size=window(w))


def test_another_window_compiles_no_further_graph():
    q, k, v = normal_qkv(1, 20, 20, 1, 1, 16)
    calls = [(q, k, v, width) for width in (*range(3, 14), 2**40, 7)]
    for window in (lambda w: (w, 0), lambda w: (0, w), lambda w: [w, w]):
        graphs = count_graphs(attending_to(window), calls)
        assert graphs <= 2, graphs  # the first value is taken for a constant, the others for a variable


def test_another_max_seqlen_compiles_no_further_graph():
    q, k, v = (t[0] for t in normal_qkv(1, 20, 20, 1, 1, 16))

    def attend(q, k, v, longest):
        return flash_attn_jit.flash_attn_varlen_func(q, k, v, CU_SEQLENS, CU_SEQLENS, longest, longest)

    assert count_graphs(attend, [(q, k, v, longest) for longest in range(15, 26)]) <= 2


def of_item(qkv, cu_seqlens):
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max().item()
    return flash_attn_jit.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1)[:20], cu_seqlens, longest)


def of_tensor(qkv, cu_seqlens):
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max()
    return flash_attn_jit.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1)[:20], cu_seqlens, longest)


def of_unpadded(qkv, cu_seqlens):
    mask = torch.arange(10) < (cu_seqlens[1:3] - cu_seqlens[:2] + 1)[:, None]
    rows, indices, starts, longest, _ = flash_attn_jit.bert_padding.unpad_input(qkv, mask)
    out = flash_attn_jit.flash_attn_varlen_qkvpacked_func(rows, starts, longest)
    return flash_attn_jit.bert_padding.pad_input(out, indices, 2, 10)


def of_concatenated(qkv, cu_seqlens):
    lengths = torch.nn.functional.pad(cu_seqlens[1:3, None] - cu_seqlens[:2, None] + 1, (0, 9))
    unpad = flash_attn_jit.bert_padding.unpad_input_for_concatenated_sequences
    rows, _, starts, longest = unpad(qkv, lengths)
    return flash_attn_jit.flash_attn_varlen_qkvpacked_func(rows, starts, longest)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("attend", [of_item, of_tensor, of_unpadded, of_concatenated])
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_lengths_that_a_graph_reads_out_of_a_tensor(attend, backend):
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    qkv = normal(2, 10, 3, 2, 16).requires_grad_()
    for cu_seqlens in (CU_SEQLENS, torch.tensor([0, 2, 9, 20], dtype=torch.int32)):
        out, expected = compiled(qkv, cu_seqlens), attend(qkv, cu_seqlens)
        assert torch.equal(out, expected)
        gradients = [torch.autograd.grad(t.float().square().sum(), qkv)[0] for t in (out, expected)]
        torch.testing.assert_close(*gradients)


# ---- transforms ----

LOSSES = {
    "separate": (lambda q, k, v: flash_attn_func(q, k, v, causal=True), lambda q, k, v: (q, k, v)),
    "kvpacked": (flash_attn_jit.flash_attn_kvpacked_func, lambda q, k, v: (q, torch.stack((k, v), 2))),
    "qkvpacked": (flash_attn_jit.flash_attn_qkvpacked_func, lambda q, k, v: (torch.stack((q, k, v), 2),)),
    "sdpa": (flash_attn_jit.sdpa, lambda q, k, v: (q, k, v)),
}


@pytest.fixture(params=LOSSES)
def loss_and_inputs(request):
    attend, pack = LOSSES[request.param]
    inputs = pack(*normal_qkv(1, 8, 8, 2, 2, 16))
    flash_attn_jit.sdpa(*normal_qkv(1, 8, 8, 2, 2, 16))
    return attend, inputs


def gradients_of(attend, inputs, dout=None):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = attend(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out) if dout is None else dout)


def test_functional_gradient(loss_and_inputs):
    attend, inputs = loss_and_inputs
    gradients = torch.func.grad(lambda *t: attend(*t).sum(), tuple(range(len(inputs))))(*inputs)
    for gradient, expected in zip(gradients, gradients_of(attend, inputs)):
        assert torch.equal(gradient, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_of_output_gradients(loss_and_inputs):
    attend, inputs = loss_and_inputs
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = attend(*leaves)
    douts = normal(3, *out.shape, seed=9)
    batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    by_vmap = torch.func.vmap(lambda dout: torch.autograd.grad(out, leaves, dout, retain_graph=True))(douts)
    for i, dout in enumerate(douts):
        for expected, *results in zip(gradients_of(attend, inputs, dout), batched, by_vmap):
            for result in results:
                assert torch.equal(result[i], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacobians():
    q, k, v = normal_qkv(1, 2, 5, 1, 1, 8)
    expected = torch.autograd.functional.jacobian(lambda q: flash_attn_func(q, k, v), q)
    vectorized = torch.autograd.functional.jacobian(lambda q: flash_attn_func(q, k, v), q, vectorize=True)
    assert torch.equal(vectorized, expected)
    assert torch.equal(torch.func.jacrev(lambda q: flash_attn_func(q, k, v))(q), expected)


def test_the_function_that_vjp_gives():
    q, k, v = normal_qkv(1, 5, 5, 1, 1, 8)
    out, pull_back = torch.func.vjp(lambda q: flash_attn_func(q, k, v), q)
    dout = torch.ones_like(out)
    with pytest.raises(NotImplementedError, match=r"torch.func.vjp\(\) gives.* inside torch.no_grad\(\)"):
        pull_back(dout)
    x = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(flash_attn_func(x, k, v), x, dout)
    with torch.no_grad():
        assert torch.equal(pull_back(dout)[0], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample():
    q, k, v = normal_qkv(3, 8, 8, 2, 2, 16)
    gradient = torch.func.grad(lambda q, k, v: flash_attn_func(q[None], k[None], v[None]).sum())
    for got, *sample in zip(torch.func.vmap(gradient)(q, k, v), q, k, v):
        assert torch.equal(got, gradient(*sample))


def test_what_transforms_are_refused():
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 16)

    def loss(q):
        return flash_attn_func(q, k, v).float().square().sum()

    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).float().sum())(q)
    with pytest.raises(NotImplementedError, match=r"forward-mode .*jvp.*accepted: reverse mode"):
        torch.func.hessian(loss)(q)
    with pytest.raises(NotImplementedError, match="q carries a forward-mode tangent"):
        torch.func.jvp(loss, (q,), (q,))


@pytest.mark.parametrize("mode", ["profiler", "recorder"])
def test_gradients_of_gradients_are_refused_where_the_operators_run(mode):
    q, k, v = (t.requires_grad_() for t in normal_qkv(1, 8, 8, 1, 1, 64))
    with torch.profiler.profile() if mode == "profiler" else Recorder():
        out = flash_attn_func(q, k, v)
        with pytest.raises(NotImplementedError, match="create_graph=True"):
            torch.autograd.grad(out.sum(), q, create_graph=True)


def test_slopes_of_an_operator_that_need_a_gradient():
    slopes = torch.ones(2, requires_grad=True)
    out, _ = OP(*normal_qkv(1, 8, 8, 2, 2, 16), *NO_OPTIONS._replace(alibi_slopes=slopes))
    with pytest.raises(NotImplementedError, match="alibi_slopes requires a gradient"):
        out.sum().backward()


# ---- what counts operators ----


def counted(step, *tensors):
    with FlopCounterMode(display=False) as counter:
        step(*tensors)
    return counter.get_total_flops()


def training_step(attend):
    def step(*tensors):
        out = attend(*tensors)
        torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out))

    return step


@pytest.mark.parametrize("causal", [False, True])
def test_floating_point_operations(causal):
    """As many as torch counts for its own attention, which counts what the mask hides as well."""
    q, k, v = normal_qkv(2, 20, 30, 4, 2, 16)
    forward = 4 * 2 * 4 * 20 * 30 * 16
    wide = [t.transpose(1, 2).float() for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(F.scaled_dot_product_attention, *wide) == forward
    assert counted(lambda *t: flash_attn_func(*t, causal=causal), q, k, v) == forward
    assert counted(flash_attn_jit.flash_attn_kvpacked_func, q, torch.stack((k, v), 2)) == forward
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert counted(training_step(lambda *t: flash_attn_func(*t, causal=causal)), *leaves) == forward * 3.5
    qkv = normal(2, 20, 3, 4, 16).requires_grad_()
    flops = 14 * 2 * 4 * 20 * 20 * 16
    assert counted(training_step(flash_attn_jit.flash_attn_qkvpacked_func), qkv) == flops


def test_floating_point_operations_of_sequences():
    q, k, v = (t[0].requires_grad_() for t in normal_qkv(1, 20, 20, 2, 2, 16))

    def attend(q, k, v):
        return flash_attn_jit.flash_attn_varlen_func(q, k, v, CU_SEQLENS, CU_SEQLENS, 15, 15)

    flops = 14 * 2 * 16 * (5 * 5 + 0 + 15 * 15)
    assert counted(training_step(attend), q.detach().requires_grad_(), k, v) == flops
    meta = [t.detach().to("meta") for t in (q, k, v)]
    cu_seqlens = CU_SEQLENS.to("meta")
    longest = counted(lambda *t: flash_attn_jit.flash_attn_varlen_func(*t, cu_seqlens, cu_seqlens, 15, 15), *meta)
    assert longest == 4 * 2 * 16 * 3 * 15 * 15  # no lengths to read: each sequence may be the longest


def test_floating_point_operations_of_a_plain_call_whose_backward_pass_is_counted():
    q, k, v = (t.requires_grad_() for t in normal_qkv(1, 8, 8, 1, 1, 16))
    out = flash_attn_func(q, k, v)
    assert counted(lambda: out.sum().backward()) == 10 * 8 * 8 * 16
