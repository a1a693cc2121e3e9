"""Pairs from Python sources: the docstring of each function, and its code without the docstring."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator

from strawberry.data.documents import Documents
from strawberry.data.inputs import ignore_progress


class DocstringPairs:
    """The pairs in Python sources: the docstring of each function is the source, the function without it the target.

    Files that Python cannot parse are left out; .unparsed counts them.
    """

    def __init__(self, documents: Documents):
        self.documents = documents
        self.unparsed: list[str] = []

    def read(self, progress: Callable[[int], object] = ignore_progress) -> Iterator[tuple[tuple[str, str], bool]]:
        """Yield ((source, target), True) for each pair."""
        self.unparsed = []
        for scanned in self.documents.files:
            text = "".join(part for part, _ in self.documents.read([scanned], progress=progress))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # warnings of deprecated syntax
                    pairs = list(find_docstring_pairs(text))
            except (ValueError, SyntaxError, RecursionError):
                self.unparsed.append(scanned.file.label)
                continue
            yield from ((pair, True) for pair in pairs)

    def notes(self) -> list[str]:
        names = f"{', '.join(self.unparsed[:10])}{' …' if len(self.unparsed) > 10 else ''}"
        unparsed = [f"left out {len(self.unparsed):,} that Python cannot parse: {names}"] if self.unparsed else []
        return [*self.documents.notes(), *unparsed]


def find_docstring_pairs(text: str) -> Iterator[tuple[str, str]]:
    """(docstring, code without it) of each function in a Python source, in the order of the text. Functions with
    docstrings of one word or without other code are skipped.

    >>> list(find_docstring_pairs('def add(a, b):\\n    "Sum of two."\\n    return a + b\\n'))
    [('Sum of two.', 'def add(a, b):\\n    return a + b\\n')]
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(functions, key=lambda node: node.lineno):
        docstring, code = ast.get_docstring(node), remove_docstring(node, lines)
        if docstring and len(docstring.split()) > 1 and code:
            yield docstring, code


def remove_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The dedented source of a function without its docstring. "" if there is no other code, or if the docstring shares
    a line with code.
    """
    doc = node.body[0]
    before = lines[doc.lineno - 1].encode()[: doc.col_offset]
    after = lines[doc.end_lineno - 1].encode()[doc.end_col_offset :].split(b"#")[0]
    if len(node.body) == 1 or before.strip() or after.strip():
        return ""
    body = lines[doc.end_lineno : node.end_lineno]
    while not body[0].strip():  # blank lines after the docstring
        body.pop(0)
    indent = node.col_offset
    kept = [*lines[node.lineno - 1 : doc.lineno - 1], *body]
    return "".join((line if line[:indent].strip() else line[indent:]) + "\n" for line in kept)
