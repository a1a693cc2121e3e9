"""Chat templates: messages to text and special tokens, with Jinja, the form that transformers and vLLM use.

    template = read_template("chatml")                    # or a file; None of an encoder: template_of(encoder)
    parts = template.split([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    encode_parts(encoder, parts)

A template is rendered in Jinja's immutable sandbox. Special strings in a message are text: only the template's own
become special tokens, so that no message can end its turn or begin another. Jinja is imported at the first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from encoder import EOT, MAX_TEMPLATE, PAD, Encoder
from strawberry.common import UserError, nearest, show
from strawberry.data.documents import find_text
from strawberry.data.json_entries import NoTextError

CHATML = (  # OpenAI's Chat Markup Language
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # which no text exchanges (Unicode 23.7)
MAX_MESSAGES = 1000


class SpecialToken(str):
    """The name of a special token, where text of that spelling would be text."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and the special token that ends a turn of the assistant."""

    source: str
    end_of_turn: str = ""

    @property
    def specials(self) -> list[str]:
        """The special tokens in the template, in order."""
        return list(dict.fromkeys(SPECIAL.findall(self.source)))

    def to_dict(self) -> dict[str, str]:
        """What the encoder's file stores."""
        return {"template": self.source, "end_of_turn": self.end_of_turn}

    @cached_property
    def compiled(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # the settings of transformers
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])  # fmt: skip
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no Jinja template: {error}; mend it") from error

    def split(self, messages: list[dict], add_generation_prompt: bool = False) -> list[str]:
        """The text of a chat in parts: strings, and SpecialTokens. With add_generation_prompt, it ends where the answer
        begins. Raises UserError if the template refuses the messages.
        """
        names = [*self.specials, EOT]
        marker = find_noncharacter(messages)
        hidden = hide_specials(messages, names, marker)
        try:
            text = self.compiled.render(messages=hidden, add_generation_prompt=add_generation_prompt, bos_token="",
                                        eos_token=EOT)  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # whatever a template's expressions raise
            raise UserError(f"the chat template cannot render these messages: {error}") from error
        parts = re.split(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", text)
        parts = [SpecialToken(part) if i % 2 else part.replace(marker, "") for i, part in enumerate(parts)]
        return [part for part in parts if part]


def raise_exception(message: str) -> None:
    """What templates call to refuse messages."""
    raise UserError(f"the chat template refuses the messages: {message}")


def find_noncharacter(messages: list[dict]) -> str:
    """A noncharacter that no message has. Raises UserError if they have all of them."""
    used = ascii(messages)
    for char in NONCHARACTERS:
        if ascii(char)[1:-1] not in used:
            return char
    raise UserError("messages: have all of Unicode's noncharacters U+FDD0 to U+FDEF; remove one")


def hide_specials(value: Any, names: Iterable[str], marker: str) -> Any:
    """The value with the marker behind the first character of each special string in its texts."""
    if isinstance(value, str):
        for name in names:
            value = value.replace(name, name[0] + marker + name[1:])
        return value
    if isinstance(value, dict):
        return {key: hide_specials(item, names, marker) for key, item in value.items()}
    return [hide_specials(item, names, marker) for item in value] if isinstance(value, list) else value


def encode_parts(encoder: Encoder, parts: Iterable[str], encode: Callable[[str], list[int]] | None = None) -> list[int]:
    """The tokens of what `split` returns. encode: instead of encoder.encode, for the text between special tokens."""
    encode, tokens = encode or encoder.encode, []
    for part in parts:
        tokens += [encoder.specials[part]] if isinstance(part, SpecialToken) else encode(part)
    return tokens


def template_of(encoder: Encoder) -> ChatTemplate | None:
    """The chat template in an encoder, if it has one."""
    found = encoder.chat_template
    return None if found is None else ChatTemplate(found["template"], found["end_of_turn"])


def read_template(spec: str, option: str = "--chat_template") -> ChatTemplate:
    """The built-in template of that name, or the one in that file. Raises UserError if it is not usable."""
    source = TEMPLATES[spec] if spec in TEMPLATES else read_template_file(spec, option)
    template = ChatTemplate(source)
    try:
        return ChatTemplate(source, find_end_of_turn(template))
    except UserError as error:
        raise UserError(f"{option} {spec}: {error}") from error


def read_template_file(path: str, option: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read(MAX_TEMPLATE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        known = f"{', '.join(TEMPLATES)} is built in{nearest(path, TEMPLATES)}"
        raise UserError(f"{option} {path}: cannot read this file ({reason}); {known}") from error
    if len(source) > MAX_TEMPLATE:
        raise UserError(f"{option} {path}: has more than {MAX_TEMPLATE:,} characters; name a Jinja template")
    return source


def find_end_of_turn(template: ChatTemplate) -> str:
    """The special token behind an answer of the assistant."""
    question, answer = "a question", "an answer"
    parts = template.split([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    text = [i for i, part in enumerate(parts) if answer in part and not isinstance(part, SpecialToken)]
    behind = parts[text[-1] + 1 :] if text else []
    if not text or not any(question in part for part in parts):
        raise UserError("the chat template leaves out messages; write {{ message['content'] }}")
    if not behind or behind[0] == PAD:
        raise UserError("the chat template must end an answer with a special token, such as <|im_end|>; write one "
                        "behind the content")  # fmt: skip
    return str(behind[0])


# ---- messages ------------------------------------------------------------------------------------------------------


def check_messages(messages: Any) -> list[dict]:
    """The messages, with a list of text parts joined to one text. Raises UserError that says what is wrong."""
    if not isinstance(messages, list) or not messages or len(messages) > MAX_MESSAGES:
        wanted = f"a list of 1 to {MAX_MESSAGES} objects with role and content"
        raise UserError(f"messages = {show(messages)}: must be {wanted}")
    return [check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_message(message: Any, where: str) -> dict:
    if not isinstance(message, dict):
        raise UserError(f'{where} = {show(message)}: must be an object, {{"role": …, "content": …}}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where}.role = {show(role)}: must be text, such as user or assistant")
    if isinstance(content, list) and all(is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f'{where}.content = {show(content)}: must be text, or a list of {{"type": "text", "text": …}}')
    return {**message, "content": content}


def is_text_part(part: Any) -> bool:
    is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
    return is_text and isinstance(part["text"], str)


class ChatReader:
    """Reads the entries of a .json or .jsonl for a template: {"messages": […]}, or any text."""

    def __init__(self, template: ChatTemplate):
        self.template = template

    def split(self, entry: Any, where: str) -> str | list[str]:
        """The text of an entry, or the parts of its chat. Raises NoTextError for other entries."""
        if not isinstance(entry, dict) or "messages" not in entry:
            return find_text(entry, where)
        try:
            return self.template.split(check_messages(entry["messages"]))
        except UserError as error:
            raise NoTextError(f"{where}: {error}") from error

    def find_contents(self, entry: Any, where: str) -> str:
        """The text of an entry for an encoder to be trained on, without special tokens."""
        parts = self.split(entry, where)
        return parts if isinstance(parts, str) else "".join(p for p in parts if not isinstance(p, SpecialToken))
