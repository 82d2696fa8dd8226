"""Records on their way into a shard: cleaned, encoded, and hashed for what the merge must know of each."""

import json
import re

import numpy as np

from corpora.clean import clean_document, clean_text, content_key, text_hash
from dataset.formats import writable
from tokenizer import encode_documents, encode_examples, encode_pair, fit_prompt

STREAMS = dict(
    text=["text"],
    pretrain=["tokens"],
    sft=["tokens", "loss_mask", "pieces"],
    rm=["chosen_tokens", "chosen_loss_mask", "rejected_tokens", "rejected_loss_mask"],
    prompts=["tokens", "fields"],
)  # pieces: tokens of each example that a conversation became; fields: the JSON of a row's other fields
COLUMNS = dict(content=np.uint64, key=np.uint64, characters=np.uint32, label=np.int8, answers=np.uint32, lost=np.uint32)
_LOST = re.compile("[\ufffd\ud800-\uf8ff]")  # what a wrong encoding left, halves of a character, private use


def texts_of(record):
    """All texts of a record, the first user's first: that one decides the split."""
    if "text" in record:
        return [record["text"]]
    texts = [message["content"] for message in record["messages"]]
    first = next(i for i, message in enumerate(record["messages"]) if message["role"] == "user")
    answers = [record[side] for side in ("chosen", "rejected") if side in record]
    return [texts[first], *texts[:first], *texts[first + 1 :], *answers]


def compared_turns(record, questions_only=False):
    """What near-duplicates of a conversation are known by: question and answer in turn, or the questions alone.

    A system text is part of the first question, as in the prompt format.
    """
    turns = [message["content"] for message in record["messages"]]
    if record["messages"][0]["role"] == "system":
        turns[:2] = ["\n".join(turns[:2])]
    return ["\n".join(turns[::2])] if questions_only else turns


def as_bytes(text):
    """UTF-8 as (N,) uint8; what is no text, as in the name of a file, is escaped."""
    return np.frombuffer(writable(text).encode(), np.uint8)


def clean_record(record, options):
    """(record, remark or None), or (None, why dropped): documents are cleaned and filtered, conversations cleaned."""
    notes = []
    if "text" in record:
        text, why = clean_document(record["text"], options, notes)
        if why:
            return None, why
        cleaned = record | dict(text=text)
    else:
        messages = [message | dict(content=clean_text(message["content"], options)) for message in record["messages"]]
        answers = {side: clean_text(record[side], options) for side in ("chosen", "rejected") if side in record}
        cleaned = record | dict(messages=messages) | answers
        if "fields" in record and options.get("mask_personal"):
            cleaned["fields"] = _masked(record["fields"])
    if any(map(_loses, texts_of(record), texts_of(cleaned))):
        notes.append("lost characters removed")
    return cleaned, "; ".join(notes) or None


def _masked(value):
    """What JSON holds, its texts without personal data."""
    if isinstance(value, str):
        return clean_text(value, dict(mask_personal=True))
    if isinstance(value, int) and not isinstance(value, bool):
        text = _masked(str(value))
        return value if text == str(value) else text
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return {key: _masked(item) for key, item in value.items()} if isinstance(value, dict) else value


def _loses(before, after):
    return before != after and len(_LOST.findall(before)) > len(_LOST.findall(after))


def encode_records(part, records, tokenizer, max_len):
    """[({stream: values} or None, note, (answer tokens written, lost)), ...] of the records of one part."""
    if part == "text":
        return [(dict(text=as_bytes(r["text"] + "\n")), None, (0, 0)) for r in records]
    if part == "pretrain":
        rows = encode_documents(tokenizer, [record["text"] for record in records])
        return [(dict(tokens=np.array(ids, np.int64)), None, (0, 0)) for ids in rows]
    return [encode_conversation(part, record, tokenizer, max_len) for record in records]


def encode_conversation(part, record, tokenizer, max_len):
    """As encode_records, of one record of sft, rm or prompts."""
    prompt = record["messages"]
    if part == "prompts":
        ids, note = fit_prompt(tokenizer, prompt, max_len)
        fields = json.dumps(record["fields"]) if record.get("fields") else ""
        streams = dict(tokens=ids, fields=as_bytes(fields))
        return streams if ids else None, note, (0, 0)
    if part == "sft":
        examples, note, lost = encode_examples(tokenizer, prompt, max_len)
        streams = dict(pieces=[len(example.ids) for example in examples])
        sides = {"": examples}
    else:
        examples, note, lost = encode_pair(tokenizer, prompt, [record["chosen"], record["rejected"]], max_len)
        streams, sides = {}, {"chosen_": examples[:1], "rejected_": examples[1:]}
    for side, found in sides.items():
        streams[f"{side}tokens"] = [token for example in found for token in example.ids]
        streams[f"{side}loss_mask"] = [bit for example in found for bit in example.loss_mask]
    return streams if examples else None, note, (sum(sum(example.loss_mask) for example in examples), lost)


def columns_of(records, questions_only=False):
    """What the merge needs to know of each record: hashes of what makes it a duplicate and of what decides its split.

    Documents are the same if their letters and digits are, conversations if all is but for spaces: signs, operators and
    emoji may be what they are about.
    """
    rows = []
    for record in records:
        texts = texts_of(record)
        key = record.get("key", texts[0])
        key_hash = text_hash(content_key(key), "split")
        if "text" in record:
            content_hash = key_hash if key is texts[0] else text_hash(content_key(texts[0]), "split")
        else:
            compared = compared_turns(record, True) if questions_only else texts
            content_hash = text_hash("\n".join(" ".join(text.split()) for text in compared))
        numbers = sum(map(len, texts)), record.get("label", -1), *record.get("answers", (0, 0))
        rows.append((content_hash, key_hash, *numbers))
    columns = zip(COLUMNS.items(), zip(*rows, strict=True) if rows else [()] * len(COLUMNS), strict=True)
    return {name: np.array(values, dtype) for (name, dtype), values in columns}
