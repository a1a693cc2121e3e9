"""An encoder as tokenizer.json of Hugging Face's tokenizers, and back: the vocabulary of such a file.

A byte-level BPE there spells each byte as a printable character (GPT-2's table) and lists merges; tiktoken's ranks
become a merge for each way to cut a token into two tokens, ordered by the token's rank: the pairs that tiktoken merges,
in its order.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from encoder import Encoder, unpack
from strawberry.common import UserError, show


def byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it is printable, otherwise one from U+0100 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTERS = byte_characters()
BYTES = {char: byte for byte, char in enumerate(CHARACTERS)}


def spell(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)


# ---- an encoder as tokenizer.json ------------------------------------------------------------------------------------


def make_tokenizer(encoder: Encoder) -> dict:
    """tokenizer.json. Raises UserError if a special token or a character cannot be written in it."""
    data = unpack(encoder.to_bytes())
    if data["kind"] == "chars":
        vocab = {char: i for i, char in enumerate(data["chars"])}
        parts = character_parts(vocab)
    else:
        tokens = [base64.b64decode(token) for token in data["ranks"]]
        vocab = {spell(token): i for i, token in enumerate(tokens) if token}
        parts = byte_level_parts(data["pattern"], vocab, list_merges(tokens))
    added = list_added_tokens(encoder, vocab)
    ordinary = len(data.get("chars", data.get("ranks")))
    vocab |= {token["content"]: token["id"] for token in added if token["id"] < ordinary}
    check_unicode(vocab.keys() | {token["content"] for token in added})
    # `added_tokens` first: no other program writes it so, and strawberry.outputs knows the file by it
    return {"added_tokens": added, "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "post_processor": None, **parts}  # fmt: skip


def list_added_tokens(encoder: Encoder, vocab: dict[str, int]) -> list[dict]:
    """Every id that is no ordinary token, in order: a special token, or a name for an id that nothing uses, because
    tokenizers numbers them without gaps."""
    used = set(vocab.values())
    names = {i: name for name, i in sorted(encoder.specials.items(), reverse=True)}  # of two names the first
    added = []
    for i in (i for i in range(encoder.vocab_size) if i not in used):
        name = names.get(i, f"<|unused_{i}|>")
        if name in vocab:
            raise UserError(f"special token {show(name)}: tokenizer.json would take it for the ordinary token of the "
                            "same spelling; export a model whose encoder has no such special token")  # fmt: skip
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added.append({"id": i, "content": name, **flags})
    return added


def check_unicode(names: set[str]) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"token {show(name)}: a lone surrogate is no Unicode text, and tokenizer.json holds no "
                            "other; export a model whose encoder has no such token") from error  # fmt: skip


def character_parts(vocab: dict[str, int]) -> dict:
    """A lookup table. It raises an error at an unknown character, as our encoder does: no <unk> is in the table."""
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return {"pre_tokenizer": each, "decoder": {"type": "Fuse"}, "model": model}


def byte_level_parts(pattern: str, vocab: dict[str, int], merges: list[list[str]]) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pieces = {"type": "Split", "pattern": {"Regex": to_oniguruma(pattern)}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": True,  # a piece that is a token becomes that token, as tiktoken has it
        "vocab": vocab, "merges": merges,
    }  # fmt: skip
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, byte_level]}, "decoder": byte_level,
        "model": model,
    }  # fmt: skip


def list_merges(tokens: list[bytes]) -> list[list[str]]:
    """A merge for each cut of a token into two tokens, by the token's rank, then by the ranks of the parts."""
    ranks = {token: i for i, token in enumerate(tokens) if token}
    merges = []
    for token in ranks:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [[spell(a), spell(b)] for _, _, a, b in sorted(found)]
    return merges


def to_oniguruma(pattern: str) -> str:
    r"""tiktoken's pattern in the dialect of tokenizers. There `{1,3}+` is no possessive quantifier but repeats what
    stands before it, and `$` also matches at the end of each line.

    >>> to_oniguruma(r"\p{N}{1,3}+|\s++$")
    '(?>\\p{N}{1,3})|\\s++\\z'
    """
    atom = r"\\p\{\^?\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[\](){}|]"
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+", r"(?>\1\2)", pattern)
    classes_and_escapes = r"(\\.|\[(?:\\.|[^\]\\])*\])|\$"
    return re.sub(classes_and_escapes, lambda found: found[1] or r"\z", pattern)


def make_tokenizer_config(encoder: Encoder, block_size: int) -> dict:
    """tokenizer_config.json. Special tokens in a text are ordinary text, as they are for our encoder."""
    eot, pad = (encoder.token_bytes(i).decode() for i in (encoder.eot, encoder.pad))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot, "pad_token": pad,
        "add_bos_token": False, "add_eos_token": False, "model_max_length": block_size,
        "clean_up_tokenization_spaces": False, "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids, which transformers 4 adds
    }  # fmt: skip


# ---- tokenizer.json as a vocabulary ----------------------------------------------------------------------------------


def read_vocabulary(folder: Path) -> dict[int, bytes] | None:
    """id → bytes of the ordinary tokens of a folder's tokenizer.json or vocab.json; None if it has neither. Raises
    UserError if it is neither a byte-level BPE nor a table of characters."""
    path = next((folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        model = data["model"] if path.name == "tokenizer.json" else {"type": "BPE", "vocab": data}
        kind, vocab = model["type"], {content: int(i) for content, i in model["vocab"].items()}
        special = {token["id"] for token in data.get("added_tokens", ())} if path.name == "tokenizer.json" else set()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"init_from: {path} is no tokenizer of Hugging Face's ({type(error).__name__})") from error
    if kind == "WordLevel":
        return {i: content.encode("utf-8", "surrogatepass") for content, i in vocab.items() if i not in special}
    if kind != "BPE":
        raise UserError(f"init_from: {path} is a tokenizer of type {show(kind)}; only a BPE of bytes is read")
    # specials, whose names may hold characters that stand for no byte, are left out
    return {i: bytes(BYTES[char] for char in content) for content, i in vocab.items()
            if i not in special and all(char in BYTES for char in content)}  # fmt: skip
