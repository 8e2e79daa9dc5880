"""The user's functions of scores: Python, traced into expressions, which become CUDA C++ in a kernel.

`_recording.py` runs a function on values that write down what is done to them, in the operators of `_operators.py`;
`_expressions.py` makes expressions of that, simplified, `_derivative.py` what a score function does to a score,
`_lowering.py` what the machine should compute, and `_code.py` its text."""

from ._attention import flex_attention
from ._operators import OPERATORS
from ._trace import Traced, trace

__all__ = ["OPERATORS", "Traced", "flex_attention", "trace"]
