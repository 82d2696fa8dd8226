"""How likely a model finds each choice of a question: the one way in which every benchmark here is scored.

A choice follows the question's context, and the log-probabilities of its tokens are added up. Text becomes tokens and
is cut as in lm-evaluation-harness (`_encode_pair` of its TemplateLM, `_loglikelihood_tokens` of its HFLM): context and
choice are encoded as one text, and what exceeds the model's context goes on the left.
"""

from typing import NamedTuple

import torch

from common.progress import Progress
from dataset.formats import DataError, shortened
from generate import KVCache
from head import row_chunks, upcast

BATCH_TOKENS = dict(cpu=4096, cuda=32768)  # read at once; what is kept of them, keys and values, is most of the memory


class Question(NamedTuple):
    context: str
    choices: list[str]
    answer: int  # which choice is right
    group: str  # the subject or source that it counts for


class Row(NamedTuple):
    """A question in tokens. The model reads `shared` once, then each of the `tails` after it."""

    shared: list[int]  # what all choices have in common, the context at least
    tails: list[list[int]]  # the rest of each choice, but for its last token
    targets: list[list[int]]  # the tokens of each choice, which are predicted
    cut: int  # tokens of the context that did not fit


class Scores(NamedTuple):
    """Of each question, the log-likelihood of each choice in nats; how many questions lost some of their context."""

    logps: list[list[float]]
    cut: int


def make_row(context, choices, limit):
    """Row of a context and choices in ids, for a model of `limit` positions.

    The last token of a choice is predicted and not read, so that limit + 1 fit. All choices see the same context.
    """
    room = limit + 1 - max(map(len, choices))
    if room < 1 or not context:
        raise ValueError(f"no room for a choice of {limit + 1 - room} tokens in a context of {limit}")
    if not all(choices):
        raise ValueError("a choice adds no token to it")
    kept = context[-room:]
    read = [kept + choice[:-1] for choice in choices]
    n = next((i for i, column in enumerate(zip(*read, strict=False)) if len(set(column)) > 1), min(map(len, read)))
    return Row(read[0][:n], [ids[n:] for ids in read], choices, len(context) - len(kept))


def make_rows(tokenizer, questions, opening, limit):
    """The Row of each Question; spaces that end a context count as its choices'. `opening` stands before each text."""
    texts = [text for q in questions for text in (q.context.rstrip(), *(q.context + choice for choice in q.choices))]
    encoded, rows = iter(tokenizer.encode_batch(texts)), []
    for question in questions:
        context = next(encoded)
        choices = [next(encoded)[len(context) :] for _ in question.choices]
        try:
            rows.append(make_row(opening + context, choices, limit))
        except ValueError as error:
            raise DataError(f"{question.group}: {shortened(question.context, 60)!a}: {error}") from None
    return rows


def batches(rows, most, limit):
    """Numbers of rows that are read together, the longest first: similar in length, `most` tokens with the padding.

    Padded to the longest shared part and the longest tail none outgrows `limit`: what is written there would stand at
    positions that the model does not have.
    """
    sizes = [(len(row.shared), max(map(len, row.tails))) for row in rows]
    batch, shared, tail = [], 0, 0
    for i in sorted(range(len(rows)), key=lambda i: -sum(sizes[i])):
        longest = max(shared, sizes[i][0]) + max(tail, sizes[i][1])
        if batch and (longest * (len(batch) + 1) > most or longest > limit):
            yield batch
            batch, shared, tail = [], 0, 0
        batch.append(i)
        shared, tail = max(shared, sizes[i][0]), max(tail, sizes[i][1])
    if batch:
        yield batch


def padded(lists, device):
    """Lists of ids as rows of zeros after them: (B, T)."""
    longest = max(map(len, lists))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in lists], device=device)


def picked_logps(model, h, which, targets):
    """log p of targets (M,) after the states h[which], h (N, D), which (M,) rising: (M,)."""
    found = []
    for rows in row_chunks(h):
        logits = upcast(model.head(h[rows]))
        logps = torch.log_softmax(logits, -1, out=logits)
        begin, end = torch.searchsorted(which, torch.tensor([rows.start, rows.stop], device=h.device)).tolist()
        found.append(logps[which[begin:end] - rows.start, targets[begin:end]])
    return torch.cat(found)


def score_batch(model, rows):
    """Log-likelihoods of the choices of some Rows: [[nats]].

    The cache holds the shared part; each tail is written after it, over the one before.
    """
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    lengths, n_choices = [len(row.shared) for row in rows], max(len(row.tails) for row in rows)
    longest = max(len(ids) for row in rows for ids in row.tails)
    cache = KVCache(model.config, len(rows), max(lengths) + longest, device, dtype) if longest else None
    states, predicted = [], []  # states (n, D), and of each (its number, token, row, choice) that it predicts
    h, n_states = model.hidden(padded([row.shared for row in rows], device), cache), 0  # (B, T, D)
    for b, row in enumerate(rows):
        n = len(row.targets[0]) - len(row.tails[0])  # targets of each choice that the shared part predicts
        states.append(h[b, lengths[b] - n : lengths[b]])
        predicted += [(n_states + i, ids[i], b, c) for i in range(n) for c, ids in enumerate(row.targets)]
        n_states += n
    for c in range(n_choices if longest else 0):
        tails = [row.tails[c] if c < len(row.tails) else [] for row in rows]
        if not any(tails):
            continue
        cache.set_lengths(lengths)
        h = model.hidden(padded(tails, device), cache)
        for b, ids in enumerate(tails):
            states.append(h[b, : len(ids)])
            targets = rows[b].targets[c][-len(ids) :] if ids else []
            predicted += [(n_states + i, target, b, c) for i, target in enumerate(targets)]
            n_states += len(ids)
    which, targets, b, c = torch.tensor(predicted).T.contiguous()
    logps = picked_logps(model, torch.cat(states), which.to(device), targets.to(device)).cpu().double()
    found = logps.new_zeros(len(rows), n_choices).index_put_((b, c), logps, accumulate=True)
    return [found[i, : len(row.tails)].tolist() for i, row in enumerate(rows)]


@torch.no_grad()
def score_rows(model, rows):
    """Log-likelihoods of the choices of Rows, in any number: [[nats]]. FloatingPointError where they are not finite."""
    found, done, most = [None] * len(rows), 0, BATCH_TOKENS.get(model.norm.weight.device.type, 4096)
    progress = Progress(len(rows), desc="questions")
    for batch in batches(rows, most, model.config.max_seq_len):
        for i, logps in zip(batch, score_batch(model, [rows[i] for i in batch]), strict=True):
            found[i] = logps
        done += len(batch)
        progress.update(done, sum(len(rows[i].shared) + sum(map(len, rows[i].tails)) for i in batch))
    progress.close()
    if not all(torch.tensor(logps).isfinite().all() for logps in found):
        raise FloatingPointError("log-likelihoods are not finite: weights are too large, or training diverged")
    return found


def score(model, tokenizer, questions, opening):
    """Scores of Questions; `opening` are the ids that stand before each text, such as what a document opens with."""
    rows = make_rows(tokenizer, questions, opening, model.config.max_seq_len)
    return Scores(score_rows(model, rows), sum(row.cut > 0 for row in rows))


def by_character(logps, questions):
    """Scores per character, which do not favour short choices."""
    return [
        [nats / len(choice) for nats, choice in zip(row, question.choices, strict=True)]
        for row, question in zip(logps, questions, strict=True)
    ]


def by_own_likelihood(logps, alone):
    """log p(choice | context) - log p(choice | no question): what the question adds, so that no choice wins by being
    common (Holtzman et al., 2021, arXiv:2104.08315)."""
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(logps, alone, strict=True)]


def chosen(scores):
    """The number of the highest score of each question; of equal ones the first, as numpy's argmax."""
    return [max(range(len(row)), key=row.__getitem__) for row in scores]
