"""Two databases side by side: what became faster, what slower, and what cannot be told."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .findings import SAME_WITHIN, Figure, Finding

FASTER, SLOWER, SAME, UNTOLD = "faster", "slower", "same", "cannot be told"
ONLY_HERE, ONLY_THERE = "only here", "only there"
VERDICTS = (FASTER, SLOWER, SAME, UNTOLD, ONLY_HERE, ONLY_THERE)


@dataclass(frozen=True)
class Compared:
    """One problem class: `here` is what is reported, `there` what it is compared with."""

    here: Finding | None
    there: Finding | None
    verdict: str
    reason: str

    @property
    def finding(self) -> Finding:
        found = self.here or self.there
        assert found is not None
        return found

    @property
    def ratio(self) -> float | None:
        """Times as fast here as there."""
        if self.here and self.there and self.here.winner and self.there.winner:
            return self.there.winner.seconds / self.here.winner.seconds
        return None


def judge(here: Figure, there: Figure) -> tuple[str, str]:
    """The verdict, and why."""
    if not (here.has_interval and there.has_interval):
        return UNTOLD, "there is no interval beside a median"
    if max(here.high / there.low, there.high / here.low) <= 1 + SAME_WITHIN:
        return SAME, f"the intervals lie within {100 * SAME_WITHIN:.0f} %"
    if here.may_equal(there):
        return UNTOLD, "the intervals overlap"
    return (FASTER if here.seconds < there.seconds else SLOWER), "the intervals do not overlap"


def _compare(here: Finding, there: Finding) -> Compared:
    verdict, reason = UNTOLD, ""
    if here.record.policy != there.record.policy:
        reason = f"measured in different ways ({here.record.policy}; {there.record.policy})"
    elif here.record.sizes != there.record.sizes:
        reason = f"other sizes were measured ({here.record.sizes}; {there.record.sizes})"
    elif not (here.winner and there.winner):
        reason = "a winner was not measured"
    else:
        verdict, reason = judge(here.winner, there.winner)
    return Compared(here, there, verdict, reason)


def _newest(findings: Sequence[Finding], by_device: bool) -> dict[tuple[object, ...], Finding]:
    """By problem class, the newest record of it: that of other templates is older or newer, too."""
    newest: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        record = finding.record
        key = (record.problem, record.device if by_device else None)
        if key not in newest or newest[key].record.when <= record.when:
            newest[key] = finding
    return newest


def compare(here: Sequence[Finding], there: Sequence[Finding]) -> list[Compared]:
    """In the order of `here`; what is only there comes last. Where each side has one device, the two are compared
    whatever they are; else a device is compared with itself."""
    devices = [{finding.record.device for finding in side} for side in (here, there)]
    by_device = any(len(side) > 1 for side in devices)
    ours, theirs = _newest(here, by_device), _newest(there, by_device)
    compared = [
        _compare(finding, theirs[key]) if key in theirs else Compared(finding, None, ONLY_HERE, "")
        for key, finding in ours.items()
    ]
    return compared + [Compared(None, f, ONLY_THERE, "") for key, f in theirs.items() if key not in ours]


def counts(compared: Sequence[Compared]) -> dict[str, int]:
    """By verdict, in their order, without those that do not occur."""
    found = Counter(each.verdict for each in compared)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}
