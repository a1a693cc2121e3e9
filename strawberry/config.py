"""Configuration classes: declare, read, check and describe the keys of a JSON file.

A config is a dataclass whose fields are declared with `option(default, doc, bounds …)`. Type (the annotation), default,
bounds and meaning are written there and nowhere else; validation, `train.py --help`, docs/options.md and
config/schema.json are all derived from them. Pydantic checks values and writes the schema; the messages are ours.

Index:  declaring · reading JSON · checking · describing
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from strawberry.common import NO_PATH, UserError, has_control_character, nearest, show

# ---- declaring -------------------------------------------------------------------------------------------------------


def option(
    default: Any, doc: str, *, low=None, high=None, above=None, below=None, choices=None, path=False, must=""
) -> Any:
    """A dataclass field with its meaning and bounds: low and high inclusive, above and below exclusive.

    On a list the bounds hold for each item; a list, dict or dataclass given as default is copied for each instance.
    `choices` are the valid strings (other types in the annotation are bounded as usual: `int | str`, choices ["auto"]).
    `path`: its text names a file or a directory, which no one but the machine's owner may choose.
    `must`: what the value must be, in words; the annotation then is a type of pydantic's, with bounds of its own.
    """
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "below": below, "choices": choices, "path": path}
    metadata["must"] = must
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: dataclasses.replace(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """What a config class declares about one key; `kinds` are the members of its annotation, `int | None` has two."""

    kinds: tuple
    default: Any
    doc: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False
    must: str = ""

    @property
    def section(self) -> type | None:
        """The dataclass of a nested object, else None."""
        return next((kind for kind in self.kinds if dataclasses.is_dataclass(kind)), None)

    @property
    def allowed(self) -> str:
        """The values that the key accepts, for a table: `integer >= 1 or null`."""
        return self._describe({int: "integer", float: "number"}, {}, "list of")

    @property
    def rule(self) -> str:
        """What a value must be, for a sentence: `an integer >= 1 or null`."""
        return self._describe({int: "an integer", float: "a number"}, {int: "integers", float: "numbers"}, "a list of")

    def _describe(self, numbers: dict[type, str], items: dict[type, str], list_of: str) -> str:
        """`items`: the words for numbers in a list, where they differ."""
        if self.must:
            return self.must
        words = {type(None): "null", bool: "true or false", str: "text"} | numbers
        signs = {">=": self.low, ">": self.above, "<=": self.high, "<": self.below}
        bounds = " and ".join(f"{sign} {limit}" for sign, limit in signs.items() if limit is not None)
        parts = []
        for kind in self.kinds:
            item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
            known = words if item is kind else words | items
            word = "{ section }" if dataclasses.is_dataclass(kind) else known.get(item, "anything")
            if item is str and self.choices:
                word = " or ".join(map(show, self.choices))
            if item in (int, float) and bounds:
                word += f" {bounds}"
            parts.append(word if item is kind else f"{list_of} {word}")
        return " or ".join(parts) or "anything"


@functools.cache
def declared(cls: type) -> dict[str, Option]:
    """Every key of a config class, in order."""
    hints, found = typing.get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):
        hint, meta = hints[field.name], dict(field.metadata)
        union = typing.get_origin(hint) in (typing.Union, types.UnionType) and not meta["must"]
        kinds = typing.get_args(hint) if union else () if hint is Any else (hint,)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        meta["choices"] = tuple(meta.get("choices") or ())
        found[field.name] = Option(kinds, default, **meta)
    return found


def dotted_names(cls: type, prefix: str = "") -> list[str]:
    """The dotted names of every key, sections included: `dataset`, `dataset.path`, …"""
    names = []
    for name, key in declared(cls).items():
        names.append(prefix + name)
        names += dotted_names(key.section, f"{prefix}{name}.") if key.section else []
    return names


def path_names(cls: type, prefix: str = "") -> list[str]:
    """The dotted names of the keys that name files or directories."""
    names = []
    for name, key in declared(cls).items():
        names += [prefix + name] if key.path else path_names(key.section, f"{prefix}{name}.") if key.section else []
    return names


def to_dict(config: Any) -> dict:
    """The config as plain JSON-able data; `check(type(config), to_dict(config))` gives it back."""
    return dataclasses.asdict(config)


def merge_configs(below: dict, above: dict) -> dict:
    """`below`, overridden by `above`, recursively in each section."""
    out = dict(below)
    for name, value in above.items():
        old = out.get(name)
        out[name] = merge_configs(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


# ---- reading JSON ----------------------------------------------------------------------------------------------------

MAX_CONFIG_BYTES = 65_536


class JsonObject(dict):
    """A JSON object that remembers the values of names that it was given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        values: dict[str, list] = {}
        for name, value in pairs:
            values.setdefault(name, []).append(value)
        self.repeated = {name: given for name, given in values.items() if len(given) > 1}


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file that may have `//` and `/* */` comments and trailing commas.

    Raises UserError with the line where it is no JSON, and with every key that is given twice in one object.
    """
    raw = parse_config(path)
    if problems := find_repeated_keys(raw):
        raise UserError(join_problems(problems, f"{path}: "))
    return raw


def parse_config(path: str | os.PathLike) -> dict:
    import json5  # only reading configs needs it: a loaded model brings its config as plain data

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, so it is no config; name a JSON file")
        text = data.decode("utf-8")
        if not text.strip():
            raise UserError(f"{path}: is empty; a config is an object, {{ … }}")
        if found := find_bad_escape(text):
            raise UserError(f"{path}, line {found[0]}: {found[1]}")
        raw = json5.loads(text, object_pairs_hook=JsonObject)
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else error.strerror or error
        raise UserError(f"cannot read {path}: {reason}; name a JSON file") from error
    except RecursionError as error:
        raise UserError(f"{path}: brackets are nested too deeply; a config has two levels") from error
    except ValueError as error:  # "<string>:3 Unexpected "x" at column 7"
        line, _, what = str(error).removeprefix("<string>:").partition(" ")
        where = f"{path}, line {line}: {what}" if line.isdigit() else f"{path}: {error}"
        raise UserError(f"{' '.join(where.split())}; mend the JSON there") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {show(raw)}, but a config is an object, {{ … }}")
    return raw


_COMMENT_OR_STRING = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""", re.DOTALL)
_ESCAPE = re.compile(r"""\\(?:["'\\/bfnrtv0\n\r]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|(?P<bad>.))""", re.DOTALL)


def find_bad_escape(text: str) -> tuple[int, str] | None:
    r"""(line, message) of the first backslash in a string of JSON5 that escapes nothing and that JSON5 would drop, as
    "C:\data" has; None where there is none."""
    for token in _COMMENT_OR_STRING.finditer(text):
        for escape in _ESCAPE.finditer(token[0]) if token[0][0] in "\"'" else ():
            if escape["bad"]:
                line = text.count("\n", 0, token.start() + escape.start()) + 1
                return line, f"\\{escape['bad']} is no escape; write / or \\\\ instead of \\"
    return None


def find_repeated_keys(raw: Any, prefix: str = "") -> list[str]:
    problems = []
    for name, given in getattr(raw, "repeated", {}).items():
        problems.append(f"{prefix}{name} = {', '.join(map(show, given))}: given {len(given)} times; keep one")
    for name, value in raw.items() if isinstance(raw, dict) else ():
        problems += find_repeated_keys(value, f"{prefix}{name}.")
    return problems


def join_problems(problems: list[str], source: str = "") -> str:
    if len(problems) == 1:
        return source + problems[0]
    return f"{source}{len(problems)} problems:\n" + "\n".join(f"  {line}" for line in problems)


# ---- what pydantic checks --------------------------------------------------------------------------------------------


@functools.cache
def validator(cls: type) -> TypeAdapter:
    return TypeAdapter(object_type(cls))


def object_type(cls: type) -> type:
    """A dict that may have the keys of a config class. Pydantic ignores others, which `check` names."""
    keys = {name: Annotated[key_type(key), Field(json_schema_extra=describe_key(key))]
            for name, key in declared(cls).items()}  # fmt: skip
    return TypedDict(cls.__name__, keys, total=False)


def key_type(key: Option) -> Any:
    """What pydantic checks of a key: any member of its annotation, strict and within the key's bounds."""
    return typing.Union[tuple(constrain(kind, key) for kind in key.kinds)] if key.kinds else Any  # noqa: UP007


def constrain(kind: Any, key: Option) -> Any:
    if key.must:
        return kind
    if dataclasses.is_dataclass(kind):
        return object_type(kind)
    if typing.get_origin(kind) is list:
        item = constrain(typing.get_args(kind)[0], key)
        return Annotated[list[item], Field(strict=True, fail_fast=True)]  # not an error for each of a million items
    if kind is str and key.choices:
        return Literal[key.choices]
    bounds = Field(ge=key.low, le=key.high, gt=key.above, lt=key.below)
    checks = {
        bool: [],
        int: [bounds, WHOLE],
        float: [bounds, Field(allow_inf_nan=False)],
        str: [AfterValidator(functools.partial(check_text, key=key)), WithJsonSchema(text_schema(key))],
    }
    return Annotated[kind, Field(strict=True), *checks[kind]] if kind in checks else kind


def as_whole(value: Any) -> Any:
    """JSON has one kind of number, so that 2e3 is an integer. Raises ValueError for one of more than 64 bits."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, int) and abs(number) >= 2**63:
        raise ValueError("more than 64 bits")
    return number


WHOLE = BeforeValidator(as_whole)


def check_text(value: str, key: Option) -> str:
    """Raises ValueError where a text has what no text or no path has, or is empty, which only a default may be."""
    os.fsencode(value)  # half a surrogate pair is neither text nor a path
    if key.path and has_control_character(value):
        raise PydanticCustomError(SENTENCE, NO_PATH)
    if "\0" in value or (value == "" and key.default != ""):
        raise ValueError("no such text")
    return value


# ---- checking --------------------------------------------------------------------------------------------------------


SENTENCE = "sentence"  # type of an error whose message is the sentence to tell, after the key and its value


def check(cls: type, raw: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """A config object made of plain data: (instance, []) or (None, every problem).

    A problem names the key by its dotted name (`prefix` and a dot go before it), the value, and what is allowed.
    A class may define `problems(self)`, an iterator of (key, message), for rules between its keys.

    >>> from strawberry.run_config import Dataset
    >>> check(Dataset, {"data_division": 2, "path": 1})
    (None, ['data_division = 2: must be a number > 0 and < 1', 'path = 1: must be text'])
    """
    return _check(cls, raw, f"{prefix.rstrip('.')}." if prefix else "", dotted_names(cls))


def _check(cls: type, raw: Any, prefix: str, names: list[str]) -> tuple[Any, list[str]]:
    if not isinstance(raw, dict):
        return None, [f"{prefix.rstrip('.') or 'the config'} = {show(raw)}: must be an object, {{ … }}"]
    known, problems, bad = declared(cls), [], set()
    values, wrong = validate(cls, raw)
    for name, value in raw.items():
        key, found = known.get(name), []
        if key is None:
            hint = _hint(str(name), list(known), names) if len(problems) < 20 else ""  # which takes a while
            problems.append(f"{prefix}{name} = {show(value)}: unknown key{hint}")
        elif key.section and not (value is None and type(None) in key.kinds):
            values[name], found = _check(key.section, value, f"{prefix}{name}.", names)
        elif name in wrong:
            found = [f"{prefix}{name} = {show(value)}: {wrong[name] or _explain(value, key)}"]
        problems += found
        bad |= {name} if found else set()
    config = cls(**{name: value for name, value in values.items() if name not in bad})
    for name, message in config.problems() if hasattr(config, "problems") else ():
        # a rule that mentions a key that is wrong in itself has judged its default: say nothing yet
        if not bad & set(re.findall(r"\w+", f"{name} {message}")):
            value = functools.reduce(getattr, name.split("."), config)
            problems.append(f"{prefix}{name} = {show(value)}: {message}")
    return (None, problems) if problems else (config, [])


def validate(cls: type, raw: dict) -> tuple[dict, dict[str, str]]:
    """By pydantic: (values of the keys that are right, {name of a wrong key: a validator's SENTENCE or nothing})."""
    try:
        return validator(cls).validate_python(raw), {}
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for found in error.errors(include_url=False, include_context=False):
            name = found["loc"][0]
            wrong[name] = found["msg"] if found["type"] == SENTENCE else wrong.get(name, "")
        return validate(cls, {name: value for name, value in raw.items() if name not in wrong})[0], wrong


def _explain(value: Any, key: Option) -> str:
    """Why a value is refused."""
    if isinstance(value, (int, float)) and not abs(value) < 2**63 and not key.must:  # NaN and Infinity too
        return f"must be {key.rule}, finite" + (" and < 2**63" if int in key.kinds else "")
    return f"must be {key.rule}" + (nearest(value, key.choices) if isinstance(value, str) else "")


def _hint(name: str, siblings: list[str], names: list[str]) -> str:
    """Where an unknown key may belong: the same name in another section, one spelt alike here or there, or the list."""
    moved = [dotted for dotted in names if dotted.rpartition(".")[2] == name.rpartition(".")[2]]
    if moved:
        return f" (did you mean {moved[0]!r}?)"
    places = {dotted.rpartition(".")[2]: dotted for dotted in reversed(names)} | {key: key for key in siblings}
    close = difflib.get_close_matches(name.lower()[:200], places, n=1, cutoff=0.6)
    return f" (did you mean {places[close[0]]!r}?)" if close else f"; valid here: {', '.join(siblings)}"


# ---- describing ------------------------------------------------------------------------------------------------------


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, str, dict[str, Option]]]:
    """(dotted name, doc, plain keys) of the config itself, then of each nested object."""
    yield prefix, "", {name: key for name, key in declared(cls).items() if not key.section}
    for name, key in declared(cls).items():
        if key.section:
            for dotted, doc, keys in sections(key.section, f"{prefix}{name}."):
                yield dotted, doc or key.doc, keys


def text_schema(key: Option) -> dict:
    shape = {"pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"} if key.path else {}
    return {"type": "string", "minLength": int(key.default != ""), **shape}


def describe_key(key: Option) -> dict:
    """What the JSON schema says of a key besides its type."""
    return {**({} if key.section else {"default": key.default}), "description": key.doc}


def object_schema(cls: type) -> dict:
    """The JSON schema of a config class."""
    return type_schema(object_type(cls))


def type_schema(kind: Any) -> dict:
    return TypeAdapter(kind).json_schema(schema_generator=PlainSchema)


class PlainSchema(GenerateJsonSchema):
    """Pydantic's JSON schema without titles and references, in the order of declaration."""

    class ValidationsMapping(GenerateJsonSchema.ValidationsMapping):
        numeric = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}

    def generate_inner(self, schema: dict) -> dict:
        return super().generate_inner({name: value for name, value in schema.items() if name != "ref"})

    def typed_dict_schema(self, schema: dict) -> dict:
        found = super().typed_dict_schema(schema)
        del found["title"]
        return {**found, "additionalProperties": found.get("additionalProperties", False)}

    def literal_schema(self, schema: dict) -> dict:
        return {"enum": schema["expected"]}

    def field_title_should_be_set(self, schema: dict) -> bool:
        return False

    def sort(self, value: dict, parent_key: str | None = None) -> dict:
        return value
