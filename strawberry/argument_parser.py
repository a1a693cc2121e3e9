"""The command-line parser that every argparse script uses."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Sequence

from strawberry.common import UserError, nearest


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, without abbreviated options, and with values that may begin with a dash.

    parser = ArgumentParser("prepare.py", "Turn text into a token file.")

    Both `--name value` and `--name=value` are accepted. In the first form, any word that is not an option is a value.
    An option with several values accepts a value that begins with a dash only as `--name=-value`. Raises UserError for
    invalid command lines.

    renamed: old name of an option → its name. An old name works, and a warning on stderr names the new one.
    """

    def __init__(self, script: str, description: str, renamed: dict[str, str] | None = None, **options):
        super().__init__(prog=f"python {script}", description=description, allow_abbrev=False, **options)
        self.renamed = renamed or {}

    def add_argument(self, *names: str, type: Callable | None = None, **options) -> argparse.Action:
        """As argparse's; an error of `type` names the option."""
        return super().add_argument(*names, **options, **({"type": report_as_argument(type)} if type else {}))

    def error(self, message: str) -> None:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            message = f"{str(value)!r} is none of {', '.join(known)}{nearest(str(value), known)}"
            raise argparse.ArgumentError(action, message)

    def refuse_unused(self, given: argparse.Namespace, names: Iterable[str], why: str) -> None:
        """Raises UserError for an option that would change nothing, if it differs from its default."""
        for name in names:
            if getattr(given, name) != self.get_default(name):
                raise UserError(f"--{name} {getattr(given, name)}: {why}, or leave --{name} out")

    def parse_known_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        return super().parse_known_args(list(self._join_values([self._rename(word) for word in args])), namespace)

    def _rename(self, word: str) -> str:
        old, equals, value = word.partition("=")
        if old not in self.renamed:
            return word
        new = self.renamed[old]
        print(f"warning: {old} is now called {new}: write {new}", file=sys.stderr)
        return f"{new}{equals}{value}"

    def _join_values(self, rest: list[str]):
        """Yields the words with `--name value` joined to `--name=value`, because argparse does not accept a separate
        value that begins with a dash. Raises UserError for an unknown option, before argparse reports the intended
        option as missing."""
        known = self._option_string_actions
        while rest:
            word = rest.pop(0)
            name, equals, _ = word.partition("=")
            if word == "--":  # the following words are not options
                yield from [word, *rest]
                return
            if name in known and not equals and known[name].nargs is None:
                if rest and rest[0].partition("=")[0] not in known:
                    word = f"{name}={rest.pop(0)}"
            elif name not in known and word.startswith("-") and word != "-":
                raise UserError(f"{name}: unknown option{nearest(name, known) or f'; {self.prog} --help lists them'}")
            yield word


NUMBERS = {int: "whole number", float: "number"}


def report_as_argument(parse: Callable) -> Callable:
    """`parse`, whose UserError argparse then reports with the option's name, as it does text that is no number."""

    @functools.wraps(parse, updated=())  # argparse names int and float in its own messages
    def parse_argument(text: str):
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except ValueError as error:
            if parse not in NUMBERS:
                raise
            raise argparse.ArgumentTypeError(f"{text!r} is no {NUMBERS[parse]}") from error

    return parse_argument
