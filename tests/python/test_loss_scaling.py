"""Gradients under loss scaling, in the interpreter: as large as fp16 allows, infinite, and NaN."""

import pytest
from attention_reference import normal_qkv
from loss_scaling import (
    check_scaled_gradients,
    check_that_a_scaler_skips_the_step,
    check_that_it_reaches_the_gradients,
    check_that_nan_of_an_input_reaches_the_gradients,
)


@pytest.mark.parametrize(
    "shape, causal",
    [
        ((1, 100, 100, 2, 2, 64), True),
        ((1, 70, 130, 8, 1, 64), True),
        ((1, 130, 130, 2, 2, 64), False),
        ((1, 150, 150, 1, 1, 128), False),
        ((1, 300, 20, 2, 2, 64), False),
        ((2, 66, 20, 8, 1, 128), False),
        ((1, 65, 65, 2, 1, 128), True),
        ((1, 90, 90, 2, 2, 40), True),
        ((1, 33, 33, 2, 1, 33), True),
        ((1, 33, 40, 4, 1, 256), True),
    ],
    ids=str,
)
def test_largest_gradient_of_2_to_the_15(shape, causal):
    check_scaled_gradients(*normal_qkv(*shape), causal)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape, causal",
    [
        ((2, 70, 100, 4, 2, 64), False),
        ((2, 100, 70, 4, 2, 64), True),
        ((2, 40, 70, 2, 2, 128), True),
        ((2, 20, 33, 2, 1, 33), False),
    ],
    ids=str,
)
def test_no_number_in_dout_reaches_the_gradients(value, shape, causal):
    check_that_it_reaches_the_gradients(value, *normal_qkv(*shape), causal)


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize(
    "shape, causal",
    [((1, 70, 100, 4, 2, 64), False), ((1, 300, 300, 2, 1, 64), True), ((1, 20, 33, 4, 2, 130), False)],
    ids=str,
)
def test_nan_of_an_input_reaches_the_gradients(which, shape, causal):
    check_that_nan_of_an_input_reaches_the_gradients(which, *normal_qkv(*shape), causal)


def test_a_scaler_skips_the_step():
    check_that_a_scaler_skips_the_step("cpu")
