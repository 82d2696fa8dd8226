"""Token contract of every stage: a SentencePiece wrapper and the one prompt format.

A document is `text <eos>`; a conversation is `question <bos> answer <eos>`, repeated turn by turn, and the
loss falls on the answers' tokens and their <eos>. Ids 0, 1, 2 are pad (= unk), bos and eos in ChatGLM3's
vocabulary and in the ones trained here. Text never produces them: "</s>" typed by a user is plain characters.
"""

import common.early  # noqa: F401 - python -m tokenizer.train imports this first

import codecs
import hashlib
import re
from pathlib import Path

import sentencepiece

from tokenizer.turns import Example, Turns

MODEL_FILE = "tokenizer.model"
CHATGLM_PIECES = 64_789  # pieces in the tokenizer.model of ChatGLM2 and ChatGLM3
CHATGLM_ROWS = 64_793  # plus [MASK] [gMASK] [sMASK] sop, which live beyond the pieces
DOCUMENT_IDS = (2, 2)  # what a document of our pretraining data opens and closes with: they are parted by <eos>
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space


class TokenizerError(Exception):
    """A tokenizer or a conversation that cannot be used; the message is meant for the user."""


class Tokenizer:
    """A SentencePiece model with unk 0, bos 1, eos 2; pad shares id 0 with unk.

    `document_ids` are what a document of a base model opens and closes with. A model imported from elsewhere may have
    learnt (bos, bos), as llama2.c's do, or (bos, eos), as Meta's.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, model_bytes: bytes, document_ids: tuple[int, int] = DOCUMENT_IDS):
        self.model_bytes = bytes(model_bytes)
        self.opening_id, self.closing_id = document_ids
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        try:
            # an empty proto would leave the processor silently uninitialised
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes or b"empty")
            self._read_pieces(self._sp)
        except (RuntimeError, ValueError, LookupError):  # also of text that is no UTF-8
            raise TokenizerError(f"not a SentencePiece model, or damaged ({len(self.model_bytes)} bytes)") from None
        found = (self._sp.unk_id(), self._sp.bos_id(), self._sp.eos_id())
        if found != (0, 1, 2):
            raise TokenizerError(f"the tokenizer's unk, bos and eos ids are {found}; (0, 1, 2) is needed")
        self.vocab_size = CHATGLM_ROWS if self.n_pieces == CHATGLM_PIECES else self.n_pieces

    def _read_pieces(self, sp):
        pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
        self.n_pieces = len(pieces)
        self._special = {i for i in range(self.n_pieces) if sp.is_control(i) or sp.is_unknown(i)}
        self._byte_of = {i: int(piece[1:-1], 16) for i, piece in enumerate(pieces) if sp.is_byte(i)}
        # Characters that SentencePiece would not give back, and the bytes written for them. With a dummy prefix
        # (ChatGLM3, Llama 2) the text cannot be cut into parts, and a literal U+2581 comes back as a space, as in the
        # reference. Without one it is written in bytes, as are spaces where the vocabulary has no piece for them.
        id_of = {byte: i for i, byte in self._byte_of.items()}
        dummy_prefix = sp.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        apart = "" if dummy_prefix or not id_of else SPACE_MARK if self.has_space else f"{SPACE_MARK} "
        self._in_bytes = {character: [id_of[byte] for byte in character.encode()] for character in apart}
        self._apart = re.compile(f"([{apart}])") if apart else None

    @property
    def has_space(self) -> bool:
        """Whether a space has a piece, as formats that know no bytes for it need."""
        return not self._sp.is_unknown(self._sp.piece_to_id(SPACE_MARK))

    @property
    def parts(self):
        """The ModelProto: pieces, scores, rules."""
        from google.protobuf.message import DecodeError  # protobuf, which training does not need
        from sentencepiece import sentencepiece_model_pb2

        try:
            return sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)
        except DecodeError as error:  # it reads more closely than SentencePiece does
            raise TokenizerError(f"a damaged SentencePiece model: {error}") from None

    @property
    def changes(self) -> list[str]:
        """What its normaliser does to text before encoding it, other than to write spaces as U+2581."""
        rules = self.parts.normalizer_spec
        found = [rules.name or "own rules"] if rules.precompiled_charsmap else []
        return found + (["spaces in a row become one, those at the ends go"] if rules.remove_extra_whitespaces else [])

    @classmethod
    def load(cls, source: str | Path, cache_dir: str | Path | None = None) -> "Tokenizer":
        """Read a .model file, a directory that holds tokenizer.model, or a Hugging Face id."""
        path = Path(source)
        if path.is_dir():
            path = path / MODEL_FILE
        if not path.is_file():
            path = _from_hub(str(source), path, cache_dir)
        try:
            return cls(path.read_bytes())
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos or eos."""
        try:
            if not self._apart or not self._apart.search(text):
                return self._sp.encode(text)
            ids = []
            for part in self._apart.split(text):
                ids += self._in_bytes.get(part) or self._sp.encode(part)
            return ids
        except (RuntimeError, TypeError):
            _reject_surrogates(text)
            raise

    def encode_batch(self, texts: list[str], num_threads: int = -1) -> list[list[int]]:
        """`encode` of each text, on `num_threads` threads (-1: one per core)."""
        try:
            rows = self._sp.encode(texts, num_threads=num_threads)
        except (RuntimeError, TypeError):
            for text in texts:
                _reject_surrogates(text)
            raise
        if self._apart:
            for i, text in enumerate(texts):
                if self._apart.search(text):
                    rows[i] = self.encode(text)
        return rows

    def decode(self, ids) -> str:
        """Text of the ids; bos, eos, pad and ids beyond the pieces are left out."""
        return self._sp.decode([int(i) for i in ids if self._is_text(int(i))])

    def bytes_of(self, token: int) -> bytes:
        """What one id adds to a text, maybe a part of a character; nothing where `decode` leaves it out."""
        if not self._is_text(token):
            return b""
        if token in self._byte_of:
            return bytes([self._byte_of[token]])
        return self._sp.id_to_piece(token).replace(SPACE_MARK, " ").encode()

    def _is_text(self, token: int) -> bool:
        return token < self.n_pieces and token not in self._special


def _from_hub(name: str, path: Path, cache_dir) -> Path:
    """Path of tokenizer.model of the Hugging Face repository `name`, downloaded or from the cache."""
    if path.exists():  # a pipe, a device or a folder of that name
        raise TokenizerError(f"{path}: no tokenizer, not even a regular file")
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not name.endswith(".model")
    if not is_id or Path(name).parent.is_dir():
        raise TokenizerError(f"no tokenizer at {path}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise TokenizerError(f"no tokenizer at {path}, and huggingface_hub is not installed") from None
    try:
        return Path(hf_hub_download(name, MODEL_FILE, cache_dir=cache_dir))
    except Exception as error:  # the hub raises its own, requests', httpx's and OS errors
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise TokenizerError(f"no tokenizer at {path}, and none from Hugging Face {name}: {reason[0]}") from error


def _reject_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 10) : error.start + 10])
        raise TokenizerError(f"lone surrogate at character {error.start} of a text, near {near}") from None


class StreamDecoder:
    """Decode ids one at a time; the pieces of text joined equal `Tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # SentencePiece drops a dummy prefix at the start of a text only: later ids are decoded after these.
        self.context = tokenizer._sp.encode("a")
        self.context_text = tokenizer._sp.decode(self.context)
        self.started = False
        self.pending: list[int] = []
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character made of byte pieces is unfinished."""
        token = int(token)
        if not self.tokenizer._is_text(token):
            return ""
        self.pending.append(token)
        byte = self.tokenizer._byte_of.get(token)
        if byte is None:
            self.utf8.reset()
        else:
            self.utf8.decode(bytes([byte]))
            if self.utf8.getstate()[0]:  # bytes of a character still to be completed
                return ""
        return self.flush()

    def flush(self) -> str:
        """The rest; an unfinished character becomes U+FFFD."""
        self.utf8.reset()
        sp = self.tokenizer._sp
        if self.started:
            text = sp.decode(self.context + self.pending)[len(self.context_text) :]
        else:
            text = sp.decode(self.pending)
        if text:  # until then every id counts: a dummy prefix may still be among them
            self.pending, self.started = [], True
        return text


def encode_documents(tok: Tokenizer, texts: list[str]) -> list[list[int]]:
    """`text <eos>` of each text, the unit of pretraining, on one thread: data_process.py has a process a core."""
    return [ids + [tok.eos_id] for ids in tok.encode_batch(texts, num_threads=1)]


def encode_opening(tok: Tokenizer, text: str) -> list[int]:
    """How a document begins, for a base model to continue: `<eos> text` in our packed pretraining data."""
    return [tok.opening_id] + tok.encode(text)


def encode_prompt(tok: Tokenizer, messages: list[dict], max_len: int | None = None) -> list[int]:
    """Ids up to where the model answers: `question <bos> [answer <eos> question <bos>]...`, as fit_prompt has them."""
    ids, note = fit_prompt(tok, messages, max_len)
    if ids is None:
        raise TokenizerError(f"no room for a prompt in {max_len} tokens ({note})")
    return ids


def prompt_turns(tok: Tokenizer, ids: list[int]) -> list[str]:
    """The texts of a prompt's turns, a question first and last: what encode_prompt was given, or what of it fitted."""
    turns = [[]]
    for i in ids:
        if i in (tok.bos_id, tok.eos_id):
            turns.append([])
        else:
            turns[-1].append(i)
    return [tok.decode(turn) for turn in (turns if turns[-1] else turns[:-1])]


def fit_prompt(tok: Tokenizer, messages: list[dict], max_len: int | None) -> tuple[list[int] | None, str | None]:
    """The ids of a prompt and what was done to make them fit in `max_len`; `messages` ends with a user's.

    What exceeds it goes: the oldest turns ("dropped turns"), then the last question's left ("cut question"), as far as
    a sentence begins there.
    """
    turns = _read_turns(tok, messages)
    if turns.answers[-1]:
        raise TokenizerError("the last message of a prompt must be the user's")
    example, note = turns.last(max_len)
    return (None if example is None else example.ids), note


def encode_example(
    tok: Tokenizer, messages: list[dict], max_len: int | None = None
) -> tuple[Example | None, str | None]:
    """A training example and what was done to make it fit in `max_len`.

    (Example, None), (Example, "dropped turns"), (Example, "cut question") or (None, why there is none). An
    answer is kept whole with its <eos> or not at all; the last one is never dropped to keep older turns. The answer of
    a message with "train": False has no loss.
    """
    turns, why = _answered_turns(tok, messages)
    return turns.last(max_len) if turns else (None, why)


def encode_examples(tok: Tokenizer, messages: list[dict], max_len: int) -> tuple[list[Example], str | None, int]:
    """The training examples of a conversation of any length, what made them fit, and how many answer tokens are lost.

    A conversation that fits is one example and has no note. Else it is "split": each example holds whole turns under
    the system text, as many as fit, and every answer is trained in one of them. After the first, an example begins
    with those of the turns before it that fit in half of max_len; their answers are context, without loss, so that
    "go on" is not learnt without what it follows. A turn longer than max_len loses its question's left ("cut
    question") or, where the answer does not fit, is left out ("answer left out"); "dropped turns" are untrained ones
    for which the only example has no room. Without an example the note says why.
    """
    turns, why = _answered_turns(tok, messages)
    if not turns:
        return [], why, 0
    n, examples, notes, lost, i = len(turns.answers), [], set(), 0, 0
    while i < n:
        start, stop = turns.window(i, max_len, max_len // 2)
        if any(turns.trained[i:stop]):
            opening, note = turns.fitted(start, stop, max_len)
            notes.add(note)
            if opening is None:
                lost += len(turns.answers[i])
            else:
                examples.append(turns.example(start, stop, opening, trained_from=i))
                whole = stop - start == n
        i = stop
    if not examples:
        return [], "answer too long", lost
    said = ["split"] if len(examples) > 1 else ["dropped turns"] if not (whole or lost) else []
    said += ["cut question"] * ("cut question" in notes) + ["answer left out"] * (lost > 0)
    return examples, "; ".join(said) or None, lost


def encode_pair(
    tok: Tokenizer, messages: list[dict], answers: list[str], max_len: int
) -> tuple[list[Example], str | None, int]:
    """Answers to one prompt as examples with the loss on them alone; a note and tokens lost as in encode_examples.

    What the longest leaves no room for goes from the prompt, as in fit_prompt, so that all stand under the same.
    """
    if not all(answers):
        return [], "empty answer", 0
    encoded = [tok.encode(answer) + [tok.eos_id] for answer in answers]
    ids, note = fit_prompt(tok, messages, max_len - max(map(len, encoded)))
    if ids is None:
        return [], "answer too long", sum(map(len, encoded))
    return [Example(ids + answer, [0] * len(ids) + [1] * len(answer)) for answer in encoded], note, 0


def _read_turns(tok, messages):
    """Turns of messages: maybe a system's, then a user's and an assistant's in turn."""
    roles = [message["role"] for message in messages]
    system = messages[0]["content"] if roles[:1] == ["system"] else None
    rest = messages[0 if system is None else 1 :]
    wanted = (["user", "assistant"] * len(rest))[: len(rest)]
    if not rest or [message["role"] for message in rest] != wanted:
        raise TokenizerError("roles out of order")
    return Turns(tok, system, rest[::2], rest[1::2])


def _answered_turns(tok, messages):
    """(Turns, None) of a conversation to train on, or (None, why it is none)."""
    try:
        turns = _read_turns(tok, messages)
    except TokenizerError as error:
        return None, str(error)
    if not turns.answers[-1]:
        return None, "no last answer"
    if [tok.eos_id] in turns.answers:
        return None, "empty answer"
    return (turns, None) if any(turns.trained) else (None, "no answer to train on")
