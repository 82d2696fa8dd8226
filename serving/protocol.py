"""OpenAI's JSON: requests read strictly, answers, chunks of a stream and errors written.

A key that is unknown, or would change the reply in a way that is not built, is refused instead of ignored.
Source: https://platform.openai.com/docs/api-reference/chat and https://platform.openai.com/docs/api-reference/completions
"""

import codecs
import difflib
import json
import re
import secrets
import time
from dataclasses import dataclass

# key: type, lowest, highest
NUMBERS = dict(
    temperature=(float, 0, 2),
    top_p=(float, 0, 1),
    min_p=(float, 0, 1),
    top_k=(int, 0, 10**6),
    repetition_penalty=(float, 0.1, 10),
    max_tokens=(int, 1, 10**6),
    max_completion_tokens=(int, 1, 10**6),
    seed=(int, -(2**63), 2**63 - 1),
)
# values with which a key changes nothing, so that it is taken
NEUTRAL = dict(
    n=[1], best_of=[1], echo=[False], suffix=[""], presence_penalty=[0], frequency_penalty=[0], logit_bias=[{}],
    tools=[[]], functions=[[]], tool_choice=["none", "auto"], function_call=["none", "auto"], modalities=[["text"]],
    response_format=[{"type": "text"}],
)  # fmt: skip
UNHEEDED = "user metadata store service_tier parallel_tool_calls safety_identifier prompt_cache_key".split()
SHARED = {"model", "stream", "stream_options", "stop", "logprobs", *NUMBERS, *NEUTRAL, *UNHEEDED}
MOST_STOPS, LONGEST_STOP, MOST_ALTERNATIVES = 4, 200, 20
ROLES = dict(system="system", developer="system", user="user", assistant="assistant")
_BREAKS = re.compile("[\x85\u2028\u2029]")


class ApiError(Exception):
    """What a client did wrong, or what failed here, as OpenAI's clients read it."""

    def __init__(self, message, status=400, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self):
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return dict(error=dict(message=str(self), type=kind, param=self.param, code=self.code))


@dataclass
class Wanted:
    """A request, checked."""

    model: str
    messages: list[dict] | None  # of a chat
    prompt: str | None  # of a plain completion
    sampling: dict  # temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens
    seed: int
    stops: list[str]
    top: int | None  # likeliest tokens to name beside each of the reply; None: no log-probabilities
    stream: bool
    usage: bool  # whether the stream ends with its usage


def parse_json(body: bytes) -> dict:
    """The object in a request body."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ApiError(f"the body is not JSON in UTF-8: {str(error) or 'nested too deeply'}") from None
    if not isinstance(values, dict):
        raise ApiError("the body must be a JSON object")
    return values


def read_request(values: dict, chat: bool, defaults: dict, limits: dict) -> Wanted:
    """The request in a JSON object.

    defaults: temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens. limits: max_messages and
    max_characters.
    """
    values = {key: value for key, value in values.items() if value is not None}
    own = {"messages", "top_logprobs"} if chat else {"prompt"}
    for key, value in values.items():
        if key not in SHARED | own:
            nearest = difflib.get_close_matches(key, SHARED | own, n=1)
            hint = f", is {nearest[0]} meant?" if nearest else ""
            raise ApiError(f"{key[:60]!a}: unknown{hint}", param=ascii(key[:60])[1:-1])
        if key in NEUTRAL and not _changes_nothing(key, value):
            raise ApiError(f"{key}: not supported here, but for {json.dumps(NEUTRAL[key][0])}", param=key)
    if not isinstance(values.get("model"), str):
        raise ApiError("model: the name of a checkpoint is needed; /v1/models lists them", param="model")
    numbers = {key: _number(key, values[key]) for key in NUMBERS if key in values}
    longest = numbers.pop("max_completion_tokens", numbers.pop("max_tokens", defaults["max_new_tokens"]))
    seed = numbers.pop("seed", secrets.randbelow(2**31))
    messages = _messages(values.get("messages"), limits) if chat else None
    prompt = None if chat else _prompt(values.get("prompt"), limits)
    options = values.get("stream_options", {})
    if isinstance(options, dict):
        options = {key: value for key, value in options.items() if value is not None}
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError("stream_options: an object with include_usage is needed", param="stream_options")
    return Wanted(
        model=values["model"],
        messages=messages,
        prompt=prompt,
        sampling=defaults | numbers | dict(max_new_tokens=longest),
        seed=seed,
        stops=_stops(values.get("stop", [])),
        top=_alternatives(values, chat),
        stream=_truth(values, "stream"),
        usage=_truth(options, "include_usage"),
    )


def _changes_nothing(key, value):
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[key])


def _number(key, value):
    kind, low, high = NUMBERS[key]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
        raise ApiError(f"{key}: {'a whole' if kind is int else 'a'} number from {low} to {high} is needed", param=key)
    return kind(value)


def _truth(values, key):
    if not isinstance(values.get(key, False), bool):
        raise ApiError(f"{key}: true or false is needed", param=key)
    return values.get(key, False)


def _text(value, param, limits):
    """Text that can be encoded and is not too long."""
    if not isinstance(value, str):
        raise ApiError(f"{param}: text is needed", param=param)
    if len(value) > limits["max_characters"]:
        least = f"{len(value):,} characters, at most {limits['max_characters']:,} are taken"
        raise ApiError(f"{param}: {least}", param=param, code="string_above_max_length")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"{param}: half of a surrogate pair at character {error.start}", param=param) from None
    return value


def _messages(found, limits):
    """[{role, content}]: maybe a system's, then a user's and an assistant's in turn, the last a user's."""
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise ApiError("messages: a list of objects with role and content is needed", param="messages")
    if len(found) > limits["max_messages"]:
        most = limits["max_messages"]
        raise ApiError(f"messages: {len(found)} messages, at most {most} are taken", param="messages")
    messages = []
    for i, message in enumerate(found):
        role, content, param = message.get("role"), message.get("content"), f"messages[{i}]"
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(f"{param}.role: system, user or assistant is needed", param=f"{param}.role")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                     for part in content]  # fmt: skip
            if not all(isinstance(part, str) for part in parts):
                raise ApiError(f"{param}.content: text is all that is read", param=f"{param}.content")
            content = "".join(parts)
        messages.append(dict(role=ROLES[role], content=_text(content, f"{param}.content", limits)))
    roles = [message["role"] for message in messages]
    rest = roles[1:] if roles[:1] == ["system"] else roles
    if len(rest) % 2 == 0 or rest != (["user", "assistant"] * len(rest))[: len(rest)]:
        order = "maybe a system message, then user and assistant in turn, the last the user's"
        raise ApiError(f"messages: wrong order, needed are {order}", param="messages")
    return messages


def _prompt(found, limits):
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str):
        found = found[0]
    if isinstance(found, list):
        raise ApiError("prompt: one text a request is read, no list and no token ids", param="prompt")
    return _text(found, "prompt", limits)


def _stops(found):
    found = [found] if isinstance(found, str) else found
    right = isinstance(found, list) and len(found) <= MOST_STOPS
    if not right or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in found):
        needed = f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters are needed"
        raise ApiError(f"stop: {needed}", param="stop")
    return found


def _alternatives(values, chat):
    """How many alternatives to each token are asked for, None where no log-probabilities are."""
    asked = values.get("logprobs")
    key = "top_logprobs" if chat else "logprobs"
    if chat and not _truth(values, "logprobs"):
        if "top_logprobs" in values:
            raise ApiError("top_logprobs: needs logprobs to be true", param=key)
        return None
    top = values.get("top_logprobs", 0) if chat else asked
    if top is None or top is False:
        return None
    if not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MOST_ALTERNATIVES:
        raise ApiError(f"{key}: a whole number from 0 to {MOST_ALTERNATIVES} is needed", param=key)
    return top


# of bytes that are no character each becomes one, as SentencePiece has it
codecs.register_error("one_a_byte", lambda error: ("\ufffd", error.start + 1))


@dataclass
class Token:
    """A token of a reply, or one that could have stood there."""

    text: str
    bytes: bytes
    logp: float

    def json(self):
        return dict(token=self.text, logprob=self.logp, bytes=list(self.bytes))


class Answer:
    """The JSON of one reply: `whole`, or `opening`, a `chunk` a piece and `closing`."""

    def __init__(self, wanted: Wanted):
        self.wanted, self.chat, self.offset = wanted, wanted.messages is not None, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("one_a_byte")
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    def _object(self, stream, choices, **more):
        name = "chat.completion" if self.chat else "text_completion"
        name += ".chunk" * (stream and self.chat)
        return dict(id=self.id, object=name, created=self.created, model=self.wanted.model, choices=choices) | more

    def logprobs(self, text, tokens):
        """tokens: [(Token, [Token] it was drawn against)] of a text."""
        if self.wanted.top is None:
            return None
        if self.chat:
            content = [token.json() | dict(top_logprobs=[each.json() for each in top]) for token, top in tokens]
            return dict(content=content, refusal=None)
        offsets = []
        if not self.offset and tokens and tokens[0][0].bytes.startswith(b" ") and not text.startswith(" "):
            self.offset = -1  # the space that some tokenizers put before a text, and take away from it
        for token, _ in tokens:
            if not 0x80 <= token.bytes[:1].ljust(1)[0] < 0xC0:  # what it begins ends what was left unfinished
                self.offset += len(self.decoder.decode(b"", final=True))
            offsets.append(max(0, self.offset))
            self.offset += len(self.decoder.decode(token.bytes))
        return dict(
            tokens=[token.text for token, _ in tokens],
            token_logprobs=[token.logp for token, _ in tokens],
            top_logprobs=[{each.text: each.logp for each in (token, *top)} for token, top in tokens],
            text_offset=offsets,
        )

    def _chunk(self, delta, logprobs=None, reason=None, **more):
        body = dict(delta=delta) if self.chat else dict(text=delta.get("content", ""))
        choice = dict(index=0) | body | dict(logprobs=logprobs, finish_reason=reason)
        return self._object(True, [choice], **more | (dict(usage=None) if self.wanted.usage else {}))

    def opening(self):
        return [self._chunk(dict(role="assistant", content=""))] if self.chat else []

    def chunk(self, text, tokens):
        return self._chunk(dict(content=text), self.logprobs(text, tokens))

    def closing(self, reason, usage, facts):
        """The last chunks. facts: what is told beside OpenAI's fields (seed; note, where turns were left out)."""
        chunks = [self._chunk({}, None, reason, **facts)]
        return chunks + ([self._object(True, [], usage=usage)] if self.wanted.usage else [])

    def whole(self, text, tokens, reason, usage, facts):
        body = dict(message=dict(role="assistant", content=text, refusal=None)) if self.chat else dict(text=text)
        choice = dict(index=0) | body | dict(logprobs=self.logprobs(text, tokens), finish_reason=reason)
        return self._object(False, [choice], usage=usage, **facts)


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict:
    return dict(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def event(value: dict | str) -> bytes:
    """A server-sent event. Signs that some clients take for the end of a line are escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _BREAKS.sub(lambda sign: json.dumps(sign[0])[1:-1], text)
    return f"data: {text}\n\n".encode()
