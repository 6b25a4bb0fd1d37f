"""For the fuzz of the settings: all rows of the table that a config has or could have, and values to try in each."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from sam2_lora_ext.settings.containers import Either, ListOf, MapOf, Nullable, Section
from sam2_lora_ext.settings.kinds import Choice, Flag, Kind, Number, Text, Whole
from sam2_lora_ext.settings.table import SECTIONS, TARGETS

HOSTILE = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2**31 - 1,
    2**31,
    2**63,
    10**40,
    -(10**400),
    -0.0,
    0.5,
    1.0,
    1e-320,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    " ",
    "foo",
    "0",
    "1e3",
    "nan",
    "null",
    "true",
    "~",
    "-",
    "a: b",
    "#",
    "???",
    "x" * 5000,
    "nul\0",
    "line\nbreak",
    "\x85",
    "\u2028",
    "\ud800",
    "ä" * 10,
    "'",
    '"',
    "{",
    "0x10",
    "1_000",
    "12:30:00",
    "2001-01-01",
    "=",
    "<<",
    "*",
    "&a",
    "!!python/object",
    "$",
    "\\",
    [],
    [None],
    [[]],
    [1, 2],
    ["a", 1],
    {},
    {"a": {}},
    {1: 1.0},
    {True: 1},
    {"": 1},
    {None: 1},
    {"_target_": "os.system"},
    {"_target_": 5},
    {"_target_": "a.b", "rank": -1},
]


def rows(config: Mapping[str, Any]) -> Iterator[tuple[tuple, Kind]]:
    """The path (keys and list indices) and the kind of every row; of sections also those that the config lacks."""
    for name, section in SECTIONS.items():
        yield from _inside((name,), section, config.get(name))
    yield from _inside(("trainer",), TARGETS[config["trainer"]["_target_"]], config["trainer"])


def _inside(place: tuple, kind: Kind, value: Any) -> Iterator[tuple[tuple, Kind]]:
    yield place, kind
    while isinstance(kind, Nullable):
        kind = kind.kind
    if isinstance(value, Mapping) and value.get("_target_") in TARGETS:
        kind = TARGETS[value["_target_"]]
    if isinstance(kind, Either) and isinstance(value, Mapping):
        kind = next(one for one in kind.kinds if isinstance(one, Section))
    if isinstance(kind, Section) and isinstance(value, Mapping):
        for key, row in kind.rows.items():
            yield from _inside((*place, key), row, value.get(key))
    elif isinstance(kind, MapOf) and isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _inside((*place, key), kind.kind, entry)
    elif isinstance(kind, ListOf) and isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _inside((*place, number), kind.kind, entry)


def values(kind: Kind, drawn: random.Random, hostile: int) -> list[Any]:
    """The ends of a row's range, values just outside, some valid values, and some of `HOSTILE`."""
    found = drawn.sample(HOSTILE, hostile)
    while isinstance(kind, Nullable):
        kind, found = kind.kind, [*found, None]
    if isinstance(kind, Whole):
        found += [
            kind.low,
            kind.high,
            kind.low - 1,
            kind.high + 1,
            drawn.randint(kind.low, kind.high),
            kind.low + kind.multiple,
        ]
    elif isinstance(kind, Number):
        found += [
            kind.low,
            kind.high,
            kind.low - 1e-9,
            kind.high + 1,
            drawn.uniform(kind.low, kind.high),
            int(kind.high),
        ]
    elif isinstance(kind, Choice):
        found += [drawn.choice(kind.words), kind.words[0].upper()]
    elif isinstance(kind, Flag):
        found += [True, False, 0, 1]
    elif isinstance(kind, Text):
        found += ["a name", "./a/b-c_d.e", "ü"]
    elif isinstance(kind, Either):
        found += [value for one in kind.kinds for value in values(one, drawn, 0)]
    elif isinstance(kind, ListOf):
        found += [[value] * max(1, kind.least) for value in values(kind.kind, drawn, 0)]
    elif isinstance(kind, MapOf):
        found += [{1: value, "a": value} for value in values(kind.kind, drawn, 0)] + [
            {2: v} for v in values(kind.kind, drawn, 0)
        ]
    return found


def with_value(tree: Any, place: tuple, value: Any) -> Any:
    """A copy of a config with another value at one path; all other values are shared."""
    if not place:
        return value
    if isinstance(tree, list):
        return [*tree[: place[0]], with_value(tree[place[0]], place[1:], value), *tree[place[0] + 1 :]]
    return {**tree, place[0]: with_value(tree.get(place[0]), place[1:], value)}
