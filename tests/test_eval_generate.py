"""eval_generate.py on models that say what the test wants: prompts, chat, scores, perplexity."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asked import LONG, TEXT, chain_model, make_tokenizer, random_model, run, save, save_data, says, user
from chains import ROOT

import eval_generate
from common import checkpoint
from common.checkpoint import CheckpointError
from common.config import ConfigError, UserError
from common.files import signed
from tokenizer import encode_example, encode_prompt


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer(TEXT)


@pytest.fixture
def env():
    return eval_generate.setup("cpu", "float32")


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
    out, err = run(capsys, f"--ckpt={ckpt}", f"--prompt={LONG}", "--reply=很好看")
    assert math.isfinite(float(out)) and "cut question: what is left is scored" in err
    for options in (["--prompt=写一条"], [], ["--ppl"], [f"--compare={ckpt}"]):
        with pytest.raises(CheckpointError, match=r"rm.*ckpt\.pt \(stage rm\) is a reward model"):
            run(capsys, f"--ckpt={ckpt}", *options)
    with pytest.raises(UserError, match="cannot be scored: answer too long"):
        run(capsys, f"--ckpt={ckpt}", "--prompt=写", f"--reply={LONG}")
    writer = save(tmp_path / "sft", tok, random_model(tok.vocab_size))
    with pytest.raises(CheckpointError, match="is no reward model"):
        run(capsys, f"--ckpt={writer}", "--prompt=写", "--reply=好")


# --ppl


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
