"""The check of a GPU, as far as it goes without one: small problems in the interpreter, what it makes of answers."""

import json
import math
import stat
from dataclasses import replace

import pytest
import torch
from attention_reference import attention, exact_gradients, normal
from conftest import needs_torch, run_module

import flash_attn_jit
from flash_attn_jit._reference import Scores, exact_attention, summed_bias
from flash_attn_jit.bench import prediction
from flash_attn_jit.bench.problem import BACKWARD, FORWARD, Problem
from flash_attn_jit.check import __main__ as check, cache, card, cases, speed
from flash_attn_jit.check.cache import CacheCase


@pytest.mark.parametrize(
    ("scores", "options"),
    [
        (Scores(), {}),
        (Scores(causal=True), {"causal": True}),
        (Scores(window=(5, 3)), {"window_size": (5, 3)}),
        (Scores(causal=True, window=(7, -1)), {"causal": True, "window_size": (7, -1)}),
        (Scores(softcap=3.0), {"softcap": 3.0}),
        (Scores(causal=True, alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0])), {"causal": True}),
        (Scores(causal=True, s_aux=torch.tensor([0.5, -1.0, 2.0, 0.0])), {"causal": True}),
    ],
)
def test_the_reference_is_that_of_the_tests(scores, options):
    """Two ways to write attention and its gradients agree in float64."""
    if scores.alibi_slopes is not None:
        options = {**options, "alibi_slopes": scores.alibi_slopes[None]}
    if scores.s_aux is not None:
        options = {**options, "s_aux": scores.s_aux.double().requires_grad_()}
    q, dout = (normal(1, 19, 4, 24, seed=seed) for seed in (1, 4))
    k, v = (normal(1, 23, 2, 24, seed=seed) for seed in (2, 3))
    found = exact_attention(q[0], k[0], v[0], dout[0], scores)
    found.pop("dbias")  # below
    out = attention(q, k, v, **options)[0]
    expected = {"out": out[0]}
    for name, gradient in zip(("dq", "dk", "dv"), exact_gradients(q, k, v, dout, **options)):
        expected[name] = gradient[0]
    if scores.s_aux is not None:
        (expected["ds_aux"],) = torch.autograd.grad(out, options["s_aux"], dout.double())
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        torch.testing.assert_close(found[name].value, exact.detach().double(), atol=1e-10, rtol=1e-10)
        assert found[name].allowed.shape == exact.shape and (found[name].allowed > 0).all()


@pytest.mark.parametrize("shape", [(2, 4, 19, 23), (1, 4, 19, 23), (2, 1, 1, 23)], ids=str)
def test_the_reference_of_a_bias_is_that_of_the_tests(shape):
    q, dout = (normal(2, 19, 4, 24, seed=seed) for seed in (1, 4))
    k, v = (normal(2, 23, 2, 24, seed=seed) for seed in (2, 3))
    bias = normal(*shape, seed=5).double().requires_grad_()
    out = attention(q, k, v, causal=True, softcap=3.0, attn_bias=bias)[0]
    (expected,) = torch.autograd.grad(out, bias, dout.double())
    scores = [Scores(causal=True, softcap=3.0, bias=bias.detach()[b % shape[0]]) for b in range(2)]
    sequences = [exact_attention(q[b], k[b], v[b], dout[b], scores[b])["dbias"] for b in range(2)]
    found = summed_bias(sequences, bias)
    torch.testing.assert_close(found.value, expected, atol=1e-10, rtol=1e-10)
    assert found.allowed.shape == shape and (found.allowed > 0).all()


def test_a_query_without_keys_has_no_output():
    q, dout = (normal(5, 1, 8, seed=seed) for seed in (1, 4))
    k, v = (normal(2, 1, 8, seed=seed) for seed in (2, 3))
    found = exact_attention(q, k, v, dout, Scores(causal=True))
    assert (found["out"].value[:3] == 0).all() and all(exact.value.isfinite().all() for exact in found.values())


@pytest.mark.parametrize(
    ("name", "head_dim", "kernel"),
    [("few keys", 64, "bwd_all_keys"), ("full", 64, "bwd_dq"), ("full", 512, "fwd_wide")],
)
def test_every_way_is_checked(name, head_dim, kernel):
    case = next(case for case in cases.cases() if case.name == name and case.head_dim == head_dim)
    assert cases.check(case, "cpu")["right"]
    assert kernel in flash_attn_jit.interpreter_report().kernel


def test_functions_of_a_user_are_checked():
    needs_torch("2.5", "there is flex_attention, and create_block_mask()")
    case = next(case for case in cases.small_cases() if getattr(case, "of_user", False))
    inputs = cases._inputs(case, "cpu")
    results = cases._run(case, inputs, "cpu")
    assert "userscore" in flash_attn_jit.interpreter_report().kernel
    assert cases.compare(case, results, inputs)["right"]
    for change in ({"softcap": 0.0}, {"causal": False}):
        assert not cases.compare(replace(case, **change), results, inputs)["right"]


CASE = cases.Case("causal", head_dim=32, causal=True).small()


def exact_results(case):
    inputs = cases._inputs(case, "cpu")
    q, k, v, dout = (inputs[name][0] for name in ("q", "k", "v", "dout"))
    exact = exact_attention(q, k, v, dout, Scores(case.causal))
    del exact["dbias"]
    return inputs, {name: each.value[None].half() for name, each in exact.items()}, exact


def test_right_results_are_right():
    inputs, results, _ = exact_results(CASE)
    assert cases.compare(CASE, results, inputs)["right"]


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("change", [math.nan, "twice what is allowed"])
def test_one_wrong_element_is_found(name, change):
    inputs, results, exact = exact_results(CASE)
    wrong = exact[name].value[None].clone()
    wrong[0, 3, 0, 5] += change if isinstance(change, float) else 2 * exact[name].allowed[3, 0, 5]
    compared = cases.compare(CASE, {**results, name: wrong}, inputs)
    assert not compared["right"]
    assert [each for each, found in compared["tensors"].items() if not found["share_of_allowed"] <= 1] == [name]


def test_one_wrong_element_of_a_biass_gradient_is_found():
    case = next(case for case in cases.small_cases() if case.name == "float16 bias, softcap")
    inputs = cases._inputs(case, "cpu")
    results = cases._run(case, inputs, "cpu")
    assert cases.compare(case, results, inputs)["right"]
    results["dbias"][0, 1, 5, 7] += 0.02
    compared = cases.compare(case, results, inputs)["tensors"]
    assert [name for name, found in compared.items() if not found["share_of_allowed"] <= 1] == ["dbias"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("factor", [0.95, 1.05, math.nan])
def test_a_wrong_gradient_of_sinks_is_found(batch, factor):
    case = replace(next(case for case in cases.small_cases() if getattr(case, "sinks", False)), batch=batch)
    inputs = cases._inputs(case, "cpu")
    results = cases._run(case, inputs, "cpu")
    compared = cases.compare(case, results, inputs)
    assert compared["right"] and list(compared["tensors"]) == ["out", "dq", "dk", "dv", "ds_aux"]
    results["ds_aux"] *= factor
    compared = cases.compare(case, results, inputs)
    assert [name for name, found in compared["tensors"].items() if not found["share_of_allowed"] <= 1] == ["ds_aux"]


def test_a_pair_that_is_dropped_wrongly_is_found():
    case = next(case for case in cases.small_cases() if getattr(case, "dropout", 0.0))
    inputs = cases._inputs(case, "cpu")
    results = cases._run(case, inputs, "cpu")
    assert cases.compare(case, results, inputs)["right"]
    first = results["s_dmask"][0, 0, :, 0]
    first[first > 0] *= -1
    assert not cases.compare(case, results, inputs)["right"]


CACHE = CacheCase("cache", head_dim=32, heads_k=2, queries=3, page_size=5, used=(41, 0, 7))


def test_a_case_of_a_cache_is_right():
    report = cases.check(CACHE, "cpu")
    assert report["right"] and list(report["tensors"]) == ["out", "k_cache", "v_cache"]
    assert 0 < report["tensors"]["out"]["share_of_allowed"] < 1
    inputs = cache.inputs_of(CACHE, "cpu")
    new_rows = (cache.run(inputs)["v_cache"] != inputs.v_cache).any(-1).all(-1)
    assert new_rows.sum() == 3 * 3 and CACHE.small().used == (2, 0, 0)


@pytest.mark.parametrize("name", ["out", "k_cache", "v_cache"])
@pytest.mark.parametrize("change", [math.nan, 0.02])
def test_one_wrong_element_of_a_cache_is_found(name, change, monkeypatch):
    """In the first sequence's last key, or its first query."""
    run = cache.run

    def wrong(inputs):
        results = run(inputs)
        page, row = (0, 0) if name == "out" else (inputs.table[0, 43 // 5], 43 % 5)
        results[name][page, row, 1, 5] += change
        return results

    monkeypatch.setattr(cache, "run", wrong)
    report = cases.check(CACHE, "cpu")
    assert not report["right"] and not report["tensors"][name]["share_of_allowed"] <= 1


@pytest.mark.parametrize("mask", cases._MASKS)
def test_a_mask_that_was_not_read_is_found(mask):
    case = next(case for case in cases.small_cases() if getattr(case, "mask", "") == mask)
    inputs = cases._inputs(case, "cpu")
    results = cases._run(case, inputs, "cpu")
    assert cases.compare(case, results, inputs)["right"]
    assert not cases.compare(replace(case, mask=""), results, inputs)["right"]


def test_every_family_is_among_the_cases():
    of_caches = [case for case in cases.cases() if isinstance(case, CacheCase)]
    assert {case.page_size % 16 == 0 for case in of_caches} == {True, False}
    assert {case.queries == 1 for case in of_caches} == {True, False}
    found = [case for case in cases.cases() if isinstance(case, cases.Case)]
    for has in (
        lambda case: not case.causal and case.window == (-1, -1),
        lambda case: case.causal,
        lambda case: case.window != (-1, -1),
        lambda case: case.softcap,
        lambda case: case.alibi,
        lambda case: case.sinks,
        lambda case: case.dropout,
        lambda case: case.is_varlen and 0 in case.seqlens_q,
        lambda case: case.heads_k < case.heads,
        lambda case: not case.aligned,
        lambda case: case.dtype is torch.bfloat16,
        *(lambda case, mask=mask: case.mask == mask for mask in cases._MASKS),
        lambda case: case.head_dim % 8,
        lambda case: 128 < case.head_dim <= 256,
        lambda case: case.head_dim > 256,
        lambda case: case.head_dim_v,
    ):
        assert any(has(case) for case in found)
    small = cases.small_cases()
    assert len(small) >= 23 and {case.name for case in small} >= {case.name for case in found if case.head_dim == 128}
    assert all(sum(case.used if isinstance(case, CacheCase) else case.seqlens_q) < 200 for case in small)


def test_the_check_in_the_interpreter(tmp_path):
    """As many cases as fit into some seconds; the rest is said not to be reached."""
    done = run_module(
        "check", "--seconds", "1", "--json", tmp_path / "c.json", cwd=tmp_path, FLASH_ATTN_JIT_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["format"] == "flash-attn-jit check" and report["device"] == "the interpreter"
    assert report["environment"]["package"]["version"] and "speeds" not in report
    first, *_ = report["cases"]
    assert first["right"] and 0 < first["tensors"]["dv"]["share_of_allowed"] < 1
    assert report["cases"][-1] == {"case": "cache, pages of 5", "head_dim": 64, "skipped": check._NOT_REACHED}
    assert "not reached" in done.stdout and str(tmp_path / "c.json") in done.stdout


@pytest.fixture
def interpreted(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "_device", lambda: "cpu")
    monkeypatch.setattr(cases, "small_cases", lambda: [CASE])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "check.json"


def test_a_wrong_result_is_exit_code_1(interpreted, monkeypatch, capsys):
    _, results, _ = exact_results(CASE)
    monkeypatch.setattr(cases, "_run", lambda *_: {**results, "dq": results["dq"] + 1})
    with pytest.raises(SystemExit) as stopped:
        check.main([])
    assert stopped.value.code == 1
    assert "WRONG: 1 of 1 cases (head dim 32, causal)" in capsys.readouterr().out
    assert json.loads(interpreted.read_text())["cases"][0]["right"] is False


def test_an_exception_is_a_wrong_result(interpreted, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(cases, "_run", fail)
    with pytest.raises(SystemExit):
        check.main([])
    assert "WRONG  head dim  32  causal                   RuntimeError: no kernel\n" in capsys.readouterr().out
    assert json.loads(interpreted.read_text())["cases"][0]["error"] == "RuntimeError: no kernel\nand more"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seconds", "0"], "--seconds is 0.0; accepted"),
        (["--json", "no/c.json"], "--json is no/c.json: there is no folder"),
    ],
)
def test_bad_calls(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        check.main(arguments)
    assert complaint in capsys.readouterr().err


def test_lines_of_nvidia_smi():
    assert card.parse(card._FIELDS, "1350, 69.8, 61, 0x0000000000000024\n") == {
        "clock_mhz": 1350.0,
        "power_watts": 69.8,
        "temperature_celsius": 61.0,
        "throttled_by": ["sw_power_cap", "sw_thermal_slowdown"],
    }
    assert card.parse(card._FIELDS, "1350, [N/A], 61, [N/A]")["power_watts"] is None
    assert card.parse(card._FIELDS, "Unable to determine the device handle") is None


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_card_is_watched_while_it_works(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", 'while true; do echo "1350, 69.8, 61, 0x4"; sleep 0.01; done')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with card.Watch("0") as watch:
        while watch.since(0)["samples"] < 3:
            pass
    found = watch.since(0)
    assert found["clock_mhz"] == 1350 and found["throttled_by"] == ["sw_power_cap"]
    assert watch.since(math.inf) == {
        "samples": 0,
        "clock_mhz": None,
        "power_watts": None,
        "temperature_celsius": None,
        "throttled_by": [],
    }


def test_without_nvidia_smi_nothing_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.limits("0") == {"error": "there is no nvidia-smi"}
    with card.Watch("0") as watch:
        assert watch.since(0)["samples"] == 0


PROBLEM = Problem(4, 16, 16, 64, 1024, True)


def test_predictions_are_summed_over_the_kernels(tmp_path, monkeypatch):
    answer = """echo "$@" >> asked
case $3 in
  bwd_all_keys) if [ -e few_keys ]; then seconds=0.002; else exit 2; fi ;;
  *) seconds=0.001 ;;
esac
echo "{\\"kernel\\": \\"a $3\\", \\"seconds\\": $seconds}"
"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "program_path", lambda: program(tmp_path, "program", answer))
    three = {"ms": 3.0, "kernels": ["a bwd_preprocess", "a bwd_dkdv", "a bwd_dq"]}
    assert prediction.predict(PROBLEM, FORWARD, "t4", 60) == {"ms": 1.0, "kernels": ["a fwd"]}
    assert prediction.predict(PROBLEM, BACKWARD, "t4", 60) == three
    (tmp_path / "few_keys").touch()
    assert prediction.predict(PROBLEM, BACKWARD, "t4", 60) == {"ms": 2.0, "kernels": ["a bwd_all_keys"]}
    first, *_ = (tmp_path / "asked").read_text().splitlines()
    assert first.startswith("model --kind fwd --head-dim 64 --gpu t4 --json --causal --dtype fp16 --gqa 1 --batch 4")


@pytest.mark.parametrize("answer", ["echo no such card >&2; exit 2", "echo {}", "echo nonsense", "sleep 60"])
def test_a_prediction_that_is_not_to_be_had(answer, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "program_path", lambda: program(tmp_path, "program", answer))
    assert prediction.predict(PROBLEM, FORWARD, "t4", 0.5)["error"]
    monkeypatch.setattr(prediction, "program_path", lambda: None)
    assert prediction.predict(PROBLEM, FORWARD, "t4", 60) == {"error": "there is no program flash-attn-jit"}


def test_the_words_of_cards():
    names = ["Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA TITAN RTX", "Quadro RTX 6000"]
    assert [prediction.card_word(name) for name in names] == ["t4", "rtx2080ti", "titanrtx", "rtx6000"]


def result(which=FORWARD):
    rows = [{"backend": name, "ms_median": ms} for name, ms in (("flash_attn_jit", 1.0), ("sdpa_efficient", 2.5))]
    rows.append({"backend": "sdpa_flash", "skipped": "needs sm_80"})
    seen = {"clock_mhz": 1350.0, "throttled_by": ["sw_power_cap"]}
    return {"problem": PROBLEM.record(), "pass": which, "backends": rows, "card": seen}


def test_lines_of_speed():
    line = check._speed_line(result())
    assert "flash_attn_jit 1.000  sdpa_efficient 2.500  2.50 times as fast  at 1350 MHz (sw_power_cap)" in line
    assert speed.times_as_fast({"backends": result()["backends"][:1]}) is None
    assert len(speed.problems()) == len(set(speed.problems())) == 20


def test_predictions_beside_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(prediction, "predict", lambda *_: {"ms": 0.9, "kernels": ["a spec"]})
    results = [result(), result(BACKWARD)]
    check._predict_all(results, "Tesla T4", check._Clock(60))
    assert [each["predicted"]["over_measured"] for each in results] == [0.9, 0.9]
    assert capsys.readouterr().out.count("predicted 0.900 ms, 0.90 of the measured") == 2


def test_a_card_that_the_model_does_not_know_is_asked_for_once(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(prediction, "predict", lambda *arguments: asked.append(arguments) or {"error": "no such card"})
    check._predict_all([result(), result(), result()], "NVIDIA H100", check._Clock(60))
    assert len(asked) == 1 and "none: no such card" in capsys.readouterr().out
