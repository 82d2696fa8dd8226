"""The poet that the project brings, docs/poet.pt: where it is from, and that it keeps the rules it was rewarded for."""

from chains import ROOT

from alignment.comparison import answer
from common import checkpoint
from common.distributed import setup
from eval_generate import load, prompt_ids
from verse import judge
from verse.tables import load_tables

TITLES = ["春夜", "秋思", "山居", "送友人", "江上", "夜雨", "登楼", "寄远"]
RHYMES = ["人", "年", "风", "秋", "来", "时"]
FORM, RHYME, ALL_RIGHT = 0.93, 0.8, 0.75  # of 96 poems, less than it has: another CPU rounds otherwise


def test_the_poet_keeps_form_and_rhyme():
    poet = load(ROOT / "docs/poet.pt", setup("cpu", "float32", 0))
    asked = [(title, rhyme, form) for title in TITLES for rhyme in RHYMES for form in ("五绝", "七绝")]
    texts = [f"以《{title}》为题写一首{form}，押{rhyme}韵。" for title, rhyme, form in asked]
    prompts = [prompt_ids(poet, [dict(role="user", content=text)], 40) for text in texts]
    _, poems, ended = answer(poet, prompts, dict(batch_size=48, seed=1, max_new_tokens=40), 0.8, 0.9)
    tables = load_tables(ROOT / "docs/poet.json")
    found = [judge(poem, tables, form, rhyme) for poem, (_, rhyme, form) in zip(poems, asked, strict=True)]
    shares = {key: sum(row[key] for row in found) / len(found) for key in ("form", "rhyme", "all_right")}
    assert all(ended)
    assert shares["form"] >= FORM and shares["rhyme"] >= RHYME and shares["all_right"] >= ALL_RIGHT
    assert len(set(poems)) == len(poems)


def test_the_poet_says_where_it_is_from():
    poet = checkpoint.load(ROOT / "docs/poet.pt")
    assert poet.config["out"] == "out/poems/int4" and poet.config["init_from"] == "out/poems/grpo"
    assert poet.parent["stage"] == "grpo" and len(poet.parent["sha256"]) == 64
    assert len(poet.git_commit) == 40 and set(poet.training["data"]) == {"train.poems.bin", "val.poems.bin"}
