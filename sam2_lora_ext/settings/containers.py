"""The kinds of composite settings: null or a value, lists, mappings, sections, and parts with a `_target_`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sam2_lora_ext.settings.kinds import Kind, Text, accepts, recordable, shown
from sam2_lora_ext.utils.errors import UserError, check_keys

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


@dataclass(frozen=True)
class Nullable(Kind):
    """null, or a value of `kind`."""

    kind: Kind = Kind()

    @property
    def says(self) -> str:
        return f"null or {self.kind.says}"

    def check(self, where: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, (Mapping, list)):  # the error may be deep inside it
            replace(self.kind, name=self.name or self.kind.name).check(where, value)
        elif not self.takes(value):
            raise UserError(self.sentence(where, value))

    def takes(self, value: Any) -> bool:
        return value is None or accepts(self.kind, value)


@dataclass(frozen=True)
class Either(Kind):
    """A value of one of several kinds."""

    kinds: tuple[Kind, ...] = ()

    @property
    def says(self) -> str:
        return ", or ".join(kind.says for kind in self.kinds)

    def takes(self, value: Any) -> bool:
        return any(accepts(kind, value) for kind in self.kinds)


def either(*kinds: Kind) -> Either:
    """The row of a value of several kinds."""
    return Either(kinds)


@dataclass(frozen=True)
class ListOf(Kind):
    """A list of `least` to `most` values of one kind."""

    kind: Kind = Kind()
    least: int = 0
    most: int = 1000

    @property
    def says(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"a list of {count} values, each {self.kind.says}"

    def takes(self, value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and self.least <= len(value) <= self.most

    def check(self, where: str, value: Any) -> None:
        super().check(where, value)
        for position, entry in enumerate(value):
            self.kind.check(f"{where}.{position}", entry)


@dataclass(frozen=True)
class MapOf(Kind):
    """A mapping with keys of one kind and values of another."""

    keys: Kind = Text(longest=300)
    kind: Kind = Kind()
    most: int = 1000

    @property
    def says(self) -> str:
        return f"a mapping (at most {self.most} keys, each {self.keys.says}) of values, each {self.kind.says}"

    def takes(self, value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) <= self.most

    def check(self, where: str, value: Any) -> None:
        super().check(where, value)
        for key, entry in value.items():
            if not accepts(self.keys, key):
                raise UserError(f"each key of {self.name or where} must be {self.keys.says}, got {shown(key)}")
            self.kind.check(f"{where}.{key}", entry)


@dataclass(frozen=True)
class Section(Kind):
    """A mapping with a row for each key, and rules over several of them.

    Attributes:
        rows: key -> kind.
        required: keys that must exist.
        open: other keys are allowed too.
        rules: each takes the section after its values were checked, and returns a conflict in it, or None.
    """

    rows: Mapping[str, Kind] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    open: bool = False
    rules: tuple[Callable[[Mapping[str, Any]], str | None], ...] = ()

    @property
    def says(self) -> str:
        return "a mapping of settings"

    def takes(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def check(self, where: str, value: Any) -> None:
        super().check(where, value)
        if not self.open:
            check_keys(self.name or where, [key for key in value if key not in HYDRA_KEYS], self.rows)
        if lacking := [key for key in self.required if key not in value]:
            raise UserError(f"{where} lacks {', '.join(lacking)}: give {'it' if len(lacking) == 1 else 'them'} a value")
        for key, entry in value.items():
            self.rows.get(key, INSIDE).check(f"{where}.{key}", entry)
        for rule in self.rules:
            if said := rule(value):
                raise UserError(f"{where}: {said}")


@dataclass(frozen=True)
class Inside(Kind):
    """Any value that can be recorded; mappings in it whose `_target_` has a table are checked by that table."""

    @property
    def says(self) -> str:
        return "null, a flag, a number, a text, a list, or a mapping with texts or whole numbers for keys"

    def takes(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(type(key) in (str, int) and recordable(key) for key in value)
        return isinstance(value, list) or recordable(value)

    def check(self, where: str, value: Any) -> None:
        from sam2_lora_ext.settings.table import TARGETS  # its rows are kinds of this file

        super().check(where, value)
        target = value.get("_target_") if isinstance(value, Mapping) else None
        if isinstance(target, str) and target in TARGETS:
            TARGETS[target].check(where, value)
            return
        entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            INSIDE.check(f"{where}.{key}", entry)


INSIDE = Inside()


@dataclass(frozen=True)
class Part(Inside):
    """The config of an object for Hydra: a mapping with `_target_`, checked by the table of its class if it has one."""

    @property
    def says(self) -> str:
        return "a mapping with _target_, the dotted name of a class or function"

    def takes(self, value: Any) -> bool:
        target = value.get("_target_") if isinstance(value, Mapping) else None
        names = target.split(".") if isinstance(target, str) else [""]
        return super().takes(value) and all(name.isidentifier() for name in names)
