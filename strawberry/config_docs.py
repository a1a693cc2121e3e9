"""Documentation generated from the declared config keys: `python -m strawberry.config_docs --schema` writes
config/schema.json, with which editors complete and check configs; `--options` writes docs/options.md, the tables of all
keys."""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import json
from pathlib import Path

from model import CONFIGS
from strawberry.argument_parser import ArgumentParser
from strawberry.common import atomic_write, run_cli, show
from strawberry.config import Option, declared, object_schema, sections
from strawberry.run_config import CONFIG_FOLDER, Run, take_arch

OPTIONS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
INTRODUCTION = """# Options

Every key of the JSON, with its default. `python -m strawberry.config_docs --options` generates this page.

Any key can also be set on the command line, a nested key with a dot: `--checkpoints.keep=5`. `python train.py --help`
prints the same list; add `--model_hyperparams.arch=palm` for the keys of another family.
"""


def format_rows(title: str, keys: dict[str, Option]) -> list[str]:
    """The Markdown lines of one group of keys; none where there are no keys."""
    if not keys:
        return []
    lines = [f"## {title}", "", "| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for name, key in keys.items():
        cells = (f"`{name}`", f"`{show(key.default)}`", key.allowed, key.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return [*lines, ""]


def table(archs: dict[str, type]) -> str:
    """Markdown tables, one for each object of the JSON. Keys of `model_hyperparams` that all architectures share are
    in one table, so that an architecture's own table has only what differs."""
    lines = []
    for prefix, doc, keys in sections(Run):
        plain = {name: key for name, key in keys.items() if name != "model_hyperparams"}
        lines += format_rows(f"`{prefix.rstrip('.')}`: {doc}" if prefix else "The run", plain)
    groups = [{prefix: (doc, keys) for prefix, doc, keys in sections(cls, "model_hyperparams.")}
              for cls in archs.values()]  # fmt: skip
    shared = {}  # prefix → what all architectures have there in common
    for prefix, (doc, keys) in groups[0].items():
        others = [group.get(prefix, ("", {}))[1] for group in groups[1:]]
        shared[prefix] = {name: key for name, key in keys.items() if all(its.get(name) == key for its in others)}
        title = f"`{prefix.rstrip('.')}` of every `arch`" + (f": {doc}" if doc else "")
        lines += format_rows(title, shared[prefix])
    for arch, group in zip(archs, groups, strict=True):
        for prefix, (doc, keys) in group.items():
            own = {name: key for name, key in keys.items() if name not in shared.get(prefix, {})}
            lines += format_rows(f"`{prefix.rstrip('.')}` of `{arch}`" + (f": {doc}" if doc else ""), own)
    return "\n".join(lines)


def options_page(archs: dict[str, type]) -> str:
    """The text of docs/options.md."""
    return f"{INTRODUCTION}\n{table(archs)}"


def schema(archs: dict[str, type]) -> dict:
    """A JSON schema (draft 2020-12) of the config files, with which editors complete, explain and check keys."""
    default, _ = take_arch({}, archs)
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A training run", **object_schema(Run)}
    root["properties"]["$schema"] = {"type": "string", "description": "where this schema is, for editors"}
    model = {"type": "object", "description": declared(Run)["model_hyperparams"].doc}
    model["properties"] = {"arch": {"enum": list(archs), "default": default}}
    model["allOf"] = []
    for arch, cls in archs.items():
        is_arch = {"properties": {"arch": {"const": arch}}, "required": [] if arch == default else ["arch"]}
        model["allOf"].append({"if": is_arch, "then": object_schema(cls)})
    root["properties"]["model_hyperparams"] = model
    return root


def main(argv: list[str]) -> int:
    parser = ArgumentParser("-m strawberry.config_docs", "Generate what the declared keys say.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schema", action="store_true", help="write config/schema.json")
    what.add_argument("--options", action="store_true", help="write docs/options.md")
    if parser.parse_args(argv).schema:
        text = json.dumps(schema(CONFIGS), indent=2, ensure_ascii=False) + "\n"
        atomic_write(CONFIG_FOLDER / "schema.json", text.encode())
    else:
        atomic_write(OPTIONS_PAGE, options_page(CONFIGS).encode())
    return 0


if __name__ == "__main__":
    run_cli(main)
