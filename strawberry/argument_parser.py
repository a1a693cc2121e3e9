"""The command-line parser that every argparse script uses."""

import argparse
from collections.abc import Sequence

from strawberry.common import UserError, nearest


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, without abbreviated options, and with values that may begin with a dash.

    parser = ArgumentParser("prepare.py", "Turn text into a token file.")

    Both `--name value` and `--name=value` are accepted. In the first form, any word that is not an option is a value.
    An option with several values accepts a value that begins with a dash only as `--name=-value`. Raises UserError for
    invalid command lines.
    """

    def __init__(self, script: str, description: str, **options):
        super().__init__(prog=f"python {script}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        return super().parse_known_args(list(self._join_values(list(args))), namespace)

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
