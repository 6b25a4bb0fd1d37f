"""PEFT's `rank_pattern` and `alpha_pattern`: regular expressions from a file, matched to module names in bounded time.

Python's own engine backtracks, and `(a+)+b` has 2^n paths. Here the states of the automaton are simulated in parallel
(Thompson, 1968): one step for each character of the name and each state of the pattern; steps are counted.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from re import _constants as sre  # operations of the standard library's parser
from re import _parser
from typing import Any

from sam2_lora_ext.utils.errors import UserError

LONGEST_NAME = 500  # characters; SAM 2's longest has 66
LONGEST_PATTERN = 500
MOST_PLACES = 2_000  # states of a pattern with its repeats expanded
MOST_STEPS = 10_000_000  # of all names and patterns of one adapter: seconds
WORD = re.compile(r"(?:[\w.]|\\[^\w\s])*")  # a literal name; a bare dot matches any character
FIRST, LAST = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING), (sre.AT_END, sre.AT_END_STRING)
Test = Callable[[str], bool]
CATEGORIES: Mapping[Any, Test] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda one: not one.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda one: not one.isspace(),
    sre.CATEGORY_WORD: lambda one: one.isalnum() or one == "_",
    sre.CATEGORY_NOT_WORD: lambda one: not (one.isalnum() or one == "_"),
}


class NamePatterns:
    """Values by pattern, with PEFT's rule: the first key that matches the name, or its end after a dot, wins.

    Args:
        values: pattern -> value; None for none.
        where: the file that contains them, for messages.

    Raises:
        UserError: a pattern is not a regular expression, is too large, or has operations that cannot be matched in
            bounded time: back references and lookaround.
    """

    def __init__(self, values: Mapping[str, Any] | None, where: str):
        self.where, self.steps = where, 0
        self.patterns = [(key, value, self._automaton(key)) for key, value in (values or {}).items()]

    def value(self, name: str, default: Any) -> Any:
        """The value of a module; `default` where no pattern matches."""
        if len(name) > LONGEST_NAME:
            raise UserError(f"{self.where} is damaged: it names a module of {len(name):,} characters, too many")
        for key, value, automaton in self.patterns:
            if automaton is None:
                if re.match(rf"(.*\.)?({key})$", name):
                    return value
                continue
            matches, steps = automaton.match_end(name)
            self.steps += steps
            if self.steps > MOST_STEPS:
                self._refuse(key)("takes too long to match")
            if matches:
                return value
        return default

    def _automaton(self, key: str) -> "Automaton | None":
        if len(key) > LONGEST_PATTERN:
            self._refuse(f"{key[:50]}...")(f"has {len(key):,} characters, expected at most {LONGEST_PATTERN}")
        if WORD.fullmatch(key):
            return None
        try:
            parsed = _parser.parse(key)
            if parsed.state.flags & ~re.UNICODE:
                self._refuse(key)("sets flags, which PEFT's rule does not support")
            return Automaton(parsed, self._refuse(key))
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(key)(f"is not a regular expression ({error})")

    def _refuse(self, key: str) -> Callable[[str], None]:
        def refuse(cause: str) -> None:
            advice = "name the modules, or use only . * + ? | ( ) [ ]"
            raise UserError(f"the pattern {key!r} in {self.where} {cause}: {advice}")

        return refuse


class Automaton:
    """A parsed pattern as an automaton: each state has empty transitions, or one transition that tests a character."""

    def __init__(self, parsed: Any, refuse: Callable[[str], None]):
        self.refuse = refuse
        self.free: list[list[int]] = []
        self.first_only: set[int] = set()  # states that are passed only at the beginning of the name: `^`
        self.last_only: set[int] = set()  # states that are passed only at its end: `$`
        self.ways: list[tuple[Test, int] | None] = []
        self.start = self._place()
        self.end = self._sequence(parsed, self.start)

    def match_end(self, name: str) -> tuple[bool, int]:
        """Whether the pattern matches the name or its end after a dot, and the number of steps."""
        steps, active = 0, set()
        for position in range(len(name) + 1):
            if position == 0 or name[position - 1] == ".":
                active.add(self.start)
            reached = self._closure(active, position == 0, position == len(name))
            steps += len(reached) + 1
            if position == len(name):
                return self.end in reached, steps
            ways = [self.ways[place] for place in reached]
            active = {way[1] for way in ways if way is not None and way[0](name[position])}
        return False, steps

    def _closure(self, places: Iterable[int], first: bool, last: bool) -> set[int]:
        """The states reachable by empty transitions."""
        reached, waiting = set(), list(places)
        while waiting:
            place = waiting.pop()
            if place in reached or place in self.first_only and not first or place in self.last_only and not last:
                continue
            reached.add(place)
            waiting += self.free[place]
        return reached

    def _place(self) -> int:
        if len(self.free) >= MOST_PLACES:
            self.refuse(f"expands to more than {MOST_PLACES:,} characters")
        self.free.append([])
        self.ways.append(None)
        return len(self.free) - 1

    def _sequence(self, parsed: Any, place: int) -> int:
        for operation, argument in parsed:
            place = self._add(operation, argument, place)
        return place

    def _add(self, operation: Any, argument: Any, place: int) -> int:
        """Adds one operation after a state; returns the state after it."""
        if operation is sre.SUBPATTERN and not argument[1] and not argument[2]:
            return self._sequence(argument[3], place)
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(*argument, place)
        after = self._place()
        if operation is sre.BRANCH:
            for branch in argument[1]:
                begin = self._place()
                self.free[place].append(begin)
                self.free[self._sequence(branch, begin)].append(after)
        elif operation is sre.AT and argument in (*FIRST, *LAST):
            (self.first_only if argument in FIRST else self.last_only).add(after)
            self.free[place].append(after)
        else:
            step = self._place()
            self.free[place].append(step)
            self.ways[step] = self._test(operation, argument), after
        return after

    def _repeat(self, least: int, most: Any, parsed: Any, place: int) -> int:
        for _ in range(least):
            place = self._sequence(parsed, place)
        after = self._place()
        if most is sre.MAXREPEAT:
            begin = self._place()
            self.free[place] += [begin, after]
            self.free[self._sequence(parsed, begin)].append(place)
            return after
        for _ in range(most - least):
            self.free[place].append(after)
            place = self._sequence(parsed, place)
        self.free[place].append(after)
        return after

    def _test(self, operation: Any, argument: Any) -> Test:
        """The characters that an operation accepts."""
        if operation is sre.LITERAL:
            return lambda one: ord(one) == argument
        if operation is sre.NOT_LITERAL:
            return lambda one: ord(one) != argument
        if operation is sre.ANY:
            return lambda one: one != "\n"
        if operation is sre.RANGE:
            return lambda one: argument[0] <= ord(one) <= argument[1]
        if operation is sre.CATEGORY:
            return CATEGORIES[argument]
        if operation is sre.IN:
            tests = [self._test(*entry) for entry in argument if entry[0] is not sre.NEGATE]
            wanted = argument[0][0] is not sre.NEGATE
            return lambda one: any(test(one) for test in tests) == wanted
        self.refuse("has an operation that cannot be matched in bounded time (a back reference, lookaround, a flag)")
        raise AssertionError(operation)
