"""Rewards by the rules of verse, as the key `reward` of ppo_train.py and grpo_train.py takes them.

The prompts have the fields that corpora/poem_tasks.py writes. The tables of tones and rhymes are those of the file that
the environment variable VERSE_TABLES names, else of TABLES, from the current directory.

    python grpo_train.py configs/poems/grpo.py --reward=verse.rewards:rules
"""

import os

from verse import judge
from verse.tables import load_tables

TABLES = "data/poems/rows/verse.json"


def judged(replies, form, rhyme, heads, words):
    """What verse.judge finds in each reply."""
    tables = load_tables(os.environ.get("VERSE_TABLES") or TABLES)
    asked = zip(replies, form, rhyme, heads, words, strict=True)
    return [judge(text, tables, *wishes) for text, *wishes in asked]


def rules(prompts, replies, form, rhyme, heads, words):
    """From 0 to 7, with credit for every part: the shares of lines of the right length, of rhyme words in the asked
    class (three times: they are the hardest), of lines with right tones, and of the first characters and words that
    were asked for, all of them where none were."""
    return [credit(found) for found in judged(replies, form, rhyme, heads, words)]


def credit(found):
    """The reward of one reply that verse.judge gave this of."""
    return found["lines"] + 3 * found["rhymes"] + found["right_tones"] + found["heads"] + found["words"]


def figures(prompts, replies, form, rhyme, heads, words):
    """What a comparison averages, as the key `judge` of eval_generate.py takes it: the reward and what is right."""
    names = ("form", "rhyme", "tones", "all_right", "asked")
    found = judged(replies, form, rhyme, heads, words)
    return [dict(reward=credit(row)) | {name: row[name] for name in names} for row in found]
