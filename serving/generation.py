"""A reply, piece by piece: the prompt that fits, text up to a stop, the log-probabilities of its tokens."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import checkpoint
from common.checkpoint import Checkpoint, CheckpointError
from common.runs import file_key
from model import Llama
from serving.protocol import ApiError, Token, Wanted
from tokenizer import StreamDecoder, Tokenizer, TokenizerError, encode_opening, fit_prompt

GREEDY_BELOW = 1e-3  # temperature: dividing by less may leave no finite logits


@dataclass
class Started:
    prompt_tokens: int
    note: str | None  # "dropped turns" where the oldest did not fit


@dataclass
class Piece:
    text: str
    tokens: list  # [(Token, [Token])] that the text is made of


@dataclass
class Finished:
    reason: str  # stop: by its end or a stop text; length: by max_new_tokens or the context
    tokens: int  # of the reply, without its <eos>


@dataclass(eq=False)
class Job:
    """A request on its way; `emit` gets a Started, Pieces and a Finished, or at any time an ApiError instead."""

    path: Path
    wanted: Wanted
    emit: Callable
    address: str = ""  # whose turn it is, between clients
    cancelled: bool = False


@dataclass
class Loaded:
    """A checkpoint in memory; `key` changes when its file does."""

    key: tuple
    ckpt: Checkpoint
    tokenizer: Tokenizer
    model: Llama


class _Enough(Exception):
    """Ends model.generate from within: a stop text, or nobody listens any more."""


def load(path: Path, device) -> Loaded:
    key = file_key(path)
    ckpt = checkpoint.load(path, training=False)
    if ckpt.model_config["scalar_head"]:
        raise CheckpointError(f"{path} is a reward model: it writes nothing")
    tokenizer = checkpoint.tokenizer_of(ckpt)
    model = checkpoint.build_model(ckpt).to(device).eval()
    ckpt.drop()
    return Loaded(key, ckpt, tokenizer, model)


def prompt_ids(loaded: Loaded, wanted: Wanted) -> tuple[list[int], str | None]:
    """Ids to continue and a note, leaving max_new_tokens, or half of the context, free; oldest turns go first."""
    tok, context = loaded.tokenizer, loaded.model.config.max_seq_len
    if context < 2:
        raise ApiError(f"{wanted.model}: a context of {context} has no room for a prompt and a reply")
    room = context - min(wanted.sampling["max_new_tokens"], context // 2)
    if wanted.messages is None:
        ids, note = encode_opening(tok, wanted.prompt), None
        if len(ids) > room:
            raise too_long("prompt", f"the prompt has {len(ids)} tokens", room, context)
        return ids, note
    if checkpoint.continues(loaded.ckpt):
        what = "was pretrained and no more: it continues text, at /v1/completions, and answers nothing"
        raise ApiError(f"{wanted.model} {what}", param="model", code="not_a_chat_model")
    ids, note = fit_prompt(tok, wanted.messages, room)
    if ids is None or note == "cut question":
        raise too_long("messages", "the last question and the system text are too long", room, context)
    return ids, note


def too_long(param, what, room, context):
    less = f"there is room for {room} beside the reply in a context of {context}"
    return ApiError(f"{param}: {what}, {less}", param=param, code="context_length_exceeded")


class Text:
    """The text of a reply up to the first stop; what may be the beginning of one is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str]):
        self.decoder, self.stops, self.stopped = StreamDecoder(tokenizer), stops, False
        self.held: list[tuple[str, list]] = []  # text and the tokens that it is made of

    def push(self, token: int, facts) -> Piece | None:
        """What may be shown once this token has come."""
        new = self.decoder.push(token)
        if self.held and not self.held[-1][0]:  # bytes of a character that this token goes on with
            self.held[-1] = (new, [*self.held[-1][1], facts])
        else:
            self.held.append((new, [facts]))
        text = "".join(part for part, _ in self.held)
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends))
        return self._release(len(text) - max((overlap(text, stop) for stop in self.stops), default=0), whole=True)

    def rest(self) -> Piece | None:
        """What was held back, when no stop came; a character that the end cut in two is left out."""
        return self._release(sum(len(part) for part, _ in self.held))

    def _release(self, length: int, whole: bool = False) -> Piece | None:
        """The first `length` characters, `whole` parts of them only."""
        text, tokens = "", []
        while self.held and self.held[0][0] and length > len(text):
            part, facts = self.held[0]
            if whole and len(text) + len(part) > length:
                break
            self.held.pop(0)
            text += part[: length - len(text)]
            tokens += facts
        return Piece(text, tokens) if text else None


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def named(tok: Tokenizer, token: int, logp: float) -> Token:
    """A token as OpenAI names it: its text, the bytes of a part of a character, or the name of a special one."""
    data = tok.bytes_of(token)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    special = {tok.pad_id: "<unk>", tok.bos_id: "<s>", tok.eos_id: "</s>"}
    return Token(text or special.get(token, f"<{token}>"), data, max(logp, -9999.0))


def answer(loaded: Loaded, job: Job) -> None:
    """Generate the reply of a job into its `emit`. ApiError where the prompt cannot be used."""
    wanted, tok, V = job.wanted, loaded.tokenizer, loaded.model.config.vocab_size
    try:
        ids, note = prompt_ids(loaded, wanted)
    except TokenizerError as error:
        raise ApiError(str(error)) from None
    job.emit(Started(len(ids), note))
    stop_id = tok.eos_id if wanted.messages is not None else tok.closing_id
    text, drawn, count, reason = Text(tok, wanted.stops), deque(), 0, "length"

    def on_logits(logits, _):  # (1, V)
        if wanted.top is not None:
            logps = logits[0].log_softmax(-1)
            drawn.append((logps, logps.topk(min(wanted.top, V))))

    def on_token(_, token):
        nonlocal count, reason
        if job.cancelled:
            raise _Enough
        facts = None
        if wanted.top is not None:
            logps, top = drawn.popleft()
            others = [named(tok, *each) for each in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
            facts = named(tok, token, logps[token].item()), others
        if token == stop_id:
            reason = "stop"
            return
        count += 1
        if piece := text.push(token, facts):
            job.emit(piece)
        if text.stopped:
            reason = "stop"
            raise _Enough

    sampling = dict(wanted.sampling)
    if sampling["temperature"] < GREEDY_BELOW:
        sampling["temperature"] = 0
    hooks = dict(on_token=on_token, on_logits=on_logits, fetch_every=1)  # so that a stop acts within a token
    try:
        with checkpoint.naming(loaded.ckpt):
            loaded.model.generate([ids], **sampling, eos_id=stop_id, seed=wanted.seed, **hooks)
    except _Enough:
        pass
    if job.cancelled:  # by a server that stops; to a client that left nobody tells it
        raise ApiError("the server is stopping", 503)
    if not text.stopped and (piece := text.rest()):
        job.emit(piece)
    job.emit(Finished(reason, count))
