"""The comparison of a stand-in's interfaces with its package's: what differs is found."""

import pytest
from interfaces import differences

THEIRS = """
from dataclasses import dataclass
from elsewhere import moved

try:
    from fast import helper
except ImportError:
    helper = None

if True:
    CHOICES = ["a", "b"]

class Kind(Enum):
    ONE = 1
    TWO = 2

@dataclass
class Record:
    a: int
    b: int
    c: int = 0

class Base(ABC):
    width: int = 3

    @staticmethod
    @abc.abstractmethod
    def run(a, b=1, *, c=None, **rest): ...

    def more(self, x: "int") -> None: ...
"""


@pytest.mark.parametrize(
    "same",
    [
        "def moved(): ...",
        "def helper(): ...",
        "CHOICES = ['other']",
        "class Kind:\n    TWO = 2",
        "@dataclass\nclass Record:\n    b: str\n    a: str",
        "class Base:\n    @staticmethod\n    @abstractmethod\n    def run(a, b=7, *, c=8, **rest): ...",
    ],
)
def test_the_same(same):
    assert differences(same, THEIRS, set()) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("def gone(): ...", "gone is not there"),
        ("class Kind:\n    ONE = 2", "Kind.ONE is 1, not 2"),
        ("class Kind:\n    THREE = 3", "Kind.THREE is not there"),
        ("@dataclass\nclass Record:\n    a: int", "Record has fields without a default ['a', 'b'], not ['a']"),
        ("class Base: ...", "Base has abstract methods ['run'], not []"),
        ("class Base:\n    def more(self, x, y): ...", "Base.more has parameters"),
        ("class Base:\n    def more(self, x=1): ...", "Base.more has parameters"),
        ("class Base:\n    @classmethod\n    def more(self, x): ...", "Base.more has decorators"),
        ("class Kind:\n    def ONE(self): ...", "Kind.ONE is ONE = 1"),
    ],
)
def test_what_differs(other, message):
    assert any(difference.startswith(message) for difference in differences(other, THEIRS, set()))


def test_what_is_no_part_of_the_interface():
    assert differences("def gone(): ...\nclass Kind:\n    ONE = 2", THEIRS, {"gone", "Kind.ONE"}) == []
