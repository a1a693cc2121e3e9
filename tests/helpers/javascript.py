"""The functions of a JavaScript file, found without a JavaScript program: enough of the language for modules that a
formatter has written.

Strings, templates, regular expressions and comments are skipped. A regular expression is told from a division by what
stands before it. Every statement ends with a semicolon or a brace.
"""

import re
from typing import NamedTuple

BLOCKS = {"if", "for", "while", "switch", "catch", "with", "await"}  # `word (…) {` that is no function
BEFORE_REGEX = {"return", "typeof", "case", "in", "of", "delete", "void", "throw", "new", "else", "do", "await",
                "yield"}  # fmt: skip
TOKEN = re.compile(
    r"""(?P<space>\s+ | //[^\n]* | /\*.*?\*/)
      | (?P<string>"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*')
      | (?P<word>[\w$\#]+)
      | (?P<sign>=> | [^\w\s])""",
    re.S | re.X,
)
REGEX = re.compile(r"/(?:[^/\\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/\w*")
TEMPLATE = re.compile(r"(?:[^`\\$]|\\.|\$(?!\{))*(`|\$\{)", re.S)
PAIRS = {"(": ")", "[": "]", "{": "}", "${": "}"}


class Token(NamedTuple):
    kind: str
    text: str
    line: int


class Function(NamedTuple):
    name: str
    line: int
    lines: int


def tokens_of(text: str) -> list[Token]:
    """All tokens; a template is one, except for what stands in its ${…}."""
    found, at, nesting = [], 0, []

    def add(kind: str, end: int) -> None:
        nonlocal at
        if kind != "space":
            found.append(Token(kind, text[at:end], text.count("\n", 0, at) + 1))
        at = end

    def add_template() -> None:
        """From behind ` or } to behind the next ${ or `."""
        end = TEMPLATE.match(text, at).end()
        is_whole = text[end - 1] == "`"
        add("string", end if is_whole else end - 2)
        if not is_whole:
            add("sign", end)
            nesting.append("${")

    while at < len(text):
        before = found[-1] if found else Token("sign", ";", 0)
        is_operand = before.kind == "string" or before.text in (")", "]") or (
            before.kind == "word" and before.text not in BEFORE_REGEX)  # fmt: skip
        match = TOKEN.match(text, at)
        sign = match["sign"]
        if sign == "`":
            add("sign", at + 1)
            found.pop()
            add_template()
        elif sign == "/" and not is_operand:
            add("string", REGEX.match(text, at).end())
        else:
            if sign == "{":
                nesting.append("{")
            add(match.lastgroup, match.end())
            if sign == "}" and nesting.pop() == "${":
                add_template()
    return found


def functions_of(text: str) -> list[Function]:
    """Functions, methods and arrow functions, with the line where each begins and how many it has."""
    tokens, found = tokens_of(text), []
    brackets: list[tuple[int, int | None]] = []  # each open bracket; where the function begins whose body it opens
    arrows: list[tuple[int, int]] = []  # arrow functions without braces: where each begins, how many brackets are open
    opened: dict[int, int] = {}  # index of a closing bracket → of its opening one

    def end_function(start: int, end: int) -> None:
        first, last = tokens[start], tokens[end]
        found.append(Function(name_of(tokens, start), first.line, last.line + last.text.count("\n") - first.line + 1))

    for i, token in enumerate(tokens):
        text = token.text if token.kind == "sign" else ""
        if text in (",", ";", ")", "]", "}"):
            while arrows and arrows[-1][1] == len(brackets):
                end_function(arrows.pop()[0], i - 1)
        if text == "=>" and tokens[i + 1].text != "{":
            arrows.append((opened.get(i - 1, i - 1), len(brackets)))
        elif text in PAIRS:
            brackets.append((i, start_of_function(tokens, i, opened) if text == "{" else None))
        elif text in PAIRS.values():
            opened[i], start = brackets.pop()
            assert PAIRS[tokens[opened[i]].text] == text, f"line {token.line}: {text} closes {tokens[opened[i]]}"
            if start is not None:
                end_function(start, i)
    assert not brackets, f"nothing closes {tokens[brackets[-1][0]]}"
    return found


def start_of_function(tokens: list[Token], brace: int, opened: dict[int, int]) -> int | None:
    """Where the function begins whose body opens at `brace`; None for a block, an object or a class."""
    before = tokens[brace - 1]
    if before.text == "=>":
        return opened.get(brace - 2, brace - 2)
    if before.text != ")" or before.kind != "sign":
        return None
    name = tokens[opened[brace - 1] - 1]
    is_name = name.kind != "sign" or name.text == "]"
    return opened[brace - 1] - 1 if is_name and name.text not in BLOCKS else None


def name_of(tokens: list[Token], start: int) -> str:
    """A function's name, or that of the variable which it is given to; "" where there is none."""
    before = start - 1 if start and tokens[start - 1].text == "async" else start
    if before > 1 and tokens[before - 1].text == "=":
        return tokens[before - 2].text
    return tokens[start].text if tokens[start + 1].text == "(" else ""
