"""The doctor's findings: green, yellow and red lines, the yellow and red ones with advice."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

from sam2_lora_ext.utils.errors import find_user_error, system_sentence

Level = Literal["green", "yellow", "red"]
COLOURS = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
MARKS = {"green": "ok  ", "yellow": "note", "red": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One line: green for a passed check, yellow for a warning, red for an error."""

    level: Level
    area: str
    text: str
    advice: str = ""


def green(area: str, text: str) -> Finding:
    """A check that passed."""
    return Finding("green", area, text)


def yellow(area: str, text: str, advice: str) -> Finding:
    """A warning."""
    return Finding("yellow", area, text, advice)


def red(area: str, text: str, advice: str) -> Finding:
    """An error: the training will not work."""
    return Finding("red", area, text, advice)


def root_cause(error: BaseException) -> str:
    """The innermost cause of an error in one line; the text of a `UserError` is unchanged."""
    if mistake := find_user_error(error) or system_sentence(error):
        return str(mistake)
    seen: set[int] = set()
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None and id(
        inner
    ) not in seen:
        seen.add(id(inner))
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def guarded(area: str, check: Callable[[], Iterable[Finding]], advice: str) -> Iterator[Finding]:
    """The findings of a check; an exception becomes a red finding with its cause, so that other checks can run."""
    try:
        yield from check()
    except (Exception, SystemExit) as error:
        yield red(area, root_cause(error), "" if find_user_error(error) else advice)


def show(finding: Finding, file: TextIO = sys.stdout) -> None:
    """Prints a finding, in colour on a terminal."""
    start, end = (COLOURS[finding.level], "\033[0m") if file.isatty() else ("", "")
    print(f"{start}{MARKS[finding.level]}{end}  {finding.area:<11} {finding.text}", file=file)
    if finding.advice:
        print(f"{'':18}-> {finding.advice}", file=file, flush=True)


def to_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings as `{ok, counts, findings}`, for --json."""
    rows = list(findings)
    counts = {level: sum(row.level == level for row in rows) for level in COLOURS}
    return {"ok": not counts["red"], "counts": counts, "findings": [asdict(row) for row in rows]}
