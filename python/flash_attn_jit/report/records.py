"""Tuning records, read from JSON that anyone may have written: a bad one is told and passed over."""

import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import _core

RECORD, DATABASE = "flash-attn-jit tuning record", "flash-attn-jit tuning database"
VERSION = 1
PREDICTED = "model"  # the timer of a record for which nothing ran
MEASURED = "measured"
OUTCOMES = (
    MEASURED,
    "pruned",
    "compile failed",
    "launch failed",
    "wrong result",
    "timed out",
    "crashed",
    "not reached",
)
KINDS = tuple(family.word for family in _core.kernel_families())
MASKS = ("full", "causal", "window")
_KERNEL = re.compile(
    rf"({'|'.join(KINDS)}) hdim([1-9]\d{{0,2}}) (fp16|bf16) ({'|'.join(MASKS)})((?: [a-z][a-z0-9]{{0,31}})*)"
    r" gqa([1-9]\d{0,5}) (vec16|elem2)"
)
_TILE = re.compile(r"(?:[mnwqlbk]\d{1,5}){7}")
_WHEN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

# More than any real file has; what is beyond is not read.
_RECORD_BYTES, _DATABASE_BYTES = 16 << 20, 512 << 20
_MOST = 100_000  # of anything that a record lists
_MOST_SECONDS, _MOST_ERROR = 1e7, 1e300


class BadRecord(ValueError):
    """What does not fit, where it stands, and what is accepted."""


@dataclass(frozen=True)
class Kernel:
    """A spec without its tile, by its words."""

    text: str
    kind: str
    head_dim: int
    mask: str
    features: tuple[str, ...]
    group_size: int


@dataclass(frozen=True)
class Device:
    name: str
    sm: int
    multiprocessors: int
    code: str

    def __str__(self) -> str:
        translated = "" if self.code == "native" else f", {self.code}"
        return f"{self.name} (sm_{self.sm}, {self.multiprocessors} multiprocessors{translated})"


@dataclass(frozen=True)
class ProblemClass:
    """Sizes are the upper ends of the class's buckets."""

    kernel: Kernel
    seqlen_q: int
    seqlen_k: int
    batch_heads: int

    def __str__(self) -> str:
        return f"{self.kernel.text} q{self.seqlen_q} k{self.seqlen_k} bh{self.batch_heads}"


@dataclass(frozen=True)
class Policy:
    timer: str
    l2: str

    def __str__(self) -> str:
        return "predicted by the model" if self.timer == PREDICTED else f"{self.timer}, {self.l2}"


@dataclass(frozen=True)
class Environment:
    library: str
    driver: str | None
    nvrtc: str | None
    power_limit_watts: float | None
    peak_tflops: float | None
    peak_gigabytes: float | None


@dataclass(frozen=True)
class Sizes:
    """The problem that was measured. A window's widths are -1 where there is none to that side, and None where the
    record does not tell."""

    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    window_left: int | None = None
    window_right: int | None = None

    def __str__(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_heads_k else f"{self.num_heads}/{self.num_heads_k}"
        return f"batch {self.batch}, heads {heads}, {self.seqlen_q} queries, {self.seqlen_k} keys"


class Sample(NamedTuple):
    seconds: float
    clock_mhz: float | None
    throttled_by: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    tile: str
    outcome: str
    reason: str
    predicted_seconds: float | None
    limited_by: str
    registers: int | None
    spill_stores: int | None
    spill_loads: int | None
    blocks_per_multiprocessor: int | None
    error: float | None
    error_allowed: float | None
    samples: tuple[Sample, ...]
    median_seconds: float | None
    low_seconds: float | None
    high_seconds: float | None

    @property
    def spilled_bytes(self) -> int | None:
        if self.spill_stores is None or self.spill_loads is None:
            return None
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Record:
    device: Device
    templates: str
    problem: ProblemClass
    policy: Policy
    environment: Environment
    sizes: Sizes
    when: str
    seconds: float
    default: str
    winner: str
    rule: str
    rounds: int
    candidates: tuple[Candidate, ...]
    others: dict[str, float]  # seconds, by name

    @property
    def is_predicted(self) -> bool:
        return self.policy.timer == PREDICTED

    def candidate(self, tile: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.tile == tile)


@dataclass
class Found:
    """What was read, and what could not be, in words that begin with the file."""

    records: list[Record] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    files: int = 0


class _Object:
    """One JSON object; every value is checked as it is taken."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise BadRecord(f"{where or 'the file'} is {_shown(value)}; accepted: an object")
        self._values, self._where = value, where

    def _name(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _take(self, name: str) -> Any:
        if name not in self._values:
            raise BadRecord(f"{self._name(name)} is missing")
        return self._values[name]

    def refuse(self, name: str, accepted: str) -> BadRecord:
        return BadRecord(f"{self._name(name)} is {_shown(self._values.get(name))}; accepted: {accepted}")

    def object(self, name: str) -> "_Object":
        return _Object(self._take(name), self._name(name))

    def objects(self, name: str) -> "Iterator[_Object]":
        values = self._list(name)
        return (_Object(value, f"{self._name(name)}[{i}]") for i, value in enumerate(values))

    def _list(self, name: str) -> list[Any]:
        values = self._take(name)
        if not isinstance(values, list) or len(values) > _MOST:
            raise self.refuse(name, f"a list of at most {_MOST}")
        return values

    def text(self, name: str, most: int = 200) -> str:
        value = self._take(name)
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise self.refuse(name, f"printable text of at most {most} characters")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._take(name) is None else self.text(name)

    def one_of(self, name: str, accepted: Iterable[str]) -> str:
        value = self.text(name)
        if value not in accepted:
            raise self.refuse(name, ", ".join(accepted))
        return value

    def matching(self, name: str, pattern: "re.Pattern[str]", example: str) -> "re.Match[str]":
        found = pattern.fullmatch(self.text(name))
        if not found:
            raise self.refuse(name, f"a text like '{example}'")
        return found

    def integer(self, name: str, least: int = 0, most: int = 2**40) -> int:
        value = self._take(name)
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(name, f"an integer from {least} to {most}")
        return value

    def integer_or_none(self, name: str, least: int = 0) -> int | None:
        return None if self._take(name) is None else self.integer(name, least)

    def absent_or_integer(self, name: str, least: int) -> int | None:
        return self.integer_or_none(name, least) if name in self._values else None

    def number(self, name: str, most: float, least: float = 0.0) -> float:
        value = self._take(name)
        if type(value) not in (int, float) or not least <= value <= most:  # a NaN is in no range
            raise self.refuse(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def number_or_none(self, name: str, most: float, least: float = 0.0) -> float | None:
        return None if self._take(name) is None else self.number(name, most, least)

    def duration_or_none(self, name: str) -> float | None:
        return self.number_or_none(name, _MOST_SECONDS, least=1e-12)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._list(name)
        if not all(isinstance(value, str) and value.isprintable() and len(value) <= 200 for value in values):
            raise self.refuse(name, "a list of short texts")
        return tuple(values)

    def durations(self, name: str) -> dict[str, float]:
        inner = self.object(name)
        if len(inner._values) > 100:
            raise self.refuse(name, "at most 100 names")
        for key in inner._values:
            if len(key) > 100 or not key.isprintable():
                raise self.refuse(name, "names that are short and printable")
        return {key: inner.number(key, _MOST_SECONDS, least=1e-12) for key in inner._values}


def _shown(value: Any) -> str:
    """Of a value that was refused: short, and one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    try:
        text = ascii(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."


def _kernel(key: _Object) -> Kernel:
    found = key.matching("kernel", _KERNEL, "fwd hdim128 fp16 causal gqa8 vec16")
    kind, head_dim, _, mask, features, group_size, _ = found.groups()
    return Kernel(found[0], kind, int(head_dim), mask, tuple(features.split()), int(group_size))


def _sample(sample: _Object) -> Sample:
    return Sample(
        sample.number("seconds", _MOST_SECONDS, least=1e-12),
        sample.number_or_none("clock_mhz", 1e6),
        sample.texts("throttled_by"),
    )


def _tile(value: _Object, name: str) -> str:
    return value.matching(name, _TILE, "m256n16w8q96l2b4k7")[0]


def _candidate(candidate: _Object) -> Candidate:
    return Candidate(
        tile=_tile(candidate, "tile"),
        outcome=candidate.one_of("outcome", OUTCOMES),
        reason=candidate.text("reason", 4000),
        predicted_seconds=candidate.duration_or_none("predicted_seconds"),
        limited_by=candidate.text("limited_by", 40),
        registers=candidate.integer_or_none("registers"),
        spill_stores=candidate.integer_or_none("spill_stores"),
        spill_loads=candidate.integer_or_none("spill_loads"),
        blocks_per_multiprocessor=candidate.integer_or_none("blocks_per_multiprocessor"),
        error=candidate.number_or_none("error", _MOST_ERROR),
        error_allowed=candidate.number_or_none("error_allowed", _MOST_ERROR),
        samples=tuple(_sample(sample) for sample in candidate.objects("samples")),
        median_seconds=candidate.duration_or_none("median_seconds"),
        low_seconds=candidate.duration_or_none("low_seconds"),
        high_seconds=candidate.duration_or_none("high_seconds"),
    )


def parse_record(value: Any) -> Record:
    """Throws BadRecord."""
    record = _Object(value, "")
    record.one_of("format", [RECORD])
    record.integer("version", VERSION, VERSION)
    key = record.object("key")
    device, problem, policy = key.object("device"), key.object("problem"), key.object("policy")
    environment, sizes = record.object("environment"), record.object("measured")
    candidates = tuple(_candidate(candidate) for candidate in record.objects("candidates"))
    tiles = {candidate.tile for candidate in candidates}
    if len(tiles) < len(candidates):
        raise record.refuse("candidates", "every tile once")
    for name in ("default", "winner"):
        if _tile(record, name) not in tiles:
            raise record.refuse(name, "the tile of a candidate")
    return Record(
        device=Device(
            device.text("name"),
            device.integer("sm", 10, 10_000),
            device.integer("multiprocessors"),
            device.text("code"),
        ),
        templates=key.text("templates"),
        problem=ProblemClass(
            _kernel(problem),
            problem.integer("seqlen_q"),
            problem.integer("seqlen_k"),
            problem.integer("batch_heads"),
        ),
        policy=Policy(policy.text("timer"), policy.text("l2")),
        environment=Environment(
            environment.text("library"),
            environment.text_or_none("driver"),
            environment.text_or_none("nvrtc"),
            environment.number_or_none("power_limit_watts", 1e6),
            environment.number_or_none("peak_tflops", 1e6),
            environment.number_or_none("peak_gigabytes", 1e7),
        ),
        sizes=Sizes(
            *(sizes.integer(name) for name in ("batch", "num_heads", "num_heads_k", "seqlen_q", "seqlen_k")),
            *(sizes.absent_or_integer(name, -1) for name in ("window_left", "window_right")),
        ),
        when=record.matching("when", _WHEN, "2026-11-27T08:00:00Z")[0],
        seconds=record.number("seconds", _MOST_SECONDS),
        default=record.text("default"),
        winner=record.text("winner"),
        rule=record.text("rule", 4000),
        rounds=record.integer("rounds"),
        candidates=candidates,
        others=record.durations("others"),
    )


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _read_json(path: Path, most_bytes: int) -> Any:
    """Throws BadRecord."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise BadRecord("is no file")
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise BadRecord(f"has more than {most_bytes} bytes")
        return json.loads(data, parse_constant=_no_constant)
    except OSError as error:
        raise BadRecord(error.strerror or str(error)) from None
    except RecursionError:
        raise BadRecord("is nested too deeply") from None
    except ValueError as error:  # of JSON, of UTF-8, of an integer with too many digits
        raise BadRecord(str(error)) from None


def _read_record(path: Path) -> Record:
    return parse_record(_read_json(path, _RECORD_BYTES))


def _take(found: Found, where: str, read_one: Callable[[], Record]) -> None:
    try:
        found.records.append(read_one())
    except BadRecord as error:
        found.complaints.append(f"{where}: {error}")


def _read_file(path: Path, found: Found) -> None:
    """One record, or a database of them, whose bad ones are passed over too."""
    found.files += 1
    try:
        value = _read_json(path, _DATABASE_BYTES)
        if not isinstance(value, dict) or value.get("format") != DATABASE:
            found.records.append(parse_record(value))
            return
        database = _Object(value, "")
        database.integer("version", VERSION, VERSION)
        if not isinstance(value.get("records"), list):
            raise database.refuse("records", "a list")
    except BadRecord as error:
        found.complaints.append(f"{path}: {error}")
        return
    for i, item in enumerate(value["records"]):
        _take(found, f"{path}: record {i}", partial(parse_record, item))


def _read_folder(folder: Path, found: Found) -> None:
    """Every record below the folder, in the order of the files' names."""
    for path in sorted(folder.rglob("*.json")):
        found.files += 1
        _take(found, str(path), partial(_read_record, path))


def read(path: Path) -> Found:
    """A folder of records, a record, or a database."""
    found = Found()
    if path.is_dir():
        _read_folder(path, found)
    else:
        _read_file(path, found)
    return found
