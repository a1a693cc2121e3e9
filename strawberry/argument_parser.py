"""One manner of command line for every script that uses argparse."""

import argparse
from collections.abc import Sequence

from strawberry.common import UserError, nearest


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors in one line, whole names of options only, and values that may begin with a dash.

    parser = ArgumentParser("prepare.py", "Turn text into a token file.")

    Both `--name value` and `--name=value` work. In the first any word is a value, unless it is one of the options; an
    option that takes several values takes one that begins with a dash as `--name=-value` only. Mistakes are raised as
    UserError.
    """

    def __init__(self, script: str, description: str, **options):
        super().__init__(prog=f"python {script}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        return super().parse_known_args(list(self._join_values(list(args))), namespace)

    def _join_values(self, rest: list[str]):
        """The words, with `--name=value` for `--name value`: argparse takes no dash at the start of a word of its own.
        An unknown option is refused here, before argparse misses the one that was meant."""
        known = self._option_string_actions
        while rest:
            word = rest.pop(0)
            name, equals, _ = word.partition("=")
            if word == "--":  # what follows is no option
                yield from [word, *rest]
                return
            if name in known and not equals and known[name].nargs is None:
                if rest and rest[0].partition("=")[0] not in known:
                    word = f"{name}={rest.pop(0)}"
            elif name not in known and word.startswith("-") and word != "-":
                raise UserError(f"{name}: unknown option{nearest(name, known) or f'; {self.prog} --help lists them'}")
            yield word
