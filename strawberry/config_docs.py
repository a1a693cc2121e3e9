"""Documentation generated from the declared config keys: `python -m strawberry.config_docs --schema` writes
config/schema.json, with which editors complete and check configs; `--table` prints the README's table of keys."""

import json

from model import CONFIGS
from strawberry.argument_parser import ArgumentParser
from strawberry.common import atomic_write, run_cli, show
from strawberry.config import Option, declared, object_schema, sections
from strawberry.run_config import CONFIG_FOLDER, Run, take_arch


def table(archs: dict[str, type]) -> str:
    """The README's tables of keys, in Markdown: one for each object of the JSON file, and for model_hyperparams one for
    each arch."""

    def rows(title: str, keys: dict[str, Option]) -> list[str]:
        lines = [f"**{title}**", "", "| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for name, key in keys.items():
            cells = (f"`{name}`", f"`{show(key.default)}`", key.allowed, key.doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
        return [*lines, ""]

    lines = []
    for prefix, doc, keys in sections(Run):
        plain = {name: key for name, key in keys.items() if name != "model_hyperparams"}
        lines += rows(f"`{prefix.rstrip('.')}`: {doc}" if prefix else "The run", plain)
    for arch, cls in archs.items():
        for prefix, doc, keys in sections(cls, "model_hyperparams."):
            lines += rows(f"`{prefix.rstrip('.')}` of arch `{arch}`" + (f": {doc}" if doc else ""), keys)
    return "\n".join(lines)


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
    what.add_argument("--table", action="store_true", help="print the README's table of keys")
    if parser.parse_args(argv).schema:
        text = json.dumps(schema(CONFIGS), indent=2, ensure_ascii=False) + "\n"
        atomic_write(CONFIG_FOLDER / "schema.json", text.encode())
    else:
        print(table(CONFIGS))
    return 0


if __name__ == "__main__":
    run_cli(main)
