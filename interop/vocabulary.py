"""What other formats hold of our vocabulary: Hugging Face's tokenizer.json, GGUF, llama2.c's tokenizer.bin.

Pure functions of a `Tokenizer`; whoever exports writes the files. Ids are SentencePiece's everywhere, and text gives
the ids that `Tokenizer.encode` gives: what a format cannot do is refused, and what it does otherwise is noted.

The formats: https://huggingface.co/docs/tokenizers, llama.cpp's src/llama-vocab.cpp (its "llama" model is
SentencePiece's BPE), llama2.c's tokenizer.py.
"""

import base64
import re
import struct
from dataclasses import dataclass

from tokenizer import SPACE_MARK, Tokenizer, TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's numbers and GGUF's
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NEVER_MERGED = -1e6  # score of a row without a piece

# The prompt format of tokenizer/__init__.py; <bos> ends a question, so there is nothing left to add for generation.
# What stands in a generation block is what training has its loss on.
CHAT_TEMPLATE = r"""
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content is not defined or content is not iterable or content is mapping -%}
{{- raise_exception("The content of a message must be text or a list of parts.") -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'text' and part['text'] is string -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception("Part of type " ~ part['type'] ~ ": the model reads text only.") -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set rule = "The messages must be a system one or none, then user and assistant in turn, a user's first." -%}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if not turns -%}{{- raise_exception(rule) -}}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("Role " ~ message['role'] ~ " is not known: " ~ rule) -}}
{%- endif -%}
{%- set wanted = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
{%- if message['role'] != wanted -%}{{- raise_exception(rule) -}}{%- endif -%}
{%- if loop.first and has_system -%}{{- text(messages[0]['content']) + '\n' -}}{%- endif -%}
{%- if wanted == 'user' -%}{{- text(message['content']) + bos_token -}}
{%- elif message['train'] is false -%}{{- text(message['content']) + eos_token -}}
{%- else -%}{%- generation -%}{{- text(message['content']) + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}"""


@dataclass
class Vocabulary:
    """A SentencePiece model taken apart."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    kind: str  # "bpe" or "unigram"
    dummy_prefix: bool  # a space goes before every text
    collapse_spaces: bool  # spaces at both ends go, runs of them become one
    charsmap: bytes  # compiled normalisation rules; b"" where text is taken as it is

    def ids(self, *types: int) -> list[int]:
        return [i for i, piece_type in enumerate(self.types) if piece_type in types]


def read_vocabulary(tok: Tokenizer) -> Vocabulary:
    """The vocabulary of `tok`; TokenizerError names what none of the formats has."""
    model = tok.parts
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = [piece.piece for piece in model.pieces]
    vocabulary = Vocabulary(
        pieces=pieces,
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        kind=KINDS[trainer.model_type],
        dummy_prefix=normalizer.add_dummy_prefix,
        collapse_spaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
    )
    _refuse(
        (f"it is a {vocabulary.kind} model", vocabulary.kind not in ("bpe", "unigram")),
        ("it has unused pieces", UNUSED in vocabulary.types),
        ("its user-defined pieces hold spaces", any(" " in pieces[i] for i in vocabulary.ids(USER_DEFINED))),
        ("its spaces end words (treat_whitespace_as_suffix)", trainer.treat_whitespace_as_suffix),
        ("its spaces stay spaces (escape_whitespaces false)", not normalizer.escape_whitespaces),
        ("it rewrites what it decodes (denormalizer_spec)", model.denormalizer_spec.precompiled_charsmap),
    )
    return vocabulary


def _refuse(*reasons: tuple) -> None:
    for reason, found in reasons:
        if found:
            raise TokenizerError(f"this tokenizer cannot be converted: {reason}")


# Hugging Face


def tokenizer_json(tok: Tokenizer, opens_with: int | None = None) -> dict:
    """The content of tokenizer.json; `opens_with` is the id put before each text unless the caller says otherwise.

    Rows beyond the pieces are left out: a word of the text that reads like one would become it. What remains
    different, none of it in vocabularies trained here: unigram models order the pieces of a long run of one
    character by rounding errors of float32, Hugging Face adds in float64; rules of a charsmap are applied to
    a letter and its combining marks (and to CRLF) as a whole.
    """
    vocabulary = read_vocabulary(tok)
    # A literal U+2581 is a space to SentencePiece, except where our wrapper writes it in bytes. There the
    # pieces are given plain spaces: U+2581 is then in no piece and falls back to its bytes by itself.
    plain = not vocabulary.dummy_prefix and BYTE in vocabulary.types
    user_defined = USER_DEFINED in vocabulary.types
    _refuse(
        ("it has no dummy prefix, but normalises text", plain and vocabulary.charsmap),
        ("it has no dummy prefix, but collapses spaces", plain and vocabulary.collapse_spaces),
        # Hugging Face cuts the text at them; each part would get spaces of its own
        ("its user-defined pieces need byte pieces, and no dummy prefix", user_defined and not plain),
        ("it is a unigram model with user-defined pieces", user_defined and vocabulary.kind == "unigram"),
    )
    texts = [piece.replace(SPACE_MARK, " ") if plain else piece for piece in vocabulary.pieces]
    model, pre_tokenizer = (_bpe if vocabulary.kind == "bpe" else _unigram)(vocabulary, texts)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": texts[i], **added, "special": vocabulary.types[i] != USER_DEFINED}
            for i in vocabulary.ids(UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": None if plain else {"type": "Sequence", "normalizers": _normalizers(vocabulary)},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if opens_with is None else _opening(opens_with, texts[opens_with]),
        "decoder": {"type": "Sequence", "decoders": _decoders(vocabulary, plain)},
        "model": model,
    }


def _replace(content: str, **pattern: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizers(vocabulary: Vocabulary) -> list[dict]:
    """SentencePiece's order: its rules, spaces at the start, runs, the dummy prefix, spaces at the end."""
    steps = []
    if vocabulary.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(vocabulary.charsmap).decode()})
    if vocabulary.collapse_spaces:
        steps += [_replace("", Regex=r"\A +"), _replace(" ", Regex=" {2,}")]
    if vocabulary.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE_MARK})
    steps.append(_replace(SPACE_MARK, String=" "))
    if vocabulary.collapse_spaces:  # by now a literal U+2581 is a space too
        steps.append(_replace("", Regex=rf"{SPACE_MARK}+\z"))
    return steps


def _decoders(vocabulary: Vocabulary, plain: bool) -> list[dict]:
    steps = [] if plain else [_replace(" ", String=SPACE_MARK)]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.collapse_spaces or vocabulary.dummy_prefix:
        steps.append(_replace("", Regex=r"\A +" if vocabulary.collapse_spaces else r"\A "))
    return steps


def _opening(token: int, text: str) -> dict:
    def opened(name: str, n: int) -> list[dict]:
        return [{"SpecialToken": {"id": text, "type_id": n}}, {"Sequence": {"id": name, "type_id": n}}]

    return {
        "type": "TemplateProcessing",
        "single": opened("A", 0),
        "pair": opened("A", 0) + opened("B", 1),
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _bpe(vocabulary: Vocabulary, texts: list[str]) -> tuple[dict, None]:
    """The model; it needs no pre-tokenizer.

    SentencePiece merges the two neighbours that make the piece of the highest score, leftmost first.

    Hugging Face merges the first pair of a list, leftmost first: every way to cut a piece in two goes there, by
    falling score. Special and byte pieces take no part, so that "</s>" in a text stays four characters.
    """
    normal = {texts[i]: vocabulary.scores[i] for i in vocabulary.ids(NORMAL)}
    merges, scores = [], []
    for text in sorted(normal, key=normal.get, reverse=True):
        cuts = [[text[:n], text[n:]] for n in range(1, len(text))]
        cuts = [[left, right] for left, right in cuts if left in normal and right in normal]
        merges += cuts
        scores += [normal[text]] * bool(cuts)
    _refuse(("pieces share a score, and then SentencePiece merges the leftmost", len(set(scores)) < len(scores)))
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": texts[Tokenizer.pad_id],
        "fuse_unk": True,
        "byte_fallback": BYTE in vocabulary.types,
        "ignore_merges": False,
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": merges,
    }
    return model, None


def _unigram(vocabulary: Vocabulary, texts: list[str]) -> tuple[dict, dict | None]:
    """The model, and the pre-tokenizer that it needs.

    SentencePiece finds no special or byte piece in a text such as "<0x41>", Hugging Face does. A score below
    that of the characters one by one keeps such a piece out. Where one of its characters is no piece (and so in
    no piece) there is no such score, but the text can be cut at that character.
    """
    normal = {texts[i]: vocabulary.scores[i] for i in vocabulary.ids(NORMAL)}
    hidden = [text for text in texts if text not in normal]
    unknown = sorted(set("".join(hidden)) - normal.keys())
    _refuse(
        # else the cost of an unknown character, which follows from the lowest score, could decide
        ("characters of its pieces are no pieces", not normal.keys() >= set("".join(normal))),
        ("it has no byte pieces, nor the characters of its special ones", unknown and BYTE not in vocabulary.types),
    )
    out_of_reach = min(0, *normal.values()) * max(map(len, hidden)) - 1
    model = {
        "type": "Unigram",
        "unk_id": Tokenizer.pad_id,
        "vocab": [[text, normal.get(text, out_of_reach)] for text in texts],
        "byte_fallback": BYTE in vocabulary.types,
    }
    pattern = {"Regex": "|".join(map(re.escape, unknown))}
    return model, {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} if unknown else None


def tokenizer_config(tok: Tokenizer, max_len: int, *, chat: bool) -> dict:
    """The content of tokenizer_config.json, which goes with `tokenizer_json(tok, None if chat else tok.opening_id)`."""
    vocabulary = read_vocabulary(tok)
    pieces = vocabulary.pieces
    bos_id, eos_id = (tok.bos_id, tok.eos_id) if chat else (tok.opening_id, tok.closing_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": pieces[bos_id],
        "eos_token": pieces[eos_id],
        "unk_token": pieces[tok.pad_id],
        "pad_token": pieces[tok.pad_id],
        "add_bos_token": not chat,
        "add_eos_token": False,
        "add_prefix_space": vocabulary.dummy_prefix,  # llama.cpp's converter puts a space where nothing is said
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # so that each row of a batch ends where its reply begins
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids, which Llama refuses
        "model_max_length": max_len,
    }
    return config | {"chat_template": CHAT_TEMPLATE} if chat else config


# llama.cpp and llama2.c, which both merge by score


def gguf_vocabulary(tok: Tokenizer, n_rows: int) -> dict:
    """What goes under tokenizer.ggml.* for `n_rows` rows of embeddings, and `notes` for the user."""
    vocabulary = read_vocabulary(tok)
    spaced = vocabulary.dummy_prefix and USER_DEFINED in vocabulary.types
    _refuse(("llama.cpp would put a space after each user-defined piece", spaced))
    pieces, scores = _rows(vocabulary, n_rows, "llama.cpp")
    notes = []
    if vocabulary.collapse_spaces:
        notes.append("llama.cpp keeps runs of spaces, and spaces at both ends of a text, which this tokenizer drops")
    if not vocabulary.dummy_prefix:
        notes.append("llama.cpp takes a literal U+2581 for a space, which this tokenizer writes in bytes")
    return {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "types": vocabulary.types + [UNUSED] * (n_rows - len(vocabulary.types)),
        "add_space_prefix": vocabulary.dummy_prefix,
        "notes": notes,
    }


def modelfile(tok: Tokenizer, max_len: int, sampling: dict, *, chat: bool) -> str:
    """Ollama's Modelfile for a model.gguf beside it, `sampling` as its parameters.

    Ollama repeats TEMPLATE for every turn, and stops at .Response in the last.
    """
    pieces = read_vocabulary(tok).pieces
    bos, stop = pieces[tok.bos_id], pieces[tok.eos_id if chat else tok.closing_id]
    system = "{{ if .System }}{{ .System }}\n{{ end }}"
    template = f"{system}{{{{ .Prompt }}}}{bos}{{{{ .Response }}}}{stop}" if chat else "{{ .Prompt }}"
    parameters = dict(num_ctx=max_len, repeat_penalty=1.0) | sampling
    lines = [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    return "\n".join(["FROM ./model.gguf", f'TEMPLATE """{template}"""', *lines, f'PARAMETER stop "{stop}"', ""])


def llama2c_vocabulary(tok: Tokenizer, n_rows: int) -> bytes:
    """tokenizer.bin, as llama2.c's tokenizer.py writes it: the longest piece's size, then score, size, bytes of each.

    run.c puts a space before every prompt, whatever the vocabulary.
    """
    vocabulary = read_vocabulary(tok)
    _refuse(
        ("llama2.c does not match user-defined pieces first", USER_DEFINED in vocabulary.types),
        # run.c takes the byte b for the id b + 3
        ("llama2.c needs its bytes at the ids 3 to 258", vocabulary.ids(BYTE) != list(range(3, 259))),
    )
    pieces, scores = _rows(vocabulary, n_rows, "llama2.c")
    for i in (tok.bos_id, tok.eos_id):
        pieces[i] = f"\n{pieces[i]}\n"
    rows = [piece.replace(SPACE_MARK, " ").encode() for piece in pieces]
    content = [struct.pack("<fi", score, len(row)) + row for score, row in zip(scores, rows, strict=True)]
    return struct.pack("<i", max(map(len, rows))) + b"".join(content)


def _rows(vocabulary: Vocabulary, n_rows: int, target: str) -> tuple[list[str], list[float]]:
    """Pieces and scores of `n_rows` rows, for a tokenizer that merges by score and falls back to bytes."""
    n_pieces = len(vocabulary.pieces)
    pieces = vocabulary.pieces + [f"[PAD{i}]" for i in range(n_pieces, n_rows)]
    scores = vocabulary.scores + [NEVER_MERGED] * (n_rows - n_pieces)
    _refuse(
        (f"{target} would not normalise text", vocabulary.charsmap),
        (f"{target} has no unigram model that falls back to bytes", vocabulary.kind != "bpe"),
        (f"{target} needs byte pieces", BYTE not in vocabulary.types),
        (f"{target} needs a piece for the space", SPACE_MARK not in vocabulary.pieces),
        (f"it has {n_pieces} pieces, more than {n_rows} rows", n_pieces > n_rows),
        ("two rows have the same text", len(set(pieces)) < len(pieces)),
    )
    # Both look merged text up among all rows: no neighbours may make one that is not text.
    table = set(pieces)
    for i in [*vocabulary.ids(UNKNOWN, CONTROL, BYTE), *range(n_pieces, n_rows)]:
        made = any(pieces[i][:n] in table and pieces[i][n:] in table for n in range(1, len(pieces[i])))
        _refuse((f"{target} would make {pieces[i]} of typed text", made))
    return pieces, scores
