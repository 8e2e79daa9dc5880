"""route_sdpa() in the whole process: threads, checkpointing, callers in C++, tracers, and what it leaves behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from attention_reference import normal
from conftest import needs_torch, needs_traced_function_modes, run_python
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import route_sdpa

Q, K, V = (normal(1, 2, 8, 16, seed=seed) for seed in (1, 2, 3))
ONE = {"flash_attn_jit": 1, "torch": 0}
NONE = {"flash_attn_jit": 0, "torch": 0}


@pytest.fixture(autouse=True, params=["get_kernel", "torch before 2.9"])
def way_back_to_torch(request, monkeypatch):
    if request.param == "get_kernel":
        needs_torch("2.9", "torch.library has get_kernel()")
    else:
        monkeypatch.delattr(torch.library, "get_kernel", raising=False)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def attend(q=Q, k=K, v=V, **arguments):
    return F.scaled_dot_product_attention(q, k, v, **arguments)


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def state_of_torch():
    checkpoints = torch.utils.checkpoint
    return (
        torch._C._dispatch_dump_table("aten::scaled_dot_product_attention"),
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._len_torch_function_stack(),
        checkpoints.CheckpointFunction.forward,
        checkpoints.CheckpointFunction.backward,
        checkpoints._CheckpointFrame.__init__,
        checkpoints._checkpoint_hook.__enter__,
        checkpoints._checkpoint_hook.__exit__,
        checkpoints._recomputation_hook.__enter__,
        checkpoints._recomputation_hook.__exit__,
    )


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    before = state_of_torch()
    yield
    assert state_of_torch() == before


# ---- Threads


def test_another_threads_calls():
    with route_sdpa() as router:
        out = in_a_thread(attend)
        in_a_thread(attend, Q.float(), K.float(), V.float())
    assert router.counts == {"flash_attn_jit": 1, "torch": 1}
    torch.testing.assert_close(out, attend(), atol=2e-3, rtol=2e-3)
    in_a_thread(attend)
    assert router.counts == {"flash_attn_jit": 1, "torch": 1}


def test_many_threads_are_counted_whole():
    with route_sdpa() as router, ThreadPoolExecutor(8) as pool:
        empty = torch.empty(1, 2, 0, 16, dtype=torch.float16)
        list(pool.map(lambda _: [attend(empty, empty, empty) for _ in range(50)], range(16)))
    assert router.counts == {"flash_attn_jit": 800, "torch": 0}


def test_a_call_is_counted_by_the_router_that_its_thread_entered_last():
    inner_is_on, may_end = threading.Event(), threading.Event()

    def other():
        with route_sdpa() as router:
            attend()
            inner_is_on.set()
            assert may_end.wait(60)
            attend()
        return router.counts

    with ThreadPoolExecutor(2) as pool, route_sdpa() as outer:
        counts = pool.submit(other)
        assert inner_is_on.wait(60)
        attend()
        with route_sdpa() as nested:
            attend()
            attend(Q.float(), K.float(), V.float())
        may_end.set()
        assert counts.result() == {"flash_attn_jit": 2, "torch": 0}
    assert outer.counts == ONE and nested.counts == {"flash_attn_jit": 1, "torch": 1}


def test_one_router_entered_twice_and_by_two_threads():
    router = route_sdpa()

    def use():
        with router, router:
            attend()
        attend()  # the other thread's is still on

    with router:
        in_a_thread(use)
        attend()
    attend()
    assert router.counts == {"flash_attn_jit": 3, "torch": 0}


def test_left_in_another_order():
    first, second = route_sdpa(), route_sdpa()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    attend()
    second.__exit__(None, None, None)
    attend()
    assert first.counts == NONE and second.counts == ONE


def test_left_below_another_function_mode():
    router, other = route_sdpa(), BaseTorchFunctionMode()
    router.__enter__()
    with other:
        router.__exit__(None, None, None)
        assert torch.overrides._get_current_function_mode() is other
        attend()
    assert router.counts == NONE


def test_left_by_another_thread():
    needs_traced_function_modes()

    def compiled_targets():
        targets = []
        torch.compiler.reset()

        def backend(graph, _):
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch.compile(attend, backend=backend, fullgraph=True)(Q, K, V)
        return targets

    router = route_sdpa()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(router.__enter__).result()
        assert "flash_attn_jit.forward.default" in pool.submit(compiled_targets).result()
        router.__exit__(None, None, None)
        pool.submit(attend).result()
        assert "flash_attn_jit.forward.default" not in pool.submit(compiled_targets).result()
        with route_sdpa() as later:
            pool.submit(attend).result()
        assert router.counts == NONE and later.counts == ONE


def test_left_though_not_entered():
    router = route_sdpa()
    with router:
        pass
    with pytest.raises(RuntimeError, match="was not entered, or was left before"):
        router.__exit__(None, None, None)


def test_an_error_inside_ends_it():
    router = route_sdpa()
    with pytest.raises(KeyError), router:
        raise KeyError
    attend()
    assert router.counts == NONE


# ---- Checkpointing


def layer(x):
    x = torch.tanh(x)
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def gradient_of(x, use_reentrant, function=layer):
    x = x.detach().requires_grad_()
    return x, checkpoint(function, x, use_reentrant=use_reentrant).float().square().sum()


def routed_gradient(function=layer):
    x = Q.detach().requires_grad_()
    with route_sdpa():
        function(x).float().square().sum().backward()
    return x.grad


def backward(loss, where):
    if where == "thread":
        in_a_thread(loss.backward)
    elif where == "autograd.grad":
        torch.autograd.backward([loss])
    else:
        loss.backward()


def only_attention(x):  # its recomputation is stopped inside of the call, by an exception
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside", "autograd.grad", "thread"])
@pytest.mark.parametrize("function", [layer, only_attention])
def test_checkpointing(function, where, use_reentrant):
    with route_sdpa() as router:
        x, loss = gradient_of(Q, use_reentrant, function)
        if where != "outside":
            backward(loss, where)
    if where == "outside":
        loss.backward()
    assert torch.equal(x.grad, routed_gradient(function))
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_inside_checkpoints(use_reentrant):
    def nested(x):
        x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    with route_sdpa() as router:
        x, loss = gradient_of(Q, use_reentrant, nested)
    loss.backward()
    assert torch.equal(x.grad, routed_gradient(lambda x: layer(layer(x))))
    assert router.counts["flash_attn_jit"] >= 4 and router.counts["torch"] == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_ran_outside_is_recomputed_by_torch(use_reentrant):
    def nested(x):
        return checkpoint(layer, layer(x), use_reentrant=use_reentrant)

    for function in (layer, nested):
        x, loss = gradient_of(Q, use_reentrant, function)
        expected, its_loss = gradient_of(Q, use_reentrant, function)
        its_loss.backward()
        with route_sdpa() as router:
            loss.backward()
            attend()
        assert torch.equal(x.grad, expected.grad) and router.counts == ONE


def test_under_autocast():
    x = Q.float().requires_grad_()
    with route_sdpa() as router, torch.autocast("cpu", dtype=torch.float16):
        loss = checkpoint(layer, x, use_reentrant=False).float().sum()
    loss.backward()
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


def test_a_profiler_may_see_one_pass_alone():
    for passes in ([True, False], [False, True]):
        with route_sdpa():
            with torch.autograd.profiler.profile(enabled=passes[0]):
                x, loss = gradient_of(Q, False)
            with torch.autograd.profiler.profile(enabled=passes[1]):
                loss.backward()
        torch.testing.assert_close(x.grad, routed_gradient(), atol=2e-3, rtol=2e-3)


def test_a_backward_pass_to_come_routes_nothing_else():
    with route_sdpa() as router:
        _, loss = gradient_of(Q, False)
    attend()
    in_a_thread(attend)
    assert router.counts == ONE
    loss.backward()
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_with_a_router_of_its_own(use_reentrant):
    own = route_sdpa()

    def routing(x):
        with own:
            return layer(x)

    x, loss = gradient_of(Q, use_reentrant, routing)
    with route_sdpa() as other:
        loss.backward()
        attend()
    assert torch.equal(x.grad, routed_gradient())
    assert own.counts == {"flash_attn_jit": 2, "torch": 0} and other.counts == ONE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_router_that_another_thread_leaves_during_a_forward_pass(use_reentrant):
    router, is_first = route_sdpa(), [True]

    def interrupted(x):
        x = layer(x)
        if is_first.pop() if is_first else False:
            in_a_thread(router.__exit__, None, None, None)
        return layer(x)

    in_a_thread(router.__enter__)
    x, loss = gradient_of(Q, use_reentrant, interrupted)
    loss.backward()
    assert torch.equal(x.grad, routed_gradient(lambda x: layer(layer(x))))
    assert router.counts == {"flash_attn_jit": 4, "torch": 0}


def test_a_recomputation_that_fails():
    class Stop(Exception):
        pass

    passes = []

    def failing(x):
        passes.append(0)
        if len(passes) == 2:
            raise Stop
        return layer(x)

    with route_sdpa() as router:
        _, loss = gradient_of(Q, False, failing)
        with pytest.raises(Stop):
            loss.backward()
        attend()
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


# ---- Callers and tensors of every kind, met by the operator's kernel alone: in a thread that has no function mode


def to_script(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def scripted_call(q, k, v):
    return torch.jit.script(to_script)(q, k, v)


def under_autocast(q, k, v):
    with torch.autocast("cpu", dtype=torch.float16):
        return attend(q.float(), k.float(), v.float())


def in_inference_mode(q, k, v):
    with torch.inference_mode():
        return attend(q.clone(), k.clone(), v.clone())


def without_gradients(q, k, v):
    with torch.no_grad():
        return attend(q.requires_grad_(), k, v)


def of_parameters(q, k, v):
    return attend(*(torch.nn.Parameter(t) for t in (q, k, v)))


@pytest.mark.parametrize("call", [scripted_call, under_autocast, in_inference_mode, without_gradients, of_parameters])
def test_routed_calls(call):
    expected = attend(Q, K, V)
    with route_sdpa() as router:
        out = in_a_thread(call, *(t.clone() for t in (Q, K, V)))
    assert router.counts == ONE
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


class Subclass(torch.Tensor):
    pass


def gradient_by_a_transform(q, k, v):
    return torch.func.grad(lambda q: attend(q.float(), k.float(), v.float()).sum())(q)


def with_nothing_kept(q, k, v):
    q.requires_grad_()
    out = attend(q, k, v, dropout_p=1.0)
    return torch.autograd.grad(out.float().sum(), q)[0]


def in_forward_mode(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), forward_ad.dual_level():
        out = attend(forward_ad.make_dual(q.float(), k.float()), k.float(), v.float())
        return forward_ad.unpack_dual(out).tangent


def of_a_subclass(q, k, v):
    return attend(q.as_subclass(Subclass), k, v)


def of_nested_tensors(q, k, v):
    with torch.inference_mode():
        return attend(*(torch.nested.nested_tensor([t[0].float()]) for t in (q, k, v))).to_padded_tensor(0.0)


@pytest.mark.parametrize(
    "call, reason",
    [
        (gradient_by_a_transform, "transform"),
        (with_nothing_kept, "dropout_p"),
        (in_forward_mode, "forward-mode"),
        (of_a_subclass, "query is a Subclass"),
        (of_nested_tensors, "query is a nested tensor"),
    ],
)
def test_calls_that_pytorch_runs(call, reason):
    arguments = [t.clone() for t in (Q, K, V)]
    torch.manual_seed(0)
    expected = call(*arguments)
    torch.manual_seed(0)
    with route_sdpa() as router:
        out = in_a_thread(call, *arguments)
    assert router.counts == {"flash_attn_jit": 0, "torch": 1}
    assert reason in str(router) and type(out) is type(expected)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_vmap_is_pytorchs():
    expected = torch.vmap(attend)(Q[None], K[None], V[None])
    with route_sdpa() as router:
        out = in_a_thread(torch.vmap(attend), Q[None], K[None], V[None])
    assert torch.equal(out, expected) and router.counts["flash_attn_jit"] == 0


def test_errors_come_through_as_they_are():
    with route_sdpa():
        with pytest.raises(RuntimeError, match="Expected size"):
            in_a_thread(attend, Q, K[..., :9], V)
        q = Q.clone().requires_grad_()
        out = in_a_thread(attend, q, K, V)
        with pytest.raises(NotImplementedError, match="create_graph=True"):
            torch.autograd.grad(out.float().sum(), q, create_graph=True)


@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_layer_in_another_thread(train):
    layer = torch.nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True).half().train(train)
    x = normal(2, 8, 32)

    def run():
        with torch.set_grad_enabled(train):
            return layer(x)

    expected = run()
    with route_sdpa() as router:
        out = in_a_thread(run)
    assert router.counts == ONE
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:Warning only once")
def test_somebody_elses_kernel_is_what_falls_back_and_what_is_left():
    if not hasattr(torch.library, "get_kernel"):
        pytest.skip("such a torch cannot be asked for a kernel")
    theirs = []

    def kernel(*arguments, **options):
        theirs.append(arguments)
        return torch.ops.aten.scaled_dot_product_attention.default.decompose(*arguments, **options)

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", kernel, "AutogradCPU")
    with route_sdpa() as router:
        attend()
        attend(Q.float(), K.float(), V.float())
    assert router.counts == {"flash_attn_jit": 1, "torch": 1} and len(theirs) == 1
    attend()
    assert len(theirs) == 2
    del library


def test_where_torch_lets_nobody_replace_a_kernel_twice_it_is_said_and_nothing_stays(monkeypatch):
    register, keys = torch.library.Library.impl, []

    def impl(self, name, function, key, **options):
        keys.append(key)
        if len(keys) == 2:
            raise RuntimeError("This is not allowed")
        options.pop("allow_override", None)
        return register(self, name, function, key, **options)

    monkeypatch.setattr(torch.library.Library, "impl", impl)
    with pytest.raises(RuntimeError, match=r"route_sdpa\(\) cannot route.*torch says: This is not allowed"):
        route_sdpa().__enter__()
    monkeypatch.undo()
    with route_sdpa() as router:
        attend()
    assert router.counts == ONE


# ---- Tracers


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


def targets_of(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def attend_all(q, k, v):  # make_fx() wants a function without defaults and keywords
    return attend(q, k, v)


def test_make_fx():
    with route_sdpa() as router:
        traced = make_fx(attend_all)(Q, K, V)
    assert "flash_attn_jit.forward.default" in targets_of(traced.graph) and router.counts == ONE
    torch.testing.assert_close(traced(K, Q, V), attend(K, Q, V), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx_with_fake_tensors(mode):
    with route_sdpa() as router:
        traced = make_fx(attend_all, tracing_mode=mode)(Q, K, V)
    assert not any("flash_attn_jit" in target for target in targets_of(traced.graph))
    assert router.counts == NONE
    assert torch.equal(traced(K, Q, V), attend(K, Q, V))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_pytorchs(strict):
    with route_sdpa():
        program = torch.export.export(Attend(), (Q, K, V), strict=strict)
    assert targets_of(program.graph) == ["aten.scaled_dot_product_attention.default"]
    assert torch.equal(program.module()(K, Q, V), attend(K, Q, V))


def test_a_jit_trace_keeps_sdpa_and_is_routed_where_it_runs():
    with route_sdpa():
        traced = torch.jit.trace(Attend(), (Q, K, V), check_trace=False)
        with route_sdpa() as router:
            out = traced(K, Q, V)
    assert "aten::scaled_dot_product_attention" in str(traced.graph) and router.counts == ONE
    torch.testing.assert_close(out, attend(K, Q, V), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("where", ["this thread", "another"])
def test_a_compiled_checkpoint(where):
    x = Q.clone().requires_grad_()
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")

    def step():
        compiled(x).float().square().sum().backward()

    with route_sdpa() as router:
        step() if where == "this thread" else in_a_thread(step)
    torch.testing.assert_close(x.grad, routed_gradient(), atol=5e-3, rtol=5e-3)
    assert router.counts == NONE


def test_a_router_inside_of_a_compiled_function():
    needs_traced_function_modes()
    targets = []

    def backend(graph, _):
        targets.extend(targets_of(graph.graph))
        return graph.forward

    def function(q, k, v):
        with route_sdpa():
            return attend(q, k, v) * 2

    expected = attend() * 2
    for _ in range(2):
        out = torch.compile(function, backend=backend)(Q, K, V)
        torch.testing.assert_close(out, expected, atol=4e-3, rtol=4e-3)
    assert "flash_attn_jit.forward.default" in targets


# ---- Processes of their own

SETUP = """
import sys, threading, torch, torch.nn.functional as F
from flash_attn_jit import route_sdpa, sdpa
if {hidden} and hasattr(torch.library, "get_kernel"): del torch.library.get_kernel
q = torch.randn(1, 2, 8, 16, dtype=torch.float16)
"""


@pytest.fixture
def run_alone(way_back_to_torch):
    def run(code, **changes):
        setup = SETUP.format(hidden=not hasattr(torch.library, "get_kernel"))
        done = run_python(setup + code, **changes)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def test_nothing_is_printed(run_alone):
    before = run_alone("")
    assert before == run_alone(
        """
for _ in range(3):
    with route_sdpa(), route_sdpa() as router:
        F.scaled_dot_product_attention(q, q, q)
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(q, q, q))
        thread.start(), thread.join()
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}
"""
    )


def test_cuda_is_not_touched_and_the_compiler_not_imported(run_alone):
    run_alone(
        """
def refuse(*_):
    raise AssertionError("CUDA was asked")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = torch.cuda.init = refuse
torch.cuda._lazy_init = refuse
with route_sdpa() as router:
    F.scaled_dot_product_attention(q, q, q)
sdpa(q, q, q)
assert router.counts == {"flash_attn_jit": 1, "torch": 0}
assert "torch._dynamo" not in sys.modules
"""
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_default_dtype(run_alone, dtype):
    run_alone(
        f"""
torch.set_default_dtype(torch.{dtype})
with route_sdpa() as router:
    F.scaled_dot_product_attention(q, q, q)
assert router.counts == {{"flash_attn_jit": 1, "torch": 0}}, router
sdpa(q, q, q)
"""
    )


def test_exit_with_a_backward_pass_to_come(run_alone):
    before = run_alone("")
    assert before == run_alone(
        """
from torch.utils.checkpoint import checkpoint
with route_sdpa():
    out = checkpoint(lambda q: F.scaled_dot_product_attention(q, q, q), q.requires_grad_(), use_reentrant=False)
route_sdpa().__enter__()
"""
    )
