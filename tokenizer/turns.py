"""What of a conversation fits into a number of tokens: whole turns, the end of a question that is too long."""

import bisect
import re
from dataclasses import dataclass

# Where a question may begin that lost its left: after a sentence, else after a clause, else at least not inside a word.
BOUNDARIES = [
    re.compile(r"(?:[。！？!?…\n]|\.(?=\s))[”’」』）)\"']*\s*"),
    re.compile(r"[；，、：]|[;,:]\s+"),
    re.compile(r"\s+|(?<![^\W\u2e80-\U0003ffff])|(?![^\W\u2e80-\U0003ffff])"),  # letters but for Chinese characters
]


@dataclass
class Example:
    """A conversation as ids, with 1 in `loss_mask` at each answer token and its <eos> that is trained."""

    ids: list[int]
    loss_mask: list[int]


class Turns:
    """The turns of a conversation as ids: `questions`, `answers` with their <eos>, which of those are `trained`.

    The last answer is empty where the user spoke last. The system text stands before the first question of whatever
    turns are put together.
    """

    def __init__(self, tok, system, asked, answered):
        self.tok, self.system = tok, "" if system is None else f"{system}\n"
        self.texts = [message["content"] for message in asked]
        self.questions = [tok.encode(text) for text in self.texts]
        self.answers = [tok.encode(message["content"]) + [tok.eos_id] for message in answered]
        self.trained = [message.get("train", True) for message in answered]
        if len(asked) > len(answered):
            self.answers.append([])
            self.trained.append(True)
        self._openings = {}

    def opening(self, i):
        """The question of turn i right under the system text."""
        if not self.system:
            return self.questions[i]
        if i not in self._openings:
            self._openings[i] = self.tok.encode(self.system + self.texts[i])
        return self._openings[i]

    def size(self, start, stop):
        """Tokens of the turns from `start` up to `stop`."""
        rest = sum(map(len, self.questions[start + 1 : stop])) + sum(map(len, self.answers[start:stop]))
        return len(self.opening(start)) + rest + stop - start

    def window(self, i, max_len, context):
        """(start, stop) of turn i with as many turns before it as fit in `context`, then as many after it as fit."""
        start, stop = i, i + 1
        while start and self.size(start - 1, i) <= context and self.size(start - 1, stop) <= max_len:
            start -= 1
        while stop < len(self.answers) and self.size(start, stop + 1) <= max_len:
            stop += 1
        return start, stop

    def fitted(self, start, stop, max_len):
        """(the opening of a window, None) or, if it is one turn that is too long, (what fits of it or None, a note)."""
        room = max_len - self.size(start, stop) + len(self.opening(start))
        if room >= len(self.opening(start)):
            return self.opening(start), None
        if not (ids := self.cut(start, room)):
            return None, "answer too long" if self.answers[start] else "no room for the question"
        return ids, "cut question"

    def cut(self, i, room):
        """Ids of the end of question i that fits in `room`, from a sentence's start if one is in its first half.

        The system text stays whole where that leaves half of the room. [] if nothing of the question fits.
        """
        system, text = self.system, self.texts[i]
        if len(self.tok.encode(system)) > room // 2:
            system, text = "", system + text

        def fits(start):
            return len(self.tok.encode(system + text[start:])) <= room

        start = bisect.bisect_left(range(len(text)), True, key=fits)
        if start == len(text):
            return []
        middle = (start + len(text)) // 2
        found = (match.end() for boundary in BOUNDARIES for match in boundary.finditer(text, max(start - 1, 0)))
        start = next((place for place in found if start <= place <= middle and fits(place)), start)
        return self.tok.encode(system + text[start:])

    def last(self, max_len):
        """(Example or None, note) of the last turn and as many before it as fit."""
        max_len = float("inf") if max_len is None else max_len
        start, stop = self.window(len(self.answers) - 1, max_len, max_len)
        opening, note = self.fitted(start, stop, max_len)
        if opening is None:
            return None, note
        return self.example(start, stop, opening, start), note or ("dropped turns" if start else None)

    def example(self, start, stop, opening, trained_from):
        """The turns from `start` up to `stop`, those before `trained_from` without loss."""
        ids, loss_mask = [], []
        for i in range(start, stop):
            question = opening if i == start else self.questions[i]
            ids += question + [self.tok.bos_id] + self.answers[i]
            trained = int(self.trained[i] and i >= trained_from)
            loss_mask += [0] * (len(question) + 1) + [trained] * len(self.answers[i])
        return Example(ids, loss_mask)
