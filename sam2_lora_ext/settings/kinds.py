"""The kinds of single values of settings; each describes its valid values and refuses others in one sentence.
Composite kinds are in `containers.py`.

A row of the tables is a kind. Values are plain: None, bool, int, float, str, lists, mappings. `True` is not a number
here, and 8.0 is not a whole number: recorded values have the type that was given.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

from sam2_lora_ext.utils.errors import UserError

LARGEST = 2**31 - 1  # of whole numbers without an explicit bound: the range of torch and numpy
SHOWN = 80  # characters of a refused value in a message


@dataclass(frozen=True)
class Kind:
    """Any value; the base class of the others.

    Attributes:
        name: the user's name of the setting, such as `scratch.lr`, for a row deep in `trainer`.
    """

    name: str = field(default="", kw_only=True)

    def called(self, name: str) -> Self:
        """The same row under a user's name."""
        return replace(self, name=name)

    @property
    def says(self) -> str:
        """The valid values, as the text after `must be`."""
        return "any value"

    def takes(self, value: Any) -> bool:
        """Whether the value itself is valid; containers check their elements in `check`."""
        return True

    def check(self, where: str, value: Any) -> None:
        """Raises a `UserError` with the setting, its valid values, and the actual value."""
        if not self.takes(value):
            raise UserError(self.sentence(where, value))

    def sentence(self, where: str, value: Any) -> str:
        """The error for the value at the dotted name `where`."""
        said = f"{self.name} (here {where})" if self.name and self.name != where else where
        hint = ""
        if isinstance(value, str) and not isinstance(self, (Text, Choice)) and "number" in self.says:
            hint = "; the text of an environment variable becomes a number with ${oc.decode:${oc.env:NAME}}"
        return f"{said} must be {self.says}, got {shown(value)}{hint}"


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `low` to `high`, a multiple of `multiple`."""

    low: int = 0
    high: int = LARGEST
    multiple: int = 1

    @property
    def says(self) -> str:
        what = "a whole number" if self.multiple == 1 else f"a multiple of {self.multiple}"
        bound = f"of at least {self.low}" if self.high == LARGEST else f"from {self.low} to {self.high}"
        return f"{what} {bound}"

    def takes(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high and value % self.multiple == 0


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `low` to `high`; `above` and `below` exclude the ends."""

    low: float = 0.0
    high: float = 1e9
    above: bool = False
    below: bool = False

    @property
    def says(self) -> str:
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        return f"a number {low} and {'below' if self.below else 'at most'} {self.high:g}"

    def takes(self, value: Any) -> bool:
        if type(value) not in (int, float) or isinstance(value, float) and not math.isfinite(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)


@dataclass(frozen=True)
class Flag(Kind):
    """true or false, not 0 or 1."""

    @property
    def says(self) -> str:
        return "true or false"

    def takes(self, value: Any) -> bool:
        return type(value) is bool


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words."""

    words: tuple[str, ...] = ()

    @property
    def says(self) -> str:
        return f"one of {', '.join(self.words)}"

    def takes(self, value: Any) -> bool:
        return type(value) is str and value in self.words


def one_of(*words: str) -> Choice:
    """The row of a choice."""
    return Choice(words)


@dataclass(frozen=True)
class Text(Kind):
    """A text on one line that a file can store; with `empty` it may be empty."""

    empty: bool = False
    longest: int = 4096

    @property
    def says(self) -> str:
        return f"a text of {0 if self.empty else 1} to {self.longest} characters without line breaks or ${{"

    def takes(self, value: Any) -> bool:
        if type(value) is not str or not (self.empty or value.strip()) or len(value) > self.longest:
            return False
        return recordable(value) and all(ord(one) >= 32 and one != "\x7f" for one in value)


def recordable(value: Any) -> bool:
    """Whether a single value can be written into a config and read back unchanged."""
    if not isinstance(value, str):
        return value is None or type(value) in (bool, int, float)
    if value == "???" or "${" in value:  # OmegaConf's marks for missing values and interpolations
        return False
    return not any("\ud800" <= one <= "\udfff" or one in "\x85\u2028\u2029" for one in value)  # YAML folds these three


def accepts(kind: Kind, value: Any) -> bool:
    """Whether a value and all its elements are valid."""
    try:
        kind.check("", value)
    except UserError:
        return False
    return True


def shown(value: Any) -> str:
    """A value for a message, truncated if it is long."""
    if type(value) is int and abs(value) >= 10**30:
        return f"a number of {int(math.log10(abs(value))) + 1 if abs(value) < 10**300 else 'over 300'} digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
