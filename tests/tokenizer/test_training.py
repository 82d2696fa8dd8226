"""tokenizer/train.py: vocabularies, the lines they are drawn from, and what it refuses."""

import io
import json
import random
import shutil
from collections import Counter
from functools import partial
from itertools import count

import pytest
import sentencepiece
from awkward import LINES, TRICKY, random_texts, stream
from saving import killed_before

from common.config import UserError, ending
from configs.tokenizer import config as train_defaults
from tokenizer import Tokenizer, TokenizerError
from tokenizer.train import Corpus, characters_per_token, cut_line, main, pieces_of, train_bpe


def train(*options):
    main([f"--{key}={value}" for key, value in options])


def test_train_writes_a_tokenizer_that_loads(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "tokenizer"
    options = [("input", corpus), ("out", out), ("vocab_size", 400)]
    train(*options)
    tok = Tokenizer.load(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "tokenizer.model", "tokenizer.vocab"]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 400 == tok.vocab_size
    vocab = (out / "tokenizer.vocab").read_text(encoding="utf-8").split("\n")
    assert [line.rsplit("\t", 1)[0] for line in vocab[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert len(vocab) == 400 + 1
    printed = capsys.readouterr().out
    assert f"100 lines, {sum(map(len, LINES)) * 20:,} characters; lines cut: none; lines skipped: none" in printed
    assert f"{characters_per_token(tok, LINES):.3f} characters per token" in printed

    with pytest.raises(TokenizerError, match="--overwrite"):
        train(*options)
    train(*options, ("overwrite", "true"))  # the same lines give the same bytes
    assert Tokenizer.load(out).model_bytes == tok.model_bytes


def test_a_killed_run_is_started_again_by_the_same_command(corpus, tmp_path):
    for event in count():
        out = tmp_path / str(event)
        again = partial(train, ("input", corpus), ("vocab_size", 400), ("out", out))
        assert killed_before(event, again, named=str(out))
        if (out / "tokenizer.model").exists():  # the last
            break
        again()
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "tokenizer.model", "tokenizer.vocab"]
    assert event > 5


def test_killed_while_it_replaces_another_it_leaves_one_or_none(corpus, tmp_path):
    old = tmp_path / "old"
    train(("input", corpus), ("vocab_size", 400), ("out", old))
    for event in count():
        out = shutil.copytree(old, tmp_path / str(event))
        again = partial(train, ("input", corpus), ("vocab_size", 420), ("out", out), ("overwrite", "true"))
        assert killed_before(event, again, named=str(out))
        if (out / "tokenizer.model").exists():  # with the config that it was trained by
            size = Tokenizer.load(out).vocab_size
            assert json.loads((out / "config.json").read_text())["vocab_size"] == size
            if size == 420:
                break
    assert event > 5


def test_drawing_lines_repeats(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"{i} {i * i}" for i in range(2000)))
    config = train_defaults | dict(vocab_size=400, split_digits=False)
    models = [train_bpe(Corpus([str(path)], 1000), config | dict(input_sentence_size=n)) for n in (101, 101, 0)]
    assert models[0] == models[1] != models[2]


def test_characters_per_token_by_hand(tok):
    assert characters_per_token(tok, ["龘龘", "龘"]) == pytest.approx(3 / 9)  # three bytes each


def test_split_digits(corpus):
    for split, want in ((True, 3), (False, 1)):
        config = train_defaults | dict(vocab_size=420, character_coverage=1.0, split_digits=split)
        assert len(Tokenizer(train_bpe(Corpus([str(corpus)], 1000), config)).encode("123")) == want


def test_skipped_and_cut_lines_are_counted(tmp_path, capsys):
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\r\n\n\xff\xfebad\n" + b"x" * 21 + b"\nnul\0 left\0\n\0\n  kept spaces  ")
    lines = Corpus([str(path)], max_line_bytes=20)
    assert list(lines) == ["good", "x" * 20, "x", "nul", " left", "  kept spaces  "]
    assert lines.skipped == Counter({"empty": 2, "not UTF-8": 1})
    assert lines.cut == Counter({"at U+0000 or U+2585": 2, "longer than 20 bytes": 1})
    assert lines.lines == 6 and lines.characters == 48
    assert capsys.readouterr().out.splitlines() == [f"{path}:3: skipped, not UTF-8 (byte 0xFF at 1)"]


def test_long_lines_are_cut_after_sentences_and_nothing_is_lost():
    assert cut_line("今天。明天，后天", 24) == ["今天。明天，后天"]
    assert cut_line("今天。明天，后天", 23) == ["今天。", "明天，后天"]
    assert cut_line("今天、明天，后天", 20) == ["今天、明天，", "后天"]
    assert cut_line("today tomorrow", 9) == ["today ", "tomorrow"]
    assert cut_line("今天明天", 8) == ["今天", "明天"]  # 6 bytes, as a character is not cut
    rng = random.Random(0)
    for text in random_texts(1000, seed=4):
        pieces = cut_line(text := text * 3 + "。" + text, size := rng.randrange(4, 40))
        assert "".join(pieces) == text and all(len(piece.encode()) <= size for piece in pieces)


def test_every_line_shapes_the_vocabulary(tmp_path, capsys):
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    path.write_text("".join(LINES) * 800 + "\n" + "前\0后\u2585中\n" * 50, encoding="utf-8")
    train(("input", path), ("out", out), ("vocab_size", 420), ("character_coverage", 1.0))
    tok = Tokenizer.load(out)
    assert all(len(tok.encode(character)) == 1 for character in set("".join(LINES)) | set("前后中"))
    printed = capsys.readouterr().out
    assert "lines cut: 50 at U+0000 or U+2585, 1 longer than 16384 bytes; lines skipped: none" in printed


def test_the_space_and_ascii_are_pieces_whatever_the_corpus_holds(tmp_path):
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    path.write_text("酒店很好，房间干净\n" * 3000 + "a b\n", encoding="utf-8")
    train(("input", path), ("out", out), ("vocab_size", 370))
    tok = Tokenizer.load(out)
    assert all(len(tok.encode(chr(character))) == 1 for character in range(0x20, 0x7F))
    for text in ["空格 和▁号", "  两个空格", "a b", "▁ ▁", *TRICKY, *random_texts(1000, seed=5)]:
        assert tok.decode(tok.encode(text)) == text == stream(tok, tok.encode(text))


def test_a_foreign_vocabulary_without_a_space_gives_text_back():
    options = dict(vocab_size=275, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    tok = foreign(["酒店很好，房间干净"] * 20, **options, add_dummy_prefix=False, remove_extra_whitespaces=False)
    assert not tok.has_space and tok.changes == []
    space, mark = tok.encode(" "), tok.encode("▁")
    assert len(space) == 1 and len(mark) == 3
    assert tok.encode("好 房▁") == tok.encode("好") + space + tok.encode("房") + mark
    texts = ["空格 和▁号", "  两个空格", "a b", "▁ ▁", *TRICKY, *random_texts(1000, seed=6)]
    for text, ids in zip(texts, tok.encode_batch(texts), strict=True):
        assert ids == tok.encode(text) and tok.decode(ids) == text == stream(tok, ids)


def test_a_vocabulary_says_what_it_does_to_text(tok, glm):
    assert tok.has_space and tok.changes == []
    assert glm.has_space and glm.changes == []  # as Llama 2's: a dummy prefix comes off again
    plain = foreign(LINES * 20, vocab_size=60, model_type="unigram", hard_vocab_limit=False)
    assert 0 in plain.encode("龘")
    assert plain.changes == ["nmt_nfkc", "spaces in a row become one, those at the ends go"]


def foreign(lines, **options):
    """A tokenizer trained by SentencePiece itself."""
    model, ids = io.BytesIO(), dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **ids, **options)
    return Tokenizer(model.getvalue())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "corpus.txt: no such file"),
        (b"", "corpus.txt: the file is empty"),
        (b"\n\n", "no usable line in .*corpus.txt$"),
        ("中文\n".encode("gbk"), "no usable line in .*corpus.txt; convert it: iconv -f GB18030 -t UTF-8"),
        (b"abc\n", "vocab_size 5000 on 1 lines: .*Vocabulary size too high"),
        (
            "\n".join(map(chr, range(0x4E00, 0x7E00))).encode(),
            "vocab_size 5000: 126.. are needed, for 3",
        ),
    ],
)
def test_unusable_corpora(tmp_path, content, message):
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message), ending:
        train(("input", path), ("out", out / "deeper"), ("vocab_size", 5000))
    assert not out.exists()


@pytest.mark.parametrize("limit", [1, 4, 5, 7, 1000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_long_line_is_read_in_pieces_of_whole_characters(limit, end):
    text = "aé中𠀀文" * 5 + f"\n第二行\n\n𠀀{end}"
    pieces = [(number, raw.decode()) for number, raw in pieces_of(io.BytesIO(text.encode()), limit) if raw]
    assert "".join(piece for _, piece in pieces) == text
    lines = text.splitlines(keepends=True)
    assert ["".join(p for n, p in pieces if n == number) for number in range(1, len(lines) + 1)] == lines
    assert max(len(piece.encode()) for _, piece in pieces) <= limit + 3
    stray = [raw for _, raw in pieces_of(io.BytesIO(b"\xe4\xe4\xb8" * 3), limit)]
    assert b"".join(stray) == b"\xe4\xe4\xb8" * 3


def test_what_is_no_text_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    for name, message in (
        ("rows.jsonl", "rows.jsonl: rows, not text: data_process.py"),
        ("", ": a folder, not a text"),
    ):
        with pytest.raises(TokenizerError, match=message):
            train(("input", tmp_path / name), ("out", tmp_path / "out"))


@pytest.mark.parametrize(
    "name, content", [("config.json", '{"model": {}}'), ("tokenizer.vocab", ""), ("config.json", "mine")]
)
def test_a_folder_of_another_stage_is_left_alone(tmp_path, name, content):
    (tmp_path / "corpus.txt").write_text("abc\n")
    (tmp_path / name).write_text(content)
    message = "config.json.* not" if name == "config.json" else f"{name} exists; give --overwrite to replace it, or"
    for overwrite in ("false", "true") if name == "config.json" else ("false",):
        with pytest.raises((TokenizerError, UserError), match=message):
            train(("input", tmp_path / "corpus.txt"), ("out", tmp_path), ("overwrite", overwrite))
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 2


def test_a_run_with_a_checkpoint_is_no_place_for_a_tokenizer(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(TokenizerError, match="ckpt.pt: a run of another stage is there: choose another --out"):
        train(("input", tmp_path / "ckpt.pt"), ("out", tmp_path), ("overwrite", "true"))


def test_the_input_and_a_file_in_place_of_the_folder_are_not_replaced(tmp_path):
    text = "\n".join(LINES * 20)
    for name in ("tokenizer.vocab", "tokenizer.model", "config.json"):
        (tmp_path / name).write_text(text if name != "config.json" else '{"character_coverage": 1}')
    (tmp_path / "link.txt").symlink_to("tokenizer.vocab")
    (tmp_path / "broken").symlink_to("nowhere")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name in before:
        with pytest.raises(TokenizerError, match=f"input .*{name}: training would replace it: choose another --out"):
            train(("input", tmp_path / name), ("out", f"{tmp_path}/../{tmp_path.name}"), ("overwrite", "true"))
    for name in (*before, "broken"):
        with pytest.raises(TokenizerError, match=f"{name}: a file, not a folder: choose another --out"):
            train(("input", tmp_path / "link.txt"), ("out", tmp_path / name), ("overwrite", "true"))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_no_input_named():
    with pytest.raises(TokenizerError, match="--input"):
        train(("input", ""))


def test_demo_config_is_the_default_with_its_own_names():
    from configs.demo.tokenizer import config

    assert config.keys() == train_defaults.keys() and config["vocab_size"] == 6144
