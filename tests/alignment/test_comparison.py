"""Checkpoints beside each other, eval_generate.py --compare: on models that say what the test wants."""

import json
import math
import sys

import pytest
import torch
from asked import GAP, LONG, TEXT, chain_model, make_tokenizer, random_model, run, save, save_data, says, user
from tiny import float64

from alignment import comparison
from alignment.comparison import snownlp_judge
from alignment.rollout import rollout
from common import checkpoint
from common.checkpoint import CheckpointError
from common.config import ConfigError, UserError
from common.files import signed
from common.metrics import distinct_2
from dataset.formats import DataError, save_meta
from tokenizer import encode_prompt

PROMPTS = [("写一条", False), ("写|一条\n", True), ("写一条评价", True), ("酒店", True), ("书", True), ("这本书", True)]
EXAMPLES = [
    ("write_asked", "写好评", "很好看", 1, True),
    ("write_asked", "写好评。", "很干净", 1, True),
    ("write_asked", "写差评", "很好看", 0, True),
    ("write_asked", "写差评", "差评", 0, False),
    ("polarity", "很好看", "好评", 1, True),
    ("polarity", "房间", "差评", 0, True),
    ("polarity", "服务", "差评", 0, True),
    ("polarity", "酒店", "差评", 0, True),
    ("polarity", LONG, "差评", 0, True),  # longer than the context
    ("polarity", "书", "差评", 0, False),
    ("write", "写", "很好看", -1, True),
]

ESCAPED = str.maketrans({"|": r"\|", "\n": r"\n"})  # in a table


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer(TEXT)


def compare(capsys, paths, data, *options):
    out, _ = run(capsys, f"--compare={','.join(map(str, paths))}", f"--data={data}", *options)
    markdown, _, figures = out.rstrip("\n").rpartition("\n\n")
    return markdown, json.loads(figures)


def test_comparison_by_hand(tmp_path, tok, capsys):
    pytest.importorskip("snownlp")
    data = save_data(tmp_path / "data", tok, {}, PROMPTS, EXAMPLES)
    a, b = tok.encode("酒店")[0], tok.encode("书")[0]
    endless = chain_model(tok.vocab_size, [tok.bos_id, a, b, a])
    models = dict(good=says(tok, "很好看"), bad=says(tok, "差评"), endless=endless)
    paths = [save(tmp_path / name, tok, model, "sft") for name, model in models.items()]
    report = tmp_path / "compare.md"
    markdown, figures = compare(
        capsys, paths, data, "--max_new_tokens=12", "--batch_size=2", "--compare_samples=2", f"--report={report}"
    )
    assert report.read_bytes() == signed(markdown + "\n\n")
    good, bad, endless = figures["replies"]
    assert figures["prompts"] == 5 and [row["checkpoint"] for row in (good, bad)] == list(map(str, paths[:2]))

    assert (good["positive"], bad["positive"]) == (1.0, 0.0)  # SnowNLP: 0.82 and 0.07
    assert (good["positive_low"], good["positive_high"]) == (pytest.approx(5 / (5 + 1.96**2), rel=1e-4), 1.0)
    assert (good["characters"], bad["characters"]) == (3.0, 2.0)
    assert (good["eos_rate"], bad["eos_rate"], endless["eos_rate"]) == (1.0, 1.0, 0.0)
    # the first wrong token costs GAP; after it the first model finds every token alike, eos too
    assert good["kl"] == 0.0
    assert bad["kl"] == pytest.approx(GAP + len(tok.encode("差评")) * math.log(tok.vocab_size), rel=1e-3)
    # of 10 characters: 很好 好看, 差评
    assert figures["distinct_2_characters"] == 10 and figures["judge"] == "positive"
    assert (good["distinct_2"], bad["distinct_2"]) == (0.2, 0.1)

    good, bad, endless = figures["tasks"]
    assert (good["asked_positive"], good["asked_negative"], good["asked_mean"], good["polarity"]) == (1, 0, 0.5, 0)
    assert (bad["asked_positive"], bad["asked_negative"], bad["asked_mean"], bad["polarity"]) == (0, 1, 0.5, 0.75)
    assert (good["asked_positive_n"], good["asked_negative_n"], good["polarity_n"]) == (2, 1, 4)
    assert (good["eos_rate"], endless["eos_rate"]) == (1.0, 0.0)

    people = dict(asked_positive=1, asked_positive_n=2, asked_negative=0, asked_negative_n=1, asked_mean=0.5)
    assert figures["written_by_people"] == people  # 很好看, 很干净; 很好看
    assert "the judge finds 100.0% of the positive positive, 0.0% of the negative negative: 50.0%." in markdown
    assert f"| {paths[0]} | sft | 100.0% | 56.6% to 100.0% | 0.00 | 3.0 | 0.200 | 100.0% |" in markdown
    assert f"| prompt | {paths[0]} | {paths[1]} | {paths[2]} |" in markdown
    shown = [
        text for text, is_val in PROMPTS if is_val and f"\n| {text.translate(ESCAPED)} | 很好看 | 差评 | " in markdown
    ]
    assert len(shown) == 2  # samples
    assert f"| {paths[1]} | 0.0% of 2 | 100.0% of 1 | 50.0% | 75.0% of 4 | 100.0% |" in markdown


def test_comparison_of_random_base_and_int8_models(tmp_path, tok, capsys):
    import quantize

    data = save_data(tmp_path / "data", tok, {}, PROMPTS)
    base = checkpoint.load(save(tmp_path / "base", tok, random_model(tok.vocab_size), "pretrain"))
    int8 = quantize.quantize_checkpoint(base)
    model, parent = checkpoint.build_model(int8), checkpoint.parent_of(base)
    save(tmp_path / "int8", tok, model, "quantize", quant=int8.quant, parent=parent)
    save(tmp_path / "short", tok, random_model(tok.vocab_size, seed=1, max_seq_len=16))
    paths = [tmp_path / name for name in ("base", "int8", "short")]
    markdown, figures = compare(capsys, paths, data, "--compare_samples=0")
    assert [row["stage"] for row in figures["replies"]] == ["pretrain", "quantize", "sft"]
    base, int8, other = (row["kl"] for row in figures["replies"])
    assert base == 0 and abs(int8) < 1 < other
    assert figures["max_new_tokens"] == 16 - max(len(encode_prompt(tok, user(text))) for text, _ in PROMPTS)
    assert "| prompt |" not in markdown and "tasks" not in figures
    assert compare(capsys, paths, data, "--compare_samples=0")[1] == figures


def test_comparison_with_empty_replies(tmp_path, tok, capsys):
    data = save_data(tmp_path / "data", tok, {}, PROMPTS)
    silent = save(tmp_path / "silent", tok, says(tok, ""))
    _, figures = compare(capsys, [silent], data, "--compare_temperature=0")
    row = figures["replies"][0]
    assert (row["bits_per_char"], row["characters"], row["eos_rate"], row["distinct_2"]) == (None, 0, 1, None)


def test_replies_to_other_than_reviews_are_not_judged_by_their_polarity(tmp_path, tok, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "snownlp", None)
    examples = [example for example in EXAMPLES if example[0] == "write"]
    data = save_data(tmp_path / "data", tok, {}, PROMPTS, examples)
    first = save(tmp_path / "alike", tok, chain_model(tok.vocab_size, [tok.bos_id]))  # finds all tokens alike
    good, bad = (save(tmp_path / name, tok, says(tok, text)) for name, text in (("good", "很好看"), ("bad", "差评")))
    judge = random_model(tok.vocab_size, seed=1, scalar_head=True)
    rm = save(tmp_path / "rm", tok, judge, "rm")
    paths, options = [first, good, bad], ["--max_new_tokens=12", "--compare_samples=0"]
    markdown, figures = compare(capsys, paths, data, *options)
    assert figures["judge"] == "bits_per_char" and "SnowNLP" not in markdown
    assert not [key for row in figures["replies"] for key in row if key.startswith(("positive", "score"))]
    for row, text in zip(figures["replies"][1:], ("很好看", "差评"), strict=True):
        nats = (len(tok.encode(text)) + 1) * math.log(tok.vocab_size)  # eos too
        assert row["bits_per_char"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-4)
        assert f" {row['bits_per_char']:.2f} | {row['kl']:.2f} | {len(text)}.0 | " in markdown
    with pytest.raises(ConfigError, match=r"picture: .*data has no reviews .* give a reward_model"):
        compare(capsys, paths, data, *options, f"--picture={tmp_path / 'a.png'}")

    picture = tmp_path / "a.png"
    markdown, figures = compare(capsys, paths, data, *options, f"--reward_model={rm}", f"--picture={picture}")
    assert figures["judge"] == "score" and f"score by {rm}; " in markdown and picture.exists()
    prompts = [encode_prompt(tok, user(text)) for text, is_val in PROMPTS if is_val]
    for row, text in zip(figures["replies"][1:], ("很好看", "差评"), strict=True):
        rows = [torch.tensor([ids + tok.encode(text) + [tok.eos_id]]) for ids in prompts]
        scores = torch.cat([judge.values(ids)[:, -1] for ids in rows]).detach()
        half = 1.96 * scores.std() / math.sqrt(len(prompts))
        found = row["score"], row["score_low"], row["score_high"]
        wanted = [float(x) for x in (scores.mean(), scores.mean() - half, scores.mean() + half)]
        assert found == pytest.approx(wanted, rel=1e-4)


@float64
def test_best_of_n_is_what_the_reward_model_scores_highest(tmp_path, tok, capsys, monkeypatch):
    data = save_data(tmp_path / "data", tok, {}, PROMPTS)
    policy = save(tmp_path / "sft", tok, random_model(tok.vocab_size))
    judge = random_model(tok.vocab_size, seed=1, scalar_head=True)
    rm = save(tmp_path / "rm", tok, judge, "rm")
    judge = checkpoint.build_model(checkpoint.load(rm)).eval()  # its weights as the file rounds them
    answer, best_of_replies, drawn, best = comparison.answer, comparison.best_of_replies, [], {}

    def record_answer(*arguments):
        drawn.append(answer(*arguments))
        return drawn[-1]

    def record_best(*arguments):
        drawn.clear()
        best.update(best_of_replies(*arguments))
        return best

    monkeypatch.setattr(comparison, "answer", record_answer)
    monkeypatch.setattr(comparison, "best_of_replies", record_best)
    options = ["--max_new_tokens=6", "--batch_size=2", "--compare_samples=0"]
    picture = tmp_path / "out" / "compare.png"
    wishes = ["--best_of=4,2", f"--reward_model={rm}", f"--picture={picture}"]
    markdown, figures = compare(capsys, [policy], data, *options, *wishes)
    assert list(best) == [2, 4] and len(drawn) == 4  # only the larger n is drawn, the smaller is a part of it
    assert len({tuple(texts) for _, texts, _ in drawn}) == 4
    scores = []
    for batches, _, _ in drawn:
        rows = [ids[:length] for batch in batches for ids, length in zip(batch.ids, batch.lengths, strict=True)]
        scores.append([judge.values(ids[None])[0, -1].item() for ids in rows])  # alone, without padding
    for n, (texts, ended, top) in best.items():
        assert top.tolist() == pytest.approx([max(column[:n]) for column in zip(*scores, strict=True)], rel=1e-9)
        for k in range(5):
            i = max(range(n), key=lambda i: scores[i][k])
            assert (texts[k], ended[k]) == (drawn[i][1][k], drawn[i][2][k])
    assert best[2] != best[4]

    first, two, four = figures["replies"]
    assert [row["checkpoint"] for row in figures["replies"]] == [str(policy), "best of 2", "best of 4"]
    assert (two["kl"], four["kl"]) == (pytest.approx(0.193147), pytest.approx(0.636294))  # ln n - (n - 1) / n
    for row, (texts, ended, top) in zip((two, four), best.values(), strict=True):
        assert (row["score"], row["eos_rate"]) == (pytest.approx(top.mean().item(), rel=1e-5), sum(ended) / 5)
        assert row["distinct_2"] == pytest.approx(distinct_2(texts, figures["distinct_2_characters"]), abs=1e-5)
    assert figures["best_of"] == [2, 4] and "the upper bound ln n - (n - 1) / n" in markdown
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")

    assert first["characters"] == sum(map(len, drawn[0][1])) / 5  # best of 1 is what is compared anyway
    (alone,) = compare(capsys, [policy], data, *options, f"--reward_model={rm}")[1]["replies"]
    assert alone | dict(distinct_2=0) == first | dict(distinct_2=0)


def test_a_function_of_ones_own_judges(tmp_path, tok, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_judge.py").write_text(
        "def figures(prompts, replies):\n"
        "    return [dict(size=len(r), odd=bool(len(r) % 2)) for p, r in zip(prompts, replies, strict=True)]\n"
        "def few(prompts, replies):\n    return [dict(size=1)]\n"
        "def words(prompts, replies):\n    return [dict(size='x') for _ in replies]\n"
        "def numbers(prompts, replies):\n    return [1 for _ in replies]\n"
        "def digits(prompts, replies):\n    return [dict(size='1') for _ in replies]\n"
        "def nans(prompts, replies):\n    return [dict(size=float('nan')) for _ in replies]\n"
        "def braces(prompts, replies):\n    return [{'a.b': 1} for _ in replies]\n"
        "def place(prompts, replies):\n    return [{'５': 1} for _ in replies]\n"
        "seen = []\n"
        "def moody(prompts, replies):\n    seen.append(0)\n    return [{f'a{len(seen)}': 1} for _ in replies]\n"
        "def ours(prompts, replies):\n    return [dict(kl=1) for _ in replies]\n"
        "def score(prompts, replies):\n    return [dict(score=len(r)) for r in replies]\n"
        "def uneven(prompts, replies):\n    return [{str(i): i} for i, _ in enumerate(replies)]\n"
    )
    data = save_data(tmp_path / "data", tok, {}, PROMPTS, EXAMPLES)
    three, two = (save(tmp_path / name, tok, says(tok, text)) for name, text in (("a", "很好看"), ("b", "差评")))
    options, judge = ["--max_new_tokens=12", "--compare_samples=0"], "--judge=own_judge:figures"
    picture = tmp_path / "a.png"
    wishes = [judge, "--picture_column=odd", f"--picture={picture}"]
    markdown, figures = compare(capsys, [three, two], data, *options, *wishes)
    first, second = figures["replies"]
    assert (first["size"], first["odd"], second["size"], second["odd"]) == (3, 1, 2, 0)
    assert (first["size_low"], first["size_high"]) == (3, 3)  # all alike
    assert first["odd_low"] == pytest.approx(5 / (5 + 1.96**2), rel=1e-4)  # Wilson's, of 5 of 5
    assert figures["judge"] == "odd" and figures["judged_by"] == "own_judge:figures" and picture.exists()
    assert "judged by own_judge:figures; " in markdown and "tasks" not in figures  # nor by SnowNLP
    assert f"| {three} | sft | 3.000 | 1.000 | 0.566 to 1.000 | " in markdown

    loose = save(tmp_path / "loose", tok, random_model(tok.vocab_size))
    rm = save(tmp_path / "rm", tok, random_model(tok.vocab_size, seed=1, scalar_head=True), "rm")
    wishes = [judge, "--best_of=2,4", f"--reward_model={rm}"]
    _, figures = compare(capsys, [loose], data, *options, *wishes)
    one, two, four = figures["replies"]
    assert one["size"] <= two["size"] <= four["size"] and one["size"] < four["size"]
    assert all(math.isfinite(row["score"]) for row in (one, two, four))
    for name, words in dict(
        few="few, size: returned 1 rewards for 2 replies", words="words, size: must return a list of numbers",
        numbers="numbers must return a list of dicts", uneven="uneven must return the same names", none="no function",
        digits="digits, size: must return a list of numbers: TypeError: '1' is text",
        nans="nans, size: returned nan for reply 0",
        braces="braces: 'a.b' cannot name a figure", ours="ours: 'kl' cannot", place="place: '５' cannot name",
        moody="moody must return the same names every time: ",
    ).items():  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            compare(capsys, [loose, three], data, *options, f"--judge=own_judge:{name}")
    _, figures = compare(capsys, [three], data, *options, "--judge=own_judge:score")
    assert figures["judge"] == "score" and figures["replies"][0]["score"] == 3
    with pytest.raises(ConfigError, match="score: 'score' cannot name a figure"):  # the reward model's has that name
        compare(capsys, [three], data, *options, "--judge=own_judge:score", f"--reward_model={rm}")
    with pytest.raises(ConfigError, match="picture_column=even: the judge gives size, odd"):
        compare(capsys, [loose], data, *options, judge, "--picture_column=even")
    assert "held-out prompts" not in capsys.readouterr().err  # told before they are sampled


def test_best_of_n_needs_a_reward_model_that_reads_the_same_tokens(tmp_path, tok, capsys):
    data = save_data(tmp_path / "data", tok, {}, PROMPTS)
    policy = save(tmp_path / "sft", tok, random_model(tok.vocab_size))
    with pytest.raises(CheckpointError, match=r"sft.*is no reward model"):
        compare(capsys, [policy], data, "--best_of=2", f"--reward_model={policy}")
    other = make_tokenizer("别的话，别的书")
    rm = save(tmp_path / "rm", other, random_model(other.vocab_size, scalar_head=True), "rm")
    with pytest.raises(CheckpointError, match=r"is .* in .*rm.*ckpt\.pt and .* in .*meta\.json"):
        compare(capsys, [policy], data, "--best_of=2", f"--reward_model={rm}")


def test_comparison_refuses_what_cannot_be_compared(tmp_path, tok, capsys):
    data = save_data(tmp_path / "data", tok, {})
    ckpt = save(tmp_path / "sft", tok, says(tok, "很好看"))
    with pytest.raises(DataError, match=r"prompts\.pkl not found"):
        compare(capsys, [ckpt], data)
    small = save(tmp_path / "small", tok, says(tok, "好", max_seq_len=2))
    long = save_data(tmp_path / "long", tok, {}, PROMPTS)
    with pytest.raises(DataError, match="no held-out prompt fits a context of 2 tokens"):
        compare(capsys, [ckpt, small], long)
    meta = json.loads((data / "meta.json").read_text())
    save_meta(data, meta | dict(tokenizer_sha256="another"))
    with pytest.raises(CheckpointError, match="tokenizer_sha256"):
        compare(capsys, [ckpt], data)


def test_judge_never_fails_on_a_text():
    pytest.importorskip("snownlp")
    judge = snownlp_judge()
    assert (judge("这本书很好看"), judge("差评"), judge(""), judge(" \n")) == (1, 0, -1, -1)
    for text in ("\0", "\ufffd", "\ud800", "!!!", "。", "👋" * 50, "很" * 2000):
        assert judge(text) in (-1, 0, 1)


def test_missing_snownlp_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "snownlp", None)
    with pytest.raises(UserError, match="pip install snownlp"):
        snownlp_judge()


def test_rollout_within_a_small_nucleus_is_greedy(tok):
    model, prompts = random_model(tok.vocab_size), [[5, 6, 7], [8]]
    assert rollout(model, prompts, 8, seed=0, top_p=1e-6).replies == rollout(model, prompts, 8, temperature=0).replies
