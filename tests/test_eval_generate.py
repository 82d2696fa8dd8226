"""eval_generate.py on models that say what the test wants: prompts, chat, scores, perplexity, comparisons."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from chains import ROOT
from packing import pack, pack_examples
from tiny import float64

import eval_generate
from alignment import comparison
from alignment.comparison import snownlp_judge
from alignment.rollout import rollout
from common import checkpoint
from common.checkpoint import CheckpointError
from common.config import ConfigError, UserError
from common.files import signed
from common.metrics import distinct_2
from dataset.formats import BinWriter, DataError, save_meta, save_pkl, token_dtype
from model import Llama, ModelConfig
from tokenizer import Tokenizer, encode_example, encode_prompt

TEXT = "这本书很好看，我很喜欢。酒店的房间很干净，服务也不错。差评好评写一条"
LONG = "龘" * 40  # not in the vocabulary: 120 byte tokens
VOCAB, GAP = 320, 20.0  # GAP: how far a chain's next token is above the others, in nats


def user(text):
    return [dict(role="user", content=text)]


def make_tokenizer(text):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_writer=model, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, add_dummy_prefix=False, hard_vocab_limit=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer(TEXT)


@pytest.fixture
def env():
    return eval_generate.setup("cpu", "float32")


def random_model(vocab_size, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=vocab_size, max_seq_len=64)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.2)
    return model


@torch.no_grad()
def chain_model(vocab_size, ids, max_seq_len=64):
    """A model whose token after ids[i] is ids[i + 1], by GAP nats over any other; after the rest all are alike."""
    dim = 2 * -(-vocab_size // 2)
    shape = dict(dim=dim, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=32, tied=False, norm_eps=1e-12)
    model = Llama(ModelConfig(**shape, vocab_size=vocab_size, max_seq_len=max_seq_len)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.zero_()
    model.tok_embeddings.weight.fill_diagonal_(1)  # normalised: sqrt(dim) at the token's own place
    assert len(set(ids[:-1])) == len(ids) - 1
    for now, after in zip(ids, ids[1:], strict=False):
        model.output.weight[after, now] = GAP / math.sqrt(dim)
    return model


def says(tok, text, **changes):
    """A model that answers `text` to every question."""
    return chain_model(tok.vocab_size, [tok.bos_id, *tok.encode(text), tok.eos_id], **changes)


def save(directory, tok, model, stage="sft", **more):
    directory.mkdir(parents=True)
    checkpoint.save(
        directory, stage=stage, step=1, tokens_seen=9, model=model, tokenizer=tok.model_bytes, config={}, **more
    )
    return directory


def run(capsys, *argv):
    """Standard output and error of one run."""
    capsys.readouterr()
    eval_generate.main([*map(str, argv), "--device=cpu"])
    return capsys.readouterr()


# --prompt


def test_only_the_reply_goes_to_standard_output(tmp_path, tok, capsys):
    ckpt = save(tmp_path / "sft", tok, says(tok, "很好看"))
    for path in (ckpt, ckpt / "ckpt.pt"):
        out, err = run(capsys, f"--ckpt={path}", "--prompt=写一条好评")
        assert out == "很好看\n"
        assert "prompt = 写一条好评" in err


@pytest.mark.parametrize("stage, parent", [("pretrain", None), ("sft", None), ("ppo", None), ("dpo", None)])
def test_pretrained_continue_and_others_answer(tmp_path, tok, capsys, stage, parent):
    model = random_model(tok.vocab_size)
    ckpt = save(tmp_path / "run", tok, model, stage)
    ids = [tok.eos_id, *tok.encode("这本书")] if stage == "pretrain" else [*tok.encode("这本书"), tok.bos_id]
    sampling = dict(temperature=0.7, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.2, seed=5)
    expected = tok.decode(model.generate([ids], 20, **sampling).tokens[0]).rstrip("\ufffd")
    options = [f"--{key}={value}" for key, value in sampling.items()]
    out, _ = run(capsys, f"--ckpt={ckpt}", "--prompt=这本书", "--max_new_tokens=20", *options)
    assert out.rstrip("\n") == expected.rstrip("\n")


def test_an_empty_prompt_begins_a_document_and_is_no_question(tmp_path, tok, capsys):
    words = tok.encode("很好看")
    begins = chain_model(tok.vocab_size, [tok.eos_id, *words, tok.bos_id])
    path = save(tmp_path / "pretrain", tok, begins, "pretrain")
    assert run(capsys, f"--ckpt={path}", "--prompt=", f"--max_new_tokens={len(words)}").out == "很好看\n"
    path = save(tmp_path / "sft", tok, begins)
    with pytest.raises(ConfigError, match="--prompt is empty: .*sft.* needs a question"):
        run(capsys, f"--ckpt={path}", "--prompt= ")


def test_quantized_checkpoint_is_asked_like_its_parent(tmp_path, tok, env):
    for stage in ("pretrain", "sft"):
        parent = dict(path="x", sha256="y", stage=stage)
        save(tmp_path / stage, tok, random_model(tok.vocab_size), "quantize", parent=parent)
        loaded = eval_generate.load(tmp_path / stage, env)
        assert loaded.continues == (stage == "pretrain")


def test_an_int8_checkpoint_answers(tmp_path, tok, capsys):
    import quantize

    ckpt = checkpoint.load(save(tmp_path / "sft", tok, random_model(tok.vocab_size)))
    int8 = quantize.quantize_checkpoint(ckpt)
    model = checkpoint.build_model(int8)
    path = save(tmp_path / "int8", tok, model, "quantize", quant=int8.quant, parent=checkpoint.parent_of(ckpt))
    expected = model.generate([encode_prompt(tok, user("这本书"))], 9, temperature=0).tokens[0]
    out, _ = run(capsys, f"--ckpt={path}", "--prompt=这本书", "--max_new_tokens=9", "--temperature=0")
    assert out == tok.decode(expected).rstrip("\ufffd") + "\n"


def test_system_text_stands_before_the_question(tmp_path, tok, capsys):
    model = random_model(tok.vocab_size)
    ckpt = save(tmp_path / "sft", tok, model)
    ids = encode_prompt(tok, [dict(role="system", content="好评"), *user("这本书")])
    expected = tok.decode(model.generate([ids], 9, temperature=0).tokens[0]).rstrip("\ufffd")
    options = ["--prompt=这本书", "--system=好评", "--temperature=0", "--max_new_tokens=9"]
    assert run(capsys, f"--ckpt={ckpt}", *options).out == expected + "\n"
    base = save(tmp_path / "pretrain", tok, model, "pretrain")
    with pytest.raises(ConfigError, match="--system.*only continues text"):
        run(capsys, f"--ckpt={base}", *options)


@pytest.mark.parametrize("new_tokens, room", [(10, 54), (1000, 32)])
def test_long_prompt_is_cut_on_the_left_and_says_so(tmp_path, tok, capsys, env, new_tokens, room):
    for stage in ("pretrain", "sft"):
        loaded = eval_generate.load(save(tmp_path / stage, tok, random_model(tok.vocab_size), stage), env)
        ids = eval_generate.prompt_ids(loaded, user(LONG), new_tokens)
        whole = eval_generate.prompt_ids(loaded, user("差评"), new_tokens)
        assert capsys.readouterr().err.count("do not fit") == 1
        tail = tok.encode(LONG)[-room + 1 :]
        if stage == "pretrain":
            assert len(ids) == room and ids[-len(tail) :] == tail
        else:  # of a question whole characters are left
            assert ids == [*tok.encode(LONG[: (room - 1) // 3]), tok.bos_id]
        assert whole == ([2, *tok.encode("差评")] if stage == "pretrain" else [*tok.encode("差评"), 1])


def test_a_context_of_one_token_has_no_room(tmp_path, tok, capsys):
    ckpt = save(tmp_path / "base", tok, random_model(tok.vocab_size, max_seq_len=1), "pretrain")
    with pytest.raises(CheckpointError, match="ckpt.pt: max_seq_len=1: no room for a prompt and a reply"):
        run(capsys, f"--ckpt={ckpt}", "--prompt=好")


def test_no_half_character_is_written(tmp_path, tok, capsys):
    ids = tok.encode("龘")  # not in the vocabulary: three bytes
    assert len(ids) == 3
    ckpt = save(tmp_path / "sft", tok, says(tok, "好龘"))
    for n, expected in ((9, "好龘"), (4, "好龘"), (3, "好"), (2, "好"), (1, "好")):
        assert run(capsys, f"--ckpt={ckpt}", "--prompt=写", f"--max_new_tokens={n}").out == expected + "\n"


# chat


def chat(capsys, monkeypatch, ckpt, typed, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return run(capsys, f"--ckpt={ckpt}", "--max_new_tokens=6", "--temperature=0", *options)


def test_chat_remembers_until_clear_and_ends_with_exit(tmp_path, tok, capsys, monkeypatch):
    model = random_model(tok.vocab_size)
    ckpt = save(tmp_path / "sft", tok, model)

    def reply(messages):
        ids = encode_prompt(tok, messages)
        return tok.decode(model.generate([ids], 6, temperature=0).tokens[0]).rstrip("\ufffd")

    one = reply(user("这本书"))
    two = reply([*user("这本书"), dict(role="assistant", content=one), *user("差评")])
    alone = reply(user("差评"))
    assert two != alone
    out, err = chat(capsys, monkeypatch, ckpt, "这本书\n\n  差评 \n/clear\n差评\n/exit\n好评\n")
    assert out == f"{one}\n{two}\n{alone}\n"
    assert all(word in err for word in ("/clear", "/exit", "Ctrl-D", "Ctrl-C", "stage sft"))
    assert chat(capsys, monkeypatch, ckpt, "差评").out == alone + "\n"  # ends with the input, as Ctrl-D does


def test_chat_drops_what_the_context_cannot_hold(tmp_path, tok, capsys, monkeypatch):
    ckpt = save(tmp_path / "sft", tok, says(tok, "很好看"))
    out, err = chat(capsys, monkeypatch, ckpt, "龘龘龘龘龘龘\n" * 6)
    assert out == "很好看\n" * 6 and "do not fit" in err


def test_chat_with_a_pretrained_model_continues_each_line(tmp_path, tok, capsys, monkeypatch):
    ckpt = save(tmp_path / "run", tok, chain_model(tok.vocab_size, [*tok.encode("这本书很好看"), 2]), "pretrain")
    start = tok.decode(tok.encode("这本书很好看")[:1])
    rest = "这本书很好看".removeprefix(start)
    out, err = chat(capsys, monkeypatch, ckpt, f"{start}\n{start}\n")
    assert out == f"{rest}\n{rest}\n" and "continues each line" in err


def test_ctrl_c_stops_a_reply_and_forgets_its_question(tmp_path, tok, capsys, env, monkeypatch):
    config = dict(max_new_tokens=6, temperature=0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0)
    loaded = eval_generate.load(save(tmp_path / "sft", tok, random_model(tok.vocab_size)), env)
    monkeypatch.setattr(sys, "stdin", io.StringIO("差评\n"))
    eval_generate.chat(loaded, [], config)
    alone = capsys.readouterr().out

    class Stdout(io.StringIO):
        """Ctrl-C at the first character of the first reply."""

        pressed = False

        def write(self, text):
            if text and not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            return super().write(text)

    out = Stdout()
    monkeypatch.setattr(sys, "stdin", io.StringIO("这本书\n差评\n"))
    monkeypatch.setattr(sys, "stdout", out)
    eval_generate.chat(loaded, [], config)
    assert out.getvalue() == alone
    assert "forgotten" in capsys.readouterr().err


def test_the_script_with_piped_input(tmp_path, tok):
    ckpt = save(tmp_path / "sft", tok, says(tok, "很好看"))
    command = [sys.executable, str(ROOT / "eval_generate.py"), f"--ckpt={ckpt}", "--device=cpu"]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")
    piped = dict(capture_output=True, cwd=tmp_path, env=environment)
    done = subprocess.run(command, input="写一条\n".encode() + b"\xe5\n/exit\n", **piped)
    assert (done.returncode, done.stdout.decode()) == (0, "很好看\n很好看\n")
    missing = subprocess.run([*command, f"--ckpt={tmp_path / 'none'}"], input=b"", **piped)
    assert (missing.returncode, missing.stdout) == (2, b"")
    assert missing.stderr.decode().splitlines()[-1].startswith("error: ckpt: no checkpoint at")


# reward models


def test_reward_model_scores_and_does_not_write(tmp_path, tok, capsys):
    model = random_model(tok.vocab_size, scalar_head=True)
    ckpt = save(tmp_path / "rm", tok, model, "rm")
    example, _ = encode_example(tok, [*user("写一条"), dict(role="assistant", content="很好看")])
    expected = model.values(torch.tensor([example.ids]))[0, -1].item()
    out, _ = run(capsys, f"--ckpt={ckpt}", "--prompt=写一条", "--reply=很好看")
    assert float(out) == pytest.approx(expected, rel=1e-5)
    for options in (["--prompt=写一条"], [], ["--ppl"], [f"--compare={ckpt}"]):
        with pytest.raises(CheckpointError, match=r"rm.*ckpt\.pt \(stage rm\) is a reward model"):
            run(capsys, f"--ckpt={ckpt}", *options)
    with pytest.raises(UserError, match="cannot be scored: answer too long"):
        run(capsys, f"--ckpt={ckpt}", "--prompt=写", f"--reply={LONG}")
    writer = save(tmp_path / "sft", tok, random_model(tok.vocab_size))
    with pytest.raises(CheckpointError, match="is no reward model"):
        run(capsys, f"--ckpt={writer}", "--prompt=写", "--reply=好")


# --ppl


def save_data(directory, tok, sources, prompts=(), examples=()):
    """A data directory: validation text {source: text}, prompts (text, is_val), examples (task, question, answer,
    label, is_val)."""
    directory.mkdir()
    meta = dict(format_version=2, vocab_size=tok.vocab_size, tokenizer_sha256=tok.sha256, files={}, sources={})
    meta |= dict(dtype=token_dtype(tok.vocab_size).name)
    for name, text in sources.items():
        with BinWriter(directory / f"val.{name}.bin", tok.vocab_size) as file:
            file.write([*tok.encode(text), tok.eos_id])
        counts = dict(documents=1, tokens=file.tokens, characters=len(text))
        meta["sources"][name] = dict(train=counts, val=counts)
        meta["files"][file.path.name] = dict(part="pretrain", tokens=file.tokens)
    save_meta(directory, meta)
    if prompts:
        ids = [encode_prompt(tok, user(text)) for text, _ in prompts]
        tokens, offsets = pack(ids, token_dtype(tok.vocab_size))
        is_val = np.array([is_val for _, is_val in prompts])
        save_pkl(directory / "prompts.pkl", dict(tokens=tokens, offsets=offsets, is_val=is_val))
    if examples:
        tasks, questions, answers, labels, is_val = zip(*examples, strict=True)
        made = [
            encode_example(tok, [*user(question), dict(role="assistant", content=reply)])[0]
            for question, reply in zip(questions, answers, strict=True)
        ]
        names = ["write_asked", "polarity", "write"]
        arrays = pack_examples(made, tok.vocab_size) | dict(task_names=names, is_val=np.array(is_val))
        task = np.array([names.index(name) for name in tasks], dtype=np.uint8)
        save_pkl(directory / "sft.pkl", arrays | dict(task=task, label=np.array(labels, dtype=np.int8)))
    return directory


def test_perplexity_per_source(tmp_path, tok, capsys):
    # after any token all are alike: ln V nats each
    ckpt = save(tmp_path / "pretrain", tok, chain_model(tok.vocab_size, [tok.bos_id]), "pretrain")
    texts = {"book_reviews": "这本书很好看，我很喜欢。", "hotels": "酒店的房间很干净"}
    data = save_data(tmp_path / "data", tok, texts)
    report = tmp_path / "out" / "ppl.md"
    for _ in range(2):  # what it wrote itself it replaces
        out, err = run(capsys, f"--ckpt={ckpt}", "--ppl", f"--data={data}", f"--report={report}")
    markdown, _, figures = out.rstrip("\n").rpartition("\n\n")
    assert report.read_bytes() == signed(markdown + "\n\n") and "ppl = true" in err
    rows = json.loads(figures)["perplexity"]
    assert [row["source"] for row in rows] == ["book_reviews", "hotels", "all"]
    for row in rows[:2]:
        tokens = len(tok.encode(texts[row["source"]]))  # as many as are predicted: not the first, but eos
        bits = math.log2(tok.vocab_size) * (tokens + 1) / len(texts[row["source"]])
        assert row["tokens"] == tokens
        assert row["perplexity"] == pytest.approx(tok.vocab_size, rel=1e-4)
        assert row["bits_per_char"] == pytest.approx(bits, rel=1e-4)
    assert rows[2]["tokens"] == rows[0]["tokens"] + rows[1]["tokens"]
    lines = markdown.splitlines()
    assert lines[:2] == ["| source | tokens | perplexity | bits per character |", "|---|---|---|---|"]
    assert lines[2].startswith(f"| book_reviews | {rows[0]['tokens']} | {tok.vocab_size:.2f} | ") and len(lines) == 5


# --compare

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
    assert "\n| 写\\|一条\\n | 很好看 | 差评 | " in markdown and "\n| 写一条评价 | 很好看 | 差评 | " in markdown
    assert "\n| 酒店 | 很好看" not in markdown  # only two samples
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
        few="few, size: returned 1 rewards for 5 replies", words="words, size: must return a list of numbers",
        numbers="numbers must return a list of dicts", uneven="uneven must return the same names", none="no function",
        digits="digits, size: must return a list of numbers: TypeError: '1' is text",
        nans="nans, size: returned nan for reply 0",
        braces="braces: 'a.b' cannot name a figure", ours="ours: 'kl' cannot",
    ).items():  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            compare(capsys, [loose], data, *options, f"--judge=own_judge:{name}")
    _, figures = compare(capsys, [three], data, *options, "--judge=own_judge:score")
    assert figures["judge"] == "score" and figures["replies"][0]["score"] == 3
    with pytest.raises(ConfigError, match="score: 'score' cannot name a figure"):  # the reward model's has that name
        compare(capsys, [three], data, *options, "--judge=own_judge:score", f"--reward_model={rm}")
    with pytest.raises(ConfigError, match="picture_column=even: the judge gives size, odd"):
        compare(capsys, [loose], data, *options, judge, "--picture_column=even")


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


# bad values


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt=a", "--ppl"], "--prompt and --ppl exclude each other"),
        (["--ppl", "--compare=a,b"], "--ppl and --compare exclude each other"),
        (["--reply=a"], "--reply needs the --prompt"),
        (["--temperature=-1"], "temperature=-1.0: 0 or at least 0.001"),
        (["--top_p=0"], "top_p=0.0"),
        (["--compare_top_p=1.5"], "compare_top_p=1.5: more than 0 and at most 1 is needed"),
        (["--repetition_penalty=0"], "repetition_penalty=0.0"),
        (["--prompt=a", "--report=a.md"], "--report needs --compare, --ppl or --benchmark, whose tables"),
        (["--compare=a", "--best_of=2"], "--best_of needs the --reward_model or the --judge that picks"),
        (["--compare=a", "--best_of=1,2", "--reward_model=b"], "best_of=1,2: whole numbers from 2 to 1000"),
        (["--compare=a", "--best_of=999999999999", "--reward_model=b"], "best_of=999999999999: whole numbers"),
        (["--compare=a", "--best_of=٢", "--reward_model=b"], "best_of=٢: whole numbers from 2 to 1000"),
        (["--compare=a", "--best_of=few", "--reward_model=b"], "best_of=few: whole numbers"),
        (["--compare=a", "--best_of=2", "--reward_model=b", "--compare_temperature=0"], "above 0: greedy"),
        (["--best_of=2", "--reward_model=b"], "--best_of needs --compare"),
        (["--prompt=a", "--picture=a.png"], "--picture needs --compare"),
        (["--max_new_tokens=0"], "max_new_tokens=0: at least 1"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        eval_generate.main(options)


@pytest.mark.parametrize(
    "option, content, message",
    [
        ("report=ckpt.pt", "mine", "ckpt.pt: the name of a .md file is needed"),
        ("report=train.a.bin", None, "train.a.bin: the name of a .md file is needed"),
        ("report=README.md", "# mine", "README.md was not written by such a command"),
        ("picture=a.jpg", None, "a.jpg: the name of a .png file is needed"),
        ("picture=holiday.png", "mine", "holiday.png was not written by such a command"),
        ("picture=.", None, "the name of a .png file is needed"),
    ],
)
def test_a_file_that_no_such_command_wrote_is_not_replaced(tmp_path, monkeypatch, option, content, message):
    monkeypatch.chdir(tmp_path)
    name = option.partition("=")[2]
    if content:
        Path(name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        eval_generate.main(["--compare=a", f"--{option}"])
    assert not content or Path(name).read_text() == content
