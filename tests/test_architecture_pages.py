"""The pages of docs/architectures: their Python computes what the implementation computes, their references lead
somewhere."""

import re
from pathlib import Path

import pages_a
import pages_b
import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "architectures"
PAGES = sorted(page.name for page in FOLDER.glob("*.md") if page.name != "README.md")
COMPARISONS = pages_a.COMPARISONS | pages_b.COMPARISONS
LONGEST = 20  # lines of a page's first block


def code_of(page: str) -> str:
    return re.search(r"^```python\n(.*?)^```", (FOLDER / page).read_text("utf-8"), re.S | re.M)[1]


def test_every_page_is_compared_and_listed():
    assert set(PAGES) == set(COMPARISONS)
    listed = set(re.findall(r"\]\(([\w-]+\.md)", (FOLDER / "README.md").read_text("utf-8")))
    assert listed >= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_computes_the_same_as_the_code(page):
    code = code_of(page)
    assert len(code.splitlines()) <= LONGEST
    torch.manual_seed(0)
    namespace: dict = {}
    exec(compile(code, page, "exec"), namespace)
    COMPARISONS[page](namespace)


@pytest.mark.parametrize("page", PAGES)
def test_tests_named_by_a_page_exist(page):
    text = (FOLDER / page).read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", text)
    assert named, "name the test that holds the implementation"
    for file, function in named:
        source = (ROOT / file).read_text("utf-8")
        assert not function or f"\ndef {function}(" in source, f"{file} has no {function}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_named_by_a_page_exist(page):
    """Names in backquotes under "Options and cost" are keys of some config, or values of one."""
    from model import CONFIGS
    from strawberry.config import declared
    from strawberry.run_config import Run

    section = re.search(r"^## Options and cost\n(.*?)(?=^## |\Z)", (FOLDER / page).read_text("utf-8"), re.S | re.M)
    keys = {*CONFIGS}
    for config in (*CONFIGS.values(), Run):
        for name, key in declared(config).items():
            keys |= {name, *map(str, key.choices), *(declared(key.section) if key.section else ())}
    for quoted in re.findall(r"`([^`]+)`", section[1] if section else ""):
        name = quoted.partition(":")[0].strip()
        is_other = not re.fullmatch(r"[a-z][a-z_]*", name)  # a command, a class, a value with other characters
        assert is_other or name in keys, f"{name} is no key"


def test_papers_are_those_that_the_code_cites():
    text = (ROOT / "docs" / "papers.md").read_text("utf-8")
    listed = set(re.findall(r"\| (\d{4}\.\d{5}) \|", text))
    files = [*ROOT.glob("*.py"), *ROOT.glob("strawberry/**/*.py"), *ROOT.glob("docs/architectures/*.md")]
    cited = {number for file in files for number in re.findall(r"arXiv\s+(\d{4}\.\d{5})", file.read_text("utf-8"))}
    assert listed == cited
    for row in re.findall(r"^\| .*\d{4}\.\d{5}.*$", text, re.M):
        number, where = re.search(r"\d{4}\.\d{5}", row)[0], row.rstrip(" |").rpartition("|")[2].split(",")[0].strip()
        assert number in (ROOT / where).read_text("utf-8"), f"{where} does not cite {number}"
