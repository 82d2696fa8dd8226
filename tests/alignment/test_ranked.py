"""Pairs of a policy's own replies."""

import json

import pytest
from chains import argv

from alignment import ranked
from alignment.ranked import rank_pairs
from common.config import ConfigError, UserError
from data_process import main as process
from dataset.batches import load_pairs
from tokenizer import Tokenizer, encode_prompt


def test_pairs_go_from_the_ends_inwards():
    assert rank_pairs([0.5, 2.0, 1.0, -1.0], 2) == [(1, 3), (2, 0)]
    assert rank_pairs([0.5, 2.0, 1.0], 2) == [(1, 0)]
    assert rank_pairs([1.0, 1.0, 0.0, 1.0], 2) == [(0, 2)]  # the inner two are equal
    assert rank_pairs([1.0, 1.0], 1) == [] == rank_pairs([float("-inf")] * 4, 2)


def options(small, tmp_path, **changes):
    base = dict(ckpt=small / "sft", data=small / "data", out=tmp_path / "rows.jsonl", reward="own_rewards:longer")
    return argv(**base | dict(prompts=6, samples=4, pairs=2, max_new_tokens=20, batch_size=8, device="cpu") | changes)


@pytest.fixture
def longer(own_rewards, tmp_path, monkeypatch):
    """The untrained policies here never end a reply, so that all would be equally bad."""
    with open(tmp_path / "own_rewards.py", "a") as file:
        file.write("def longer(prompts, replies):\n    return [len(r) for r in replies]\n")
    sample = ranked.rollout

    def ended(*arguments):
        batch = sample(*arguments)
        batch.ended[:] = True
        return batch

    monkeypatch.setattr(ranked, "rollout", ended)


def test_the_best_replies_are_chosen_over_the_worst_and_read_as_pairs(small, tmp_path, longer):
    ranked.main(options(small, tmp_path))
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert 6 <= len(rows) <= 12 and all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert list(rows[0]) == ["prompt", "chosen", "rejected"]
    assert len({row["prompt"] for row in rows}) < len(rows)  # some have both pairs
    with pytest.raises(ConfigError, match="rows.jsonl exists: choose another"):
        ranked.main(options(small, tmp_path))
    ranked.main(options(small, tmp_path, overwrite=True))
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == text
    data = dict(out=tmp_path / "pairs", tokenizer=small / "tokenizer", parts="rm", val_share=0.3, max_seq_len=64)
    process(argv(**data, sources=f"ranked:pairs={tmp_path / 'rows.jsonl'}"))
    (chosen, _), (held_out, _) = load_pairs(tmp_path / "pairs" / "rm.pkl", 540)
    assert 4 <= len(chosen) + len(held_out) <= len(rows)


def test_turns_of_a_prompt_stay_turns(small):
    tok = Tokenizer.load(small / "tokenizer")
    said = [dict(role=role, content=text) for role, text in (("user", "春"), ("assistant", "风"), ("user", "月"))]
    assert ranked.question_of(tok, encode_prompt(tok, said)) == dict(messages=said)
    assert ranked.question_of(tok, encode_prompt(tok, said[:1])) == dict(prompt="春")


def test_what_cannot_be_ranked_is_told(small, tmp_path, longer):
    for changes, words in (
        (dict(pairs=3), "pairs=3: at most samples / 2 = 2 is needed"),
        (dict(reward="length", reward_length="0,1000"), "no two replies to a prompt differ in their reward"),
        (dict(ckpt=small / "rm"), "rm.* is a reward model"),
    ):
        with pytest.raises(UserError, match=words):
            ranked.main(options(small, tmp_path, **changes))
    assert not (tmp_path / "rows.jsonl").exists()
