"""What a record says when it is asked the questions of a reader: who won, by how much, and is it certain."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, log
from statistics import median
from typing import NamedTuple

from .. import _core
from .records import MEASURED, Candidate, Record
from .work import bytes_moved, flops, tflops

SAME_WITHIN = _core.report_same_within  # a share: times that lie no further apart are the same


class Figure(NamedTuple):
    """Seconds of a launch: the median, and the interval that it lies in. A prediction has no spread."""

    seconds: float
    low: float
    high: float
    has_interval: bool

    def may_equal(self, other: "Figure") -> bool:
        return self.low <= other.high and other.low <= self.high


def figure_of(record: Record, candidate: Candidate) -> Figure | None:
    """None for a candidate that was not measured. In a predicted record the prediction stands for the measurement."""
    if candidate.outcome != MEASURED:
        return None
    seconds = candidate.median_seconds
    if record.is_predicted:
        seconds = seconds or candidate.predicted_seconds
        return Figure(seconds, seconds, seconds, True) if seconds else None
    if seconds is None:
        return None
    low, high = candidate.low_seconds, candidate.high_seconds
    if low is None or high is None:
        return Figure(seconds, seconds, seconds, False)
    return Figure(seconds, min(low, seconds), max(high, seconds), True)


@dataclass(frozen=True)
class Finding:
    """A record and what follows from it."""

    record: Record

    @cached_property
    def ranked(self) -> list[tuple[Candidate, Figure]]:
        """The candidates with a figure, the fastest first."""
        figures = ((candidate, figure_of(self.record, candidate)) for candidate in self.record.candidates)
        return sorted(
            ((candidate, figure) for candidate, figure in figures if figure), key=lambda pair: pair[1].seconds
        )

    @cached_property
    def rejected(self) -> list[Candidate]:
        ranked = {candidate.tile for candidate, _ in self.ranked}
        return [candidate for candidate in self.record.candidates if candidate.tile not in ranked]

    @cached_property
    def rejected_by_outcome(self) -> dict[str, list[Candidate]]:
        by_outcome: dict[str, list[Candidate]] = {}
        for candidate in self.rejected:
            by_outcome.setdefault(candidate.outcome, []).append(candidate)
        return by_outcome

    def figure(self, tile: str) -> Figure | None:
        return next((figure for candidate, figure in self.ranked if candidate.tile == tile), None)

    @cached_property
    def winner(self) -> Figure | None:
        return self.figure(self.record.winner)

    @cached_property
    def default(self) -> Figure | None:
        return self.figure(self.record.default)

    @cached_property
    def winner_candidate(self) -> Candidate:
        return self.record.candidate(self.record.winner)

    def _loss(self, figure: Figure | None) -> float | None:
        return figure.seconds / self.winner.seconds - 1 if figure and self.winner else None

    @cached_property
    def default_regret(self) -> float | None:
        """What the default loses: 0.05 where it takes 5 % longer than the winner."""
        return self._loss(self.default)

    @cached_property
    def runner_up(self) -> tuple[Candidate, Figure] | None:
        return next((pair for pair in self.ranked if pair[0].tile != self.record.winner), None)

    @cached_property
    def is_told_apart(self) -> bool | None:
        """Whether the winner's interval and the runner-up's do not overlap; None where it is not known."""
        if not (self.runner_up and self.winner):
            return None
        other = self.runner_up[1]
        if not (self.winner.has_interval and other.has_interval):
            return None
        return not self.winner.may_equal(other)

    @cached_property
    def model_choice(self) -> Candidate | None:
        """The measured candidate that the model had preferred."""
        predicted = [candidate for candidate, _ in self.ranked if candidate.predicted_seconds]
        if self.record.is_predicted or not predicted:
            return None
        return min(predicted, key=lambda candidate: (candidate.predicted_seconds or 0, candidate.tile))

    @cached_property
    def model_regret(self) -> float | None:
        return self._loss(self.figure(self.model_choice.tile)) if self.model_choice else None

    @cached_property
    def predictions(self) -> list[tuple[Candidate, float]]:
        """Of the measured candidates: predicted over measured."""
        if self.record.is_predicted:
            return []
        return [
            (candidate, candidate.predicted_seconds / figure.seconds)
            for candidate, figure in self.ranked
            if candidate.predicted_seconds
        ]

    @cached_property
    def tflops(self) -> float | None:
        return tflops(self.record, self.winner.seconds if self.winner else None)

    @cached_property
    def share_of_peak(self) -> float | None:
        peak = self.record.environment.peak_tflops
        return self.tflops / peak if self.tflops is not None and peak else None

    @cached_property
    def intensity(self) -> float | None:
        """Floating-point operations a byte, where every tensor moves once."""
        needed, moved = flops(self.record.problem.kernel, self.record.sizes), self.bytes_moved
        return needed / moved if needed and moved else None

    @cached_property
    def bytes_moved(self) -> int:
        return bytes_moved(self.record.problem.kernel, self.record.sizes)

    @cached_property
    def best_other(self) -> tuple[str, float] | None:
        """The fastest of PyTorch's, and its seconds."""
        others = self.record.others
        return min(others.items(), key=lambda item: item[1]) if others else None

    @cached_property
    def times_as_fast(self) -> float | None:
        """As the fastest of PyTorch's."""
        return self.best_other[1] / self.winner.seconds if self.best_other and self.winner else None

    @cached_property
    def throttled_by(self) -> list[str]:
        return sorted(
            {
                reason
                for candidate in self.record.candidates
                for sample in candidate.samples
                for reason in sample.throttled_by
            }
        )

    @cached_property
    def clocks(self) -> tuple[float, float] | None:
        """The lowest and the highest SM clock of a sample, MHz."""
        clocks = [s.clock_mhz for c in self.record.candidates for s in c.samples if s.clock_mhz is not None]
        return (min(clocks), max(clocks)) if clocks else None


def geometric_mean(ratios: Iterable[float]) -> float | None:
    logs = [log(ratio) for ratio in ratios if ratio > 0]
    return exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Summary:
    """Over all findings."""

    classes: int
    candidates: int
    gain: float | None  # geometric mean of the default's time over the winner's
    worst: Finding | None  # with the greatest regret of the default
    unclear: int  # classes whose winner and runner-up cannot be told apart
    times_as_fast: float | None  # as PyTorch's, geometric mean
    model_gain: float | None  # geometric mean of the model's choice's time over the winner's
    within_tenth: float | None  # share of predictions within 10 % of the measurement
    predictions: int
    predicted_records: int


def summarize(findings: Sequence[Finding]) -> Summary:
    regrets = [finding for finding in findings if finding.default_regret is not None]
    ratios = [ratio for finding in findings for _, ratio in finding.predictions]
    return Summary(
        classes=len(findings),
        candidates=sum(len(finding.record.candidates) for finding in findings),
        gain=geometric_mean(1 + (finding.default_regret or 0) for finding in regrets),
        worst=max(regrets, key=lambda finding: finding.default_regret or 0, default=None),
        unclear=sum(finding.is_told_apart is False for finding in findings),
        times_as_fast=geometric_mean(f.times_as_fast for f in findings if f.times_as_fast),
        model_gain=geometric_mean(1 + f.model_regret for f in findings if f.model_regret is not None),
        within_tenth=sum(0.9 <= ratio <= 1.1 for ratio in ratios) / len(ratios) if ratios else None,
        predictions=len(ratios),
        predicted_records=sum(finding.record.is_predicted for finding in findings),
    )


def median_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


class Origin(NamedTuple):
    """Records of one device, way of timing, templates and environment; the peaks are the medians of theirs."""

    record: Record  # one of them
    peak_tflops: float | None
    peak_gigabytes: float | None
    records: int


def origins(findings: Iterable[Finding]) -> list[Origin]:
    """The most frequent first."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in (finding.record for finding in findings):
        apart_from_peaks = replace(record.environment, peak_tflops=None, peak_gigabytes=None)
        found.setdefault((record.device, record.policy, record.templates, apart_from_peaks), []).append(record)
    return [
        Origin(
            them[0],
            median_or_none(record.environment.peak_tflops for record in them),
            median_or_none(record.environment.peak_gigabytes for record in them),
            len(them),
        )
        for them in sorted(found.values(), key=len, reverse=True)
    ]


def by_regret(findings: Iterable[Finding]) -> list[Finding]:
    """The greatest regret of the default first; where it is not known, last."""
    return sorted(
        findings,
        key=lambda finding: (
            -(finding.default_regret if finding.default_regret is not None else -1),
            str(finding.record.problem),
        ),
    )
