"""``python -m flash_attn_jit.check``: every family of kernels against float64 on this GPU, its speed beside PyTorch's
and beside the prediction, in one JSON to attach to an issue."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .. import _core
from .._environment_report import collect
from ..bench import prediction
from ..bench.backends import OURS
from ..bench.problem import Problem
from . import card, cases, speed
from .cache import CacheCase

_FORMAT, _VERSION = "flash-attn-jit check", 1
# Of the time, what is left to the comparison with float64, and to both.
_FOR_CASES, _FOR_SPEEDS = 0.55, 0.85
_NOT_REACHED = "not reached: the time was over"


class _Clock:
    def __init__(self, seconds: float):
        self._begin, self._seconds = time.monotonic(), seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def is_over(self, share: float = 1.0) -> bool:
        return self.elapsed() >= share * self._seconds

    def left(self) -> float:
        return max(0.0, self._seconds - self.elapsed())


def _device() -> str:
    if _core.interprets():
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    raise SystemExit(
        "This checks a GPU, and torch sees none. FLASH_ATTN_JIT_INTERPRET=1 checks small problems in the interpreter."
    )


def _gpu_id() -> str:
    """As nvidia-smi takes it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = getattr(properties, "uuid", None)  # since torch 2.5
    return f"GPU-{uuid}" if uuid else str(torch.cuda.current_device())


def _case_line(row: dict[str, Any]) -> str:
    if "error" in row:
        found = row["error"].splitlines()[0]
    else:
        worst = max(row["tensors"].items(), key=lambda item: item[1]["share_of_allowed"])
        found = f"at most {100 * worst[1]['share_of_allowed']:.0f} % of what is allowed ({worst[0]})"
    verdict = "right" if row["right"] else "WRONG"
    return f"  {verdict}  head dim {row['head_dim']:3}  {row['case']:24} {found}"


def _check_all(
    chosen: Sequence[cases.Case | CacheCase], device: str, clock: _Clock, share: float
) -> Iterator[dict[str, Any]]:
    for case in chosen:
        if clock.is_over(share):
            yield {"case": case.name, "head_dim": case.head_dim, "skipped": _NOT_REACHED}
            continue
        row = cases.check(case, device)
        print(_case_line(row), flush=True)
        yield row


def _speed_line(result: dict[str, Any]) -> str:
    problem = Problem(**result["problem"])
    times = speed.milliseconds(result)
    shown = "  ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    factor = speed.times_as_fast(result)
    words = f"  {factor:.2f} times as fast" if factor else ""
    clock = result["card"]["clock_mhz"]
    at = f"  at {clock:.0f} MHz" if clock else ""
    throttled = f" ({', '.join(result['card']['throttled_by'])})" if result["card"]["throttled_by"] else ""
    return f"  {result['pass']:3} {problem!s:32} ms: {shown}{words}{at}{throttled}"


def _measure_all(gpu: str, clock: _Clock) -> list[dict[str, Any]]:
    results = []
    for result in speed.run(gpu, lambda: clock.is_over(_FOR_SPEEDS)):
        print(_speed_line(result), flush=True)
        results.append(result)
    if len(results) < len(speed.problems()):
        print(f"  {len(speed.problems()) - len(results)} more {_NOT_REACHED}")
    return results


def _predict_all(results: list[dict[str, Any]], name: str, clock: _Clock) -> None:
    """Beside each result. The program compiles each kernel anew, so several are asked at a time."""
    word = prediction.card_word(name)

    def predict(result: dict[str, Any]) -> dict[str, Any]:
        if clock.is_over():
            return {"error": _NOT_REACHED}
        return prediction.predict(Problem(**result["problem"]), result["pass"], word, max(1.0, clock.left()))

    # One first: where the model does not know this card, it is asked no more.
    first = predict(results[0]) if results else {}
    if "error" in first:
        answers = [first] * len(results)
    else:
        with ThreadPoolExecutor() as workers:
            answers = [first, *workers.map(predict, results[1:])] if results else []
    for result, answer in zip(results, answers):
        result["predicted"] = answer
        ours = speed.milliseconds(result).get(OURS)
        if "ms" in answer and ours:
            answer["over_measured"] = answer["ms"] / ours
            print(
                f"  {result['pass']:3} {Problem(**result['problem'])!s:32} predicted {answer['ms']:.3f} ms, "
                f"{answer['over_measured']:.2f} of the measured"
            )
    if results and "error" in answers[0]:
        print(f"  none: {answers[0]['error']}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_jit.check",
        description="Compares every family of kernels with float64 on this GPU, times them beside PyTorch's attention "
        "and beside what the model of the card predicts, and writes one JSON to attach to an issue. Exit code 1 where "
        "a result is wrong. With FLASH_ATTN_JIT_INTERPRET=1 small problems run in the interpreter, untimed.",
    )
    parser.add_argument("--json", type=Path, default=Path("check.json"), metavar="FILE", help="default: check.json")
    parser.add_argument("--seconds", type=float, default=270, help="what it may take; what does not fit is left out")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds}; accepted: a number above 0")
    if not options.json.absolute().parent.is_dir():
        parser.error(f"--json is {options.json}: there is no folder {options.json.parent}")
    return options


def run(device: str, seconds: float) -> dict[str, Any]:
    clock = _Clock(seconds)
    on_gpu = device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else "the interpreter"
    report: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "device": where, "seconds_allowed": seconds}
    print(f"Against float64, on {where}:")
    chosen = cases.cases() if on_gpu else cases.small_cases()
    report["cases"] = list(_check_all(chosen, device, clock, _FOR_CASES if on_gpu else 1.0))
    if on_gpu:
        gpu = _gpu_id()
        report["card"] = card.limits(gpu)
        print("Speed, milliseconds:")
        report["speeds"] = _measure_all(gpu, clock)
        print("Predicted by the model of the card:")
        _predict_all(report["speeds"], where, clock)
    report["seconds"] = clock.elapsed()
    report["environment"] = collect()
    return report


def _verdict(report: dict[str, Any]) -> str:
    checked = [row for row in report["cases"] if "skipped" not in row]
    wrong = [row for row in checked if not row["right"]]
    left_out = len(report["cases"]) - len(checked)
    rest = f"; {left_out} {_NOT_REACHED}" if left_out else ""
    if wrong:
        names = "; ".join(f"head dim {row['head_dim']}, {row['case']}" for row in wrong)
        return f"WRONG: {len(wrong)} of {len(checked)} cases ({names}){rest}"
    return f"{len(checked)} cases are right{rest}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    report = run(_device(), options.seconds)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(_verdict(report))
    print(f"{options.json.absolute()}: attach it to an issue. It names paths of this machine.")
    if not all(row.get("right", True) for row in report["cases"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
