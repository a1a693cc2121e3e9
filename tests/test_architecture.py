"""The structure of the code: which room may import which, that model.py holds architectures only, and how long a
function may be, in Python and in the page's JavaScript.

KNOWN lists today's violations, and a test fails when one of them is gone but still listed: the lists only shrink.
"""

import ast
import functools
import re
from pathlib import Path

import pytest
from javascript import Function, functions_of

ROOT = Path(__file__).parent.parent

# Rooms from the bottom up. A module may import from its own room and from rooms below it.
ROOMS = [
    ("common", ("strawberry.argument_parser", "strawberry.command_line", "strawberry.common", "strawberry.config",
                "strawberry.device", "strawberry.environment", "strawberry.machine", "strawberry.outputs",
                "strawberry.run_config", "strawberry.startup", "strawberry.status_file",
                "strawberry.data.documents", "strawberry.data.inputs", "strawberry.data.json_entries")),
    ("ops.triton", ("strawberry.ops.triton",)),
    ("ops, cache", ("strawberry.ops", "strawberry.cache", "strawberry.context", "strawberry.compile",
                    "strawberry.stack", "strawberry.summary", "strawberry.sharding", "strawberry.initialization")),
    ("model", ("model", "optimizer", "encoder")),
    ("model files", ("strawberry.config_docs", "strawberry.model_file", "strawberry.training.checkpoint")),
    ("other programs' files", ("strawberry.huggingface",)),
    ("data", ("strawberry.data",)),
    ("training", ("strawberry.training",)),
    ("inference", ("strawberry.inference",)),
    ("train", ("train",)),
    ("notebook", ("strawberry.notebook",)),
    ("serving, bench", ("strawberry.serving", "strawberry.bench")),
    ("scripts", ("sample", "prepare", "serve", "bench", "export")),
]

# modules that reach themselves through their imports
KNOWN_CIRCLES = set()
# questions about the implementation in model.py: how often each is asked
KNOWN_QUESTIONS = {}
# functions that are longer than LONGEST
KNOWN_LONG = {"aft_backward_kernel"}
LONGEST = 60  # lines
QUESTIONS = {
    "compiling": r"is_compiling",
    "device": r"\.is_cuda",
    "quantized": r"isinstance\([^)]*Int8",
    "float8": r"Float8\.\w+",
    "kernels": r"kernels\.\w+|can_fuse_(?!loss)\w+",
}


@functools.cache
def modules() -> dict[str, Path]:
    """Module name → file, of all that the project ships."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("strawberry/**/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return {name: path for path, name in names.items()}


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Statements at any depth. Expressions, most of the nodes, contain none."""
    found = [ast.parse(path.read_text("utf-8"))]
    for node in found:
        kinds = (ast.stmt, ast.ExceptHandler, ast.match_case)
        found += [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)]
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The project's modules that a file imports, at its top or inside a function."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & known  # modules of a package
            found |= parts or {node.module}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path} imports relatively: write the module's whole name")
    return found & known


@functools.cache
def edges() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(path, set(known)) - {name} for name, path in known.items()}


def room_of(module: str) -> int:
    found = [(len(prefix), i) for i, (_, prefixes) in enumerate(ROOMS) for prefix in prefixes
             if module == prefix or module.startswith(prefix + ".")]  # fmt: skip
    assert found or module == "strawberry", f"{module} is in no room: give it one in ROOMS"
    return max(found)[1] if found else 0


def test_modules_import_only_from_lower_layers():
    """From scripts to common code, never up, and no script is imported."""
    scripts = len(ROOMS) - 1
    wrong = {
        f"{name} → {other}"
        for name, others in edges().items()
        for other in others
        if room_of(other) > room_of(name) or (room_of(other) == scripts and name != other)
    }
    assert not wrong


def test_no_module_imports_itself_through_others():
    graph = edges()

    def reaches(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - found:
                found.add(other)
                todo.append(other)
        return found

    circles = {name for name in graph if name in reaches(name)}
    assert circles == KNOWN_CIRCLES


def test_model_does_not_choose_implementations_of_operations():
    """model.py calls operations; which implementation runs is chosen in strawberry/ops."""
    text = (ROOT / "model.py").read_text("utf-8")
    asked = {name: len(re.findall(pattern, text)) for name, pattern in QUESTIONS.items()}
    assert {name: n for name, n in asked.items() if n} == KNOWN_QUESTIONS


# ---- how long functions are ----------------------------------------------------------------------------------------


def test_functions_of_python_are_short():
    found = set()
    for path in [*modules().values(), *ROOT.glob("tests/**/*.py")]:
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= LONGEST:
                found.add(node.name)
    assert found == KNOWN_LONG


def test_functions_of_the_page_are_short():
    """No closure holds a whole view: a view is made of small parts."""
    scripts = [path for path in ROOT.glob("strawberry/serving/page/*.js") if not path.name.endswith(".min.js")]
    found = {path.name: functions_of(path.read_text("utf-8")) for path in scripts}
    assert found and all(found.values()), "a module without functions: is it read?"
    assert not [(name, one) for name, functions in found.items() for one in functions if one.lines > LONGEST]


TRAPS = r"""// a comment { with ( open [ brackets
/* and one of { several
   lines */
import { a } from "./a{.js";
const one = x => x / 2 / a;
const many = (x, y) =>
  el(
    "p{",
    {},
    `a template } with ${[x].map(y => `${y / 2} \` {`)} and { ${"`"}`,
    'it\'s {'
  );
const wanted = async ({ b, c }) => {
  if (/[/{]\/(/.test(b)) return /}/g;
  for (const d of c) {
    d.e = { f: 1 };
  }
};
class Part {
  #list = [];
  constructor(g = {}) {
    this.g = g;
  }

  async *walk() {
    for await (const h of this.g) yield h;
  }

  get size() { return this.#list.length / 2; }
}
export function mount(root) {
  root.onclick = function () {
    root.remove();
  };
  return root.list.map(item => [item, item]);
}
"""


def test_functions_are_found_among_brackets_that_are_none():
    found = {(function.name, function.line, function.lines) for function in functions_of(TRAPS)}
    assert found == {
        ("one", 5, 1),
        ("many", 6, 7),
        ("", 10, 1),
        ("wanted", 13, 6),
        ("constructor", 21, 3),
        ("walk", 25, 3),
        ("size", 29, 1),
        ("mount", 31, 6),
        ("onclick", 32, 3),
        ("", 35, 1),
    }


def test_a_closure_that_is_too_long_is_found():
    inner = "".join(f"  const part{i} = () => {{\n    use({i});\n  }};\n" for i in range(20))
    assert Function("mount", 1, 62) in functions_of(f"export function mount(root) {{\n{inner}}}\n")
    with pytest.raises(AssertionError, match="closes"):
        functions_of("const f = () => { return (1; }")
