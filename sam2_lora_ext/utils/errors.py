"""The error type for users' mistakes, and how to find the mistake behind another error."""

from collections.abc import Iterable

LISTED = 20  # largest number of choices in a message


class UserError(ValueError):
    """A mistake that the user can correct: one sentence with the error, its location and the fix."""


def check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises a `UserError` that names the first of the `given` keys of a setting that is not among the `known` ones."""
    import difflib  # not at the top: command lines import this file first

    choices = list(known)
    for key in given:
        if key not in choices:
            near = difflib.get_close_matches(str(key)[:100], choices, LISTED, cutoff=0)
            more = f" and {len(choices) - len(near)} more" if len(choices) > len(near) else ""
            listed = ", ".join(near if more else choices)
            meant = difflib.get_close_matches(str(key)[:100], choices, 1)
            asked = f", did you mean {meant[0]!r}? Choose" if meant else ": choose"
            raise UserError(f"{where} has no setting {str(key)[:100]!r}{asked} from {listed or 'none'}{more}")


def find_user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` at the end of a chain of causes, for frameworks (Hydra) that wrap exceptions."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = error.__cause__  # not `__context__`: an error raised while another one was handled may be a bug of ours
    return None


def system_sentence(error: BaseException | None) -> str | None:
    """A sentence for the system's errors about files and memory; None for other errors."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError):
            cause = f": {error}" if str(error) else ""
            return f"there is not enough memory{cause}; give smaller inputs, or use a larger machine"
        if isinstance(error, OSError) and error.filename is not None:
            name = str(error.filename)
            name = name if len(name) <= 500 else f"{name[:200]}...{name[-100:]}"
            cause = error.strerror or type(error).__name__
            return f"cannot use {name!r}: {cause}; check the name, the folder and its permissions"
        seen.add(id(error))
        error = error.__cause__  # an error raised while another one was handled may be a bug of ours
    return None
