"""The options of a command as a dataclass: read from a command line, listed by --help."""

from collections.abc import Callable, Iterable
from typing import Any

from strawberry.common import UserError, nearest
from strawberry.config import check, declared
from strawberry.run_config import parse_arguments

LISTS = {list[str], list[int]}  # options of these types may be given several times


def parse_settings(
    argv: list[str], cls: type, bare: str | Callable[[str], str], finish: Callable[[dict], Iterable[str]] | None = None
) -> Any:
    """The settings of a command line, an instance of the dataclass `cls`. A list option may be given several times.

    bare: the option that the error for a word without one names, or a function of the word.
    finish: changes the parsed options in place before they are checked, and returns what is wrong with them. Raises
    UserError with all problems in one line.
    """
    known, raw = declared(cls), {}
    config, words, problems = parse_arguments(argv, known, flag_names(cls), bare=bare)
    words += [] if config is None else [("config", config)]  # train.py's; unknown here
    for name, text in words:
        repeats = name in known and bool(LISTS & set(known[name].kinds))
        if name not in known:
            hint = nearest(f"--{name}", [f"--{key}" for key in (*known, "help")])
            problems.append(f"--{name}: unknown option{hint or '; --help lists them'}")
        elif name in raw and not repeats:
            problems.append(f"--{name}: given twice; keep one")
        elif text == "" and known[name].kinds:  # the others take any text
            problems.append(f"--{name}: is empty; give it a value or leave it out")
        elif repeats:
            raw.setdefault(name, []).append(text if list[str] in known[name].kinds else parse_number(text))
        else:
            raw[name] = parse_value(text, known[name].kinds)
    problems += finish(raw) if finish else ()
    settings, found = check(cls, raw)
    if problems := problems + [f"--{problem.removesuffix(' or null')}" for problem in found]:
        raise UserError("; ".join(problems))
    return settings


def flag_names(cls: type) -> list[str]:
    """The options that take no value."""
    return [name for name, key in declared(cls).items() if key.kinds == (bool,)]


def parse_value(text: str, kinds: tuple) -> Any:
    """The number or truth value that a text spells, where the option has one; else the text, which `check` judges."""
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    return parse_number(text) if {int, float} & set(kinds) else text


def parse_number(text: str) -> int | float | str:
    """The number that a text spells, else the text, which `check` then refuses."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def format_help(program: str, cls: type, end: str) -> str:
    """What --help prints: every option of the class with its meaning, what is allowed, and its default."""
    lines, width = [f"usage: python {program} [--option value …]", ""], max(map(len, declared(cls)))
    for name, key in declared(cls).items():
        default = "" if key.default in (None, [], {}) else f"; default {key.default}"
        any_text = not key.kinds or list[str] in key.kinds
        allowed = "text" if any_text else key.allowed.removesuffix(" or null").removeprefix("list of ")
        limits = "no value" if name in flag_names(cls) else f"{allowed}{default}"
        lines.append(f"  --{name:<{width}} {key.doc} [{limits}]")
    return "\n".join([*lines, "", end])
