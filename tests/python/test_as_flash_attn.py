"""as_flash_attn() and the distribution of packages/flash-attn: the module that programs import by flash-attn's name."""

import importlib.metadata
import inspect
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from attention_reference import check_attention, exact_gradients, normal, varlen_attention
from conftest import run_python
from test_signatures import FUNCTIONS, KVCACHE_OPTIONS, check_signature

import flash_attn_jit
from flash_attn_jit.integrations import flash_attn, flash_attn_module
from flash_attn_jit.integrations.flash_attn_module import bert_padding, flash_attn_interface

PACKAGE = Path(__file__).resolve().parents[2] / "packages" / "flash-attn"
NAMES = [*FUNCTIONS, "flash_attn_with_kvcache"]

# What other libraries ask for, of a module that is there in one of the two ways.
IS_THERE = """
import importlib.metadata, importlib.util
assert importlib.util.find_spec("flash_attn") is not None
assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == "2.8.3+jit"
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import flash_attn_gpu, _wrapped_flash_attn_backward, _wrapped_flash_attn_forward
from flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from flash_attn.bert_padding import unpad_input_for_concatenated_sequences
import flash_attn_jit
assert flash_attn_func is flash_attn.flash_attn_interface.flash_attn_func is flash_attn_jit.flash_attn_func
assert flash_attn.__version__ == "2.8.3"
for name in ("flash_attn.ops.triton.rotary", "flash_attn.layers", "flash_attn.losses", "flash_attn.modules"):
    try:
        __import__(name)
    except ImportError as error:
        part = ".".join(name.split(".")[:2])
        assert str(error).startswith(f"{part} is not there: this flash_attn is flash_attn_jit's, which has"), error
        assert "flash_attn.bert_padding, flash_attn.flash_attn_interface" in str(error)
    else:
        raise AssertionError(name)
try:
    from flash_attn import ops
except ImportError as error:
    assert "flash_attn.ops is not there" in str(error)
assert importlib.util.find_spec("flash_attn.cute") is None
assert importlib.util.find_spec("flash_attn.bert_padding") is not None
flash_attn_jit.as_flash_attn()
import flash_attn as again
assert again is flash_attn
"""


def check_runs(code, **changes):
    done = run_python(code, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_one_process():
    check_runs(
        "import importlib.util, flash_attn_jit, sys\n"
        "assert importlib.util.find_spec('flash_attn') is None\n"
        "assert 'flash_attn' not in sys.modules\n"
        "flash_attn_jit.as_flash_attn()\n"
        "finders = list(sys.meta_path)\n"
        "flash_attn_jit.as_flash_attn()\n"
        "assert sys.meta_path == finders\n" + IS_THERE
    )


def has_setuptools():
    """As its pyproject.toml wants it."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the distribution was built for and installed into."""
    folder = tmp_path_factory.mktemp("flash-attn")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    # Without network, where what builds it is here.
    options = ["--no-build-isolation"] if has_setuptools() else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *options]
    done = subprocess.run(
        [*pip, "--target", str(folder / "site"), str(source)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_distribution(installed):
    (metadata,) = installed.glob("*.dist-info")
    assert metadata.name == f"flash_attn-{flash_attn.VERSION}.dist-info"
    assert "Requires-Dist: flash-attn-jit" in (metadata / "METADATA").read_text()
    assert [path.name for path in (installed / "flash_attn").glob("*.py")] == ["__init__.py"]
    check_runs(IS_THERE, PYTHONPATH=installed)
    check_runs("import flash_attn_jit; flash_attn_jit.as_flash_attn()\n" + IS_THERE, PYTHONPATH=installed)


@pytest.mark.parametrize("kind", ["module", "folder without a module"])
def test_never_over_one_that_is_on_the_path(tmp_path, kind):
    (tmp_path / "flash_attn").mkdir()
    if kind == "module":
        (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.5.0'\n")
    text = check_runs(
        "import flash_attn_jit\n"
        "try:\n    flash_attn_jit.as_flash_attn()\nexcept RuntimeError as error:\n    print(error)\n"
        "import flash_attn\nprint(flash_attn.__path__)",
        PYTHONPATH=tmp_path,
    )
    message, path = text.splitlines()
    assert message.startswith(f"flash_attn is at {tmp_path / 'flash_attn'} (flash-attn is no distribution here)")
    assert "accepted: none" in message and "pip uninstall flash-attn" in message
    assert str(tmp_path / "flash_attn") in path


def test_never_over_one_that_is_imported(tmp_path):
    (tmp_path / "flash_attn.py").write_text("")
    text = check_runs(
        "import sys, flash_attn_jit, flash_attn as theirs\nsys.path.clear()\n"
        "try:\n    flash_attn_jit.as_flash_attn()\nexcept RuntimeError as error:\n    print(error)\n"
        "import flash_attn\nassert flash_attn is theirs",
        PYTHONPATH=tmp_path,
    )
    assert text.startswith(f"flash_attn has been imported from {tmp_path / 'flash_attn.py'}")


@pytest.mark.parametrize(
    "module", ["diffusers.utils.import_utils", "transformers.models.falcon.modeling_falcon"], ids=lambda name: name
)
def test_a_library_that_has_looked_before(module):
    text = check_runs(
        "import sys, types, flash_attn_jit\n"
        f"module = sys.modules['{module}'] = types.ModuleType('{module}')\n"
        "module.is_flash_attn_available = lambda: False\n"
        "try:\n    flash_attn_jit.as_flash_attn()\nexcept RuntimeError as error:\n    print(error)\n"
        "import importlib.util\nassert importlib.util.find_spec('flash_attn') is None"
    )
    assert "has been imported, and has found no flash_attn; accepted: as_flash_attn() before that" in text


def test_no_import_of_flash_attn_jit_brings_it():
    check_runs(
        "import importlib.util, flash_attn_jit, flash_attn_jit.integrations.flash_attn\n"
        "from flash_attn_jit.integrations import flash_attn_module\n"
        "assert importlib.util.find_spec('flash_attn') is None"
    )


@pytest.mark.parametrize("module", [flash_attn_module, flash_attn_interface], ids=lambda module: module.__name__)
def test_public_names(module):
    assert sorted(set(module.__all__) - {"__version__"}) == sorted(NAMES)
    for name, (required, options) in FUNCTIONS.items():
        check_signature(getattr(module, name), required, options)
    check_signature(module.flash_attn_with_kvcache, ["q", "k_cache", "v_cache"], KVCACHE_OPTIONS)
    assert bert_padding.__all__ == flash_attn_jit.bert_padding.__all__


OPTIONS = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes".split()
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k".split()
GRADIENTS = "dout q k v out softmax_lse dq dk dv".split()
AFTER_FORWARD = ["block_table", "leftpad_k", "seqused_k", "zero_tensors"]
PRIVATE = {
    "forward": ["q", "k", "v", *OPTIONS, "return_softmax"],
    "varlen_forward": ["q", "k", "v", *LENGTHS, *OPTIONS, "return_softmax", *AFTER_FORWARD],
    "backward": [*GRADIENTS, *OPTIONS, "deterministic", "rng_state"],
    "varlen_backward": [*GRADIENTS, *LENGTHS, *OPTIONS, "deterministic", "rng_state", "zero_tensors"],
}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_signatures(name):
    function = getattr(flash_attn_interface, f"_flash_attn_{name}")
    assert list(inspect.signature(function).parameters) == PRIVATE[name]
    assert getattr(flash_attn_interface, f"_wrapped_flash_attn_{name}") is function


# ---- The private functions


def inputs(*lead, heads_k=1):
    q, dout = normal(*lead, 2, 32, seed=1), normal(*lead, 2, 32, seed=2)
    k, v = normal(*lead, heads_k, 32, seed=3), normal(*lead, heads_k, 32, seed=4)
    return q, k, v, dout


def check_gradients(found, exact):
    for got, wanted in zip(found, exact):
        torch.testing.assert_close(got.double(), wanted, atol=1e-2, rtol=1e-2)


def room(*like, kind):
    """For gradients: contiguous, or the way one packed tensor has them."""
    if kind == "contiguous":
        return [torch.full_like(x, torch.nan) for x in like]
    packed = torch.full((*like[0].shape[:-2], sum(x.shape[-2] for x in like), 32), torch.nan, dtype=torch.float16)
    return list(packed.split([x.shape[-2] for x in like], dim=-2))


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("memory", ["contiguous", "packed"])
def test_two_passes(memory, profiled):
    with torch.profiler.profile() if profiled else nullcontext():  # which has every call go by the operators
        check_two_passes(memory)


def check_two_passes(memory):
    q, k, v, dout = inputs(2, 12)
    slopes = torch.tensor([0.1, 0.2])
    options = (0.3, True, 5, -1, 20.0, slopes)
    out, lse, s_dmask, state = flash_attn_interface._wrapped_flash_attn_forward(q, k, v, 0.0, *options, False)
    exact = {"softmax_scale": 0.3, "causal": True, "window_size": (5, -1), "softcap": 20.0, "alibi_slopes": slopes}
    check_attention(out, lse, q, k, v, **exact)
    assert s_dmask.numel() == 0 and state.shape == (2,)
    gradients = room(q, k, v, kind=memory)
    assert (
        flash_attn_interface._wrapped_flash_attn_backward(
            dout, q, k, v, out, lse, *gradients, 0.0, *options, False, rng_state=state
        )
        is None
    )
    check_gradients(gradients, exact_gradients(q, k, v, dout, **exact))


def test_two_passes_with_dropout():
    q, k, v, dout = inputs(1, 16, heads_k=2)
    options = (0.5, 0.3, True, -1, -1, 0.0, None)
    torch.manual_seed(0)
    out, lse, s_dmask, state = flash_attn_interface._flash_attn_forward(q, k, v, *options, True)
    again = flash_attn_interface._flash_attn_forward(q, k, v, *options, True)
    assert not torch.equal(out, again[0]) and not torch.equal(state, again[3])
    kept = (s_dmask > 0).double() * 2
    assert 0.2 < (s_dmask < 0).sum() / s_dmask.count_nonzero() < 0.8
    exact = {"softmax_scale": 0.3, "causal": True, "kept": kept}
    check_attention(out, lse, q, k, v, **exact)
    gradients = room(q, k, v, kind="contiguous")
    flash_attn_interface._flash_attn_backward(dout, q, k, v, out, lse, *gradients, *options, False, state)
    check_gradients(gradients, exact_gradients(q, k, v, dout, **exact))
    with pytest.raises(ValueError, match="rng_state is None with dropout_p; accepted: what the forward pass returned"):
        flash_attn_interface._flash_attn_backward(dout, q, k, v, out, lse, *gradients, *options, False)


def test_the_compiled_module():
    """In the order of arguments in which xformers calls it."""
    gpu = flash_attn_interface.flash_attn_gpu
    q, k, v, dout = inputs(2, 12)
    into = torch.empty_like(q)
    out, lse, _, state = gpu.fwd(q, k, v, into, None, 0.0, 0.3, True, -1, 0, 0.0, False, None)
    exact = {"softmax_scale": 0.3, "causal": True}
    assert out is into
    check_attention(out, lse, q, k, v, **exact)
    gradients = room(q, k, v, kind="contiguous")
    gpu.bwd(dout, q, k, v, out, lse, *gradients, None, 0.0, 0.3, True, -1, 0, 0.0, False, None, state)
    check_gradients(gradients, exact_gradients(q, k, v, dout, **exact))
    with pytest.raises(ValueError, match="generator is given; accepted: None"):
        gpu.fwd(q, k, v, None, None, 0.0, 0.3, True, -1, 0, 0.0, False, torch.Generator())


def test_the_compiled_module_with_sequences():
    gpu = flash_attn_interface.flash_attn_gpu
    q, k, v, dout = inputs(20, heads_k=2)
    lengths = torch.tensor([0, 7, 20], dtype=torch.int32)
    out, lse, _, state = gpu.varlen_fwd(
        *(q, k, v, None, lengths, lengths, None, None, None, None, 13, 13, 0.0, 0.3, False, False, 4, 4, 0.0),
        *(False, None),
    )
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = varlen_attention(*leaves, lengths, lengths, softmax_scale=0.3, window_size=(4, 4))
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=1e-5)
    gradients = room(q, k, v, kind="packed")
    gpu.varlen_bwd(
        *(dout, q, k, v, out, lse, *gradients, lengths, lengths, None, 13, 13, 0.0, 0.3, False, False, 4, 4, 0.0),
        *(False, None, state),
    )
    check_gradients(gradients, torch.autograd.grad(expected, leaves, dout.double()))


def test_sequences_of_pages():
    q, pages_k, pages_v = normal(3, 2, 32, seed=1), normal(4, 16, 1, 32, seed=2), normal(4, 16, 1, 32, seed=3)
    starts, used = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([20, 9], dtype=torch.int32)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    out, *_ = flash_attn_interface._wrapped_flash_attn_varlen_forward(
        *(q, pages_k, pages_v, starts, torch.tensor([0, 20, 29], dtype=torch.int32), 2, 20, 0.0, 0.3, True),
        block_table=table,
        seqused_k=used,
    )
    expected = flash_attn_jit.flash_attn_varlen_func(
        *(q, pages_k, pages_v, starts, None, 2, 20), block_table=table, seqused_k=used, softmax_scale=0.3, causal=True
    )
    assert torch.equal(out, expected)


def test_gradients_that_do_not_fit_are_refused():
    q, k, v, dout = inputs(1, 8)
    out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)
    short = torch.empty(1, 7, 2, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match="dq has shape"):
        flash_attn_interface._flash_attn_backward(
            dout, q, k, v, out, lse, short, k.clone(), v.clone(), 0.0, 0.3, False, -1, -1, 0.0, None, False
        )


def test_the_version_stands_in_one_file_and_in_the_distribution():
    assert f'version = "{flash_attn.VERSION}"' in (PACKAGE / "pyproject.toml").read_text().splitlines()
    assert flash_attn.VERSION.startswith(flash_attn_module.__version__ + "+")
    version = pytest.importorskip("packaging.version").parse(flash_attn.VERSION)
    for least in ("2.3.3", "2.6.3", "2.7.1"):
        assert version >= type(version)(least)
    assert version <= type(version)("2.8.4")
