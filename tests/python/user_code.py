"""Runs what flex.trace() makes of functions: compiled for the host, as the interpreter compiles kernels, and asked at
single places."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash_attn_jit.flex import Traced

_REPOSITORY = Path(__file__).resolve().parents[2]
_MOST_TENSORS, _MOST_DIMS = 8, 4

_HEAD = """
#include "templates/primitives.cuh"
#include "templates/attention_params.cuh"
#include "templates/user_reads.cuh"

static unsigned char* first_byte[kMostUserTensors];
static unsigned char* end_byte[kMostUserTensors];
static int faults;

static void load(HostAccess access, void* value, const void* address, const char*, int) {
  const int bytes = access == HostAccess::kLoadGlobal8B ? 8
                    : access == HostAccess::kLoadGlobal2B ? 2
                    : access == HostAccess::kLoadGlobal1B ? 1 : 4;
  const unsigned char* at = static_cast<const unsigned char*>(address);
  bool is_inside = false;
  for (int i = 0; i < kMostUserTensors; ++i) is_inside |= first_byte[i] <= at && at + bytes <= end_byte[i];
  if (is_inside) __builtin_memcpy(value, address, bytes);
  else { ++faults; __builtin_memset(value, 0, bytes); }
}
static void note_undefined(const char*, const char*, int) { ++faults; }

template <class Score, class Mask>
void evaluate(const UserTensors& tensors, int count, const int* places, const float* scores, float* forward,
              float* backward, float* derivative, unsigned char* shown) {
  for (int i = 0; i < count; ++i) {
    const int b = places[4 * i], h = places[4 * i + 1], q = places[4 * i + 2], k = places[4 * i + 3];
    Score score;
    score.prepare(tensors, b, h);
    forward[i] = score.score(tensors, scores[i], b, h, q, k);
    backward[i] = score.score(tensors, scores[i], b, h, q, k, derivative[i]);
    Mask mask;
    mask.prepare(tensors, b, h);
    shown[i] = mask.shows(tensors, b, h, q, k);
  }
}

// Of a score in units; what the function adds stands in `forward`.
template <class Score>
void evaluate_sum(const UserTensors& tensors, int count, const int* places, const float* scores, float unit,
                  float* forward, float* sums) {
  if constexpr (Score::kIsAdditive)
    for (int i = 0; i < count; ++i) {
      const int b = places[4 * i], h = places[4 * i + 1], q = places[4 * i + 2], k = places[4 * i + 3];
      Score score;
      score.prepare(tensors, b, h, unit);
      forward[i] = score.addend(tensors, b, h, q, k);
      sums[i] = score.scaled_sum(tensors, scores[i], b, h, q, k);
    }
}

template <class Score, class Mask>
constexpr int facts() {
  return Score::kIsAdditive | Score::kHasDerivative << 1 | Mask::kIsTrivial << 2;
}
"""

_TABLE = """
using Evaluate = void (*)(const UserTensors&, int, const int*, const float*, float*, float*, float*, unsigned char*);
using EvaluateSum = void (*)(const UserTensors&, int, const int*, const float*, float, float*, float*);
FLASH_ATTN_JIT_EXPORT const Evaluate evaluations[] = {%s};
FLASH_ATTN_JIT_EXPORT const EvaluateSum sums[] = {%s};
FLASH_ATTN_JIT_EXPORT const int all_facts[] = {%s};
FLASH_ATTN_JIT_EXPORT int run(int which, const UserTensors* tensors, unsigned char** first, unsigned char** end,
                              int count, const int* places, const float* scores, float* forward, float* backward,
                              float* derivative, unsigned char* shown) {
  flash_attn_jit_engine.load_global = load;
  flash_attn_jit_engine.undefined_behaviour = note_undefined;
  for (int i = 0; i < kMostUserTensors; ++i) first_byte[i] = first[i], end_byte[i] = end[i];
  faults = 0;
  evaluations[which](*tensors, count, places, scores, forward, backward, derivative, shown);
  return faults;
}
FLASH_ATTN_JIT_EXPORT int run_sum(int which, const UserTensors* tensors, int count, const int* places,
                                  const float* scores, float unit, float* forward, float* sum) {
  faults = 0;
  sums[which](*tensors, count, places, scores, unit, forward, sum);
  return faults;
}
"""

# The interpreter's, of runtime/compile/host_compiler.cpp.
_FLAGS = [
    *"-std=c++17 -DFLASH_ATTN_JIT_HOST -w -fPIC -shared -fno-exceptions -fno-rtti -Og -ffp-contract=off".split(),
    "-fsanitize=shift,integer-divide-by-zero,unreachable,return,signed-integer-overflow,bounds,float-cast-overflow",
    "-fsanitize=bool,enum",
    "-nodefaultlibs",
]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("sizes", ctypes.c_int * _MOST_DIMS), ("strides", ctypes.c_int * _MOST_DIMS)]


class Evaluated(NamedTuple):
    score: torch.Tensor
    score_of_backward: torch.Tensor
    derivative: torch.Tensor
    shown: torch.Tensor


class CompiledFunction:
    def __init__(self, library: ctypes.CDLL, number: int, traced: Traced):
        self._library, self._number, self.traced = library, number, traced
        facts = (ctypes.c_int * (number + 1)).in_dll(library, "all_facts")[number]
        self.is_additive, self.has_derivative, self.is_trivial = bool(facts & 1), bool(facts & 2), bool(facts & 4)

    def __call__(self, score: torch.Tensor, places: torch.Tensor) -> Evaluated:
        """`score`: (n,) float32; `places`: (n, 4), b, h, q and k."""
        places = places.int().contiguous()
        floats = [torch.empty_like(score) for _ in range(3)]
        shown = torch.empty(len(score), dtype=torch.bool)
        tensors, first, end = self._tensors()
        faults = self._library.run(
            *(self._number, tensors, first, end, len(score), _at(places), _at(score)),
            *(_at(each) for each in (*floats, shown)),
        )
        assert faults == 0, f"undefined behaviour, or reads outside of the tensors:\n{self.traced.code}"
        return Evaluated(floats[0], floats[1], floats[2], shown)

    def sums(self, score: torch.Tensor, places: torch.Tensor, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added, and the scaled sum."""
        places = places.int().contiguous()
        added, sums = torch.empty_like(score), torch.empty_like(score)
        tensors, _, _ = self._tensors()
        unit_ = ctypes.c_float(unit)
        arguments = (self._number, tensors, len(score), _at(places), _at(score), unit_, _at(added), _at(sums))
        assert self._library.run_sum(*arguments) == 0
        return added, sums

    def _tensors(self) -> tuple[Any, Any, Any]:
        tensors = (_Tensor * _MOST_TENSORS)()
        first, end = (ctypes.c_void_p * _MOST_TENSORS)(), (ctypes.c_void_p * _MOST_TENSORS)()
        for i, tensor in enumerate(self.traced.tensors):
            tensors[i].data = first[i] = tensor.data_ptr()
            most = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            end[i] = tensor.data_ptr() + (most + 1) * tensor.element_size()
            tensors[i].sizes[:] = [*tensor.shape, *(1,) * (_MOST_DIMS - tensor.dim())]
            tensors[i].strides[:] = [*tensor.stride(), *(0,) * (_MOST_DIMS - tensor.dim())]
        return tensors, first, end


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _compiler() -> str:
    choice = os.environ.get("FLASH_ATTN_JIT_CXX")
    found = choice or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    assert found, "the interpreter needs a C++ compiler"
    return found


def compiled(functions: Sequence[Traced], folder: Path) -> list[CompiledFunction]:
    """All of them in one object: a compiler starts once."""
    parts = [_HEAD]
    for i, traced in enumerate(functions):
        structs = "\n".join(line for line in traced.code.splitlines() if not line.startswith("#"))
        parts.append(f"namespace case_{i} {{\n{structs}\n}}")
    names = [f"case_{i}" for i in range(len(functions))]
    parts.append(
        _TABLE
        % (
            ", ".join(f"evaluate<{name}::UserScore, {name}::UserMask>" for name in names),
            ", ".join(f"evaluate_sum<{name}::UserScore>" for name in names),
            ", ".join(f"facts<{name}::UserScore, {name}::UserMask>()" for name in names),
        )
    )
    source, target = folder / "functions.cpp", folder / "functions.so"
    source.write_text("\n".join(parts))
    command = [_compiler(), *_FLAGS, f"-I{_REPOSITORY}", "-o", str(target), str(source), "-lm", "-lc"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    return [CompiledFunction(library, i, traced) for i, traced in enumerate(functions)]
