"""corpora/dedup.py: signatures beside exact similarity, groups beside slow ones, planted copies and questions."""

import json
import os
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from chains import ROOT

from corpora.clean import content_key
from corpora.dedup import BANDS, ROWS, SHINGLE, THRESHOLD, Decontaminator, _candidates, near_duplicates, signature
from dataset.formats import DataError

WIDTH = BANDS * ROWS
TEXT = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空，青山依旧在，几度夕阳红。"


def edited(text, share, rng, alphabet):
    """A copy with a share of its characters substituted, inserted or deleted at random places."""
    characters = list(text)
    for _ in range(round(share * len(characters))):
        place, how = rng.randrange(len(characters)), rng.randrange(3)
        characters[place : place + (how != 1)] = [rng.choice(alphabet)] if how != 2 else []
    return "".join(characters)


def jaccard(a, b):
    """The exact share of common shingles."""
    sets = [{key[i : i + SHINGLE] for i in range(len(key) - SHINGLE + 1)} for key in map(content_key, (a, b))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def random_signatures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 16, (n, WIDTH), dtype=np.uint16)


# signature


def test_signature_never_changes():
    # If this fails after an upgrade of rensa, signatures on disk are void: pin the old version.
    found = signature(TEXT)
    assert found.shape == (WIDTH,) and found.dtype == np.uint16
    assert found[:6].tolist() == [29362, 390, 37302, 3023, 35594, 23926]
    assert int(found.astype(np.int64).sum()) == 5962009


def test_signature_is_the_same_in_another_process():
    code = f"from corpora.dedup import signature; print(signature({TEXT!r}).tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2", "PYTHONUTF8": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(ran.stdout) == signature(TEXT).tolist()


def test_signature_sees_letters_and_digits_only():
    assert np.array_equal(signature("青山依旧在，几度夕阳红 ABC"), signature("青山 依旧在几度夕阳红abc。"))
    assert not np.array_equal(signature("青山依旧在"), signature("青山依旧红"))


def test_signature_of_texts_shorter_than_a_shingle():
    short = [signature(text) for text in ("", "好", "好的", "好的呢", "的好")]
    assert np.array_equal(short[0], signature("。")) and np.array_equal(short[1], signature("好！"))
    agreement = [(short[i] == short[j]).mean() for i in range(5) for j in range(i)]
    assert max(agreement) < 0.05


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3])
def test_agreement_is_the_jaccard_similarity(share):
    rng = random.Random(1)
    alphabet = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]
    errors = []
    for _ in range(40):
        text = "".join(rng.choices(alphabet, k=400))
        copy = edited(text, share, rng, alphabet)
        errors.append((signature(text) == signature(copy)).mean() - jaccard(text, copy))
    # One estimate from 192 independent values has a standard error of at most 0.036, the mean of 40 of 0.006.
    assert abs(np.mean(errors)) < 0.02 and np.abs(errors).max() < 0.15
    assert share or not np.any(errors)


# near_duplicates


def slow_near_duplicates(signatures, threshold):
    """The definition: all pairs, then the groups by spreading the lowest number."""
    n = len(signatures)
    equal = signatures[:, None] == signatures[None]  # (N, N, WIDTH)
    banded = equal.reshape(n, n, BANDS, ROWS).all(-1).any(-1)
    linked = banded & (equal.mean(-1) >= threshold)
    group = np.arange(n)
    while True:
        lower = np.where(linked, group[None], n).min(1)
        if np.array_equal(lower, group):
            return group != np.arange(n)
        group = lower


def noisy_copies(n_originals, n_copies, seed=3):
    """Shuffled signatures: originals, and copies of them that keep each value with probability 0.3 to 0.9."""
    rng = np.random.default_rng(seed)
    originals = random_signatures(n_originals, seed)
    source = rng.integers(0, n_originals, n_copies)
    kept = rng.random((n_copies, WIDTH)) < rng.uniform(0.3, 0.9, (n_copies, 1))
    copies = np.where(kept, originals[source], random_signatures(n_copies, seed + 1))
    return rng.permutation(np.concatenate([originals, copies]))


@pytest.mark.parametrize("threshold", [0.4, THRESHOLD, 0.7])
def test_agrees_with_the_definition(threshold):
    signatures = noisy_copies(120, 100)
    wanted = slow_near_duplicates(signatures, threshold)
    assert 20 < wanted.sum() < 100
    assert np.array_equal(near_duplicates(signatures, threshold=threshold), wanted)


def test_memory_and_memmap_change_nothing(tmp_path):
    signatures = noisy_copies(300, 200)
    signatures.tofile(tmp_path / "signatures")
    on_disk = np.memmap(tmp_path / "signatures", np.uint16, "r", shape=signatures.shape)
    wanted = near_duplicates(signatures)
    assert wanted.any()
    for memory in (0, 8 * 500 * 7, 1 << 30):  # one band a pass, three, all
        assert np.array_equal(near_duplicates(on_disk, memory=memory), wanted)


def test_shared_band_alone_is_not_enough():
    signatures = random_signatures(2)
    enough = int(np.ceil(THRESHOLD * WIDTH))
    signatures[1, : enough - 1] = signatures[0, : enough - 1]
    assert near_duplicates(signatures).tolist() == [False, False]
    signatures[1, enough - 1] = signatures[0, enough - 1]
    assert near_duplicates(signatures).tolist() == [False, True]


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_every_band_is_looked_at(memory):
    signatures = random_signatures(2 * BANDS)
    for band in range(BANDS):
        values = slice(band * ROWS, (band + 1) * ROWS)
        signatures[BANDS + band, values] = signatures[band, values]
    dropped = near_duplicates(signatures, threshold=ROWS / WIDTH, memory=memory)
    assert dropped.tolist() == [False] * BANDS + [True] * BANDS


def test_preferred_documents_stay():
    signatures = random_signatures(4)[[0, 1, 0, 2, 0, 3, 1, 0]]
    assert near_duplicates(signatures).tolist() == [False, False, True, False, True, False, True, True]
    prefer = np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
    dropped = near_duplicates(signatures, prefer)
    assert dropped.tolist() == [True, True, True, False, False, False, False, True]  # one stays of each four, even so


def test_chain_is_one_group():
    # Neighbours agree in one half of their values, others in nothing.
    n, rng = 600, np.random.default_rng(5)
    chain = random_signatures(n, 5)
    for i in range(1, n):
        half = slice(0, WIDTH // 2) if i % 2 else slice(WIDTH // 2, WIDTH)
        chain[i, half] = chain[i - 1, half]
    order = rng.permutation(n)
    dropped = near_duplicates(chain[order])
    assert not dropped[0] and dropped[1:].all()


def test_none_and_one():
    assert near_duplicates(random_signatures(0)).tolist() == []
    assert near_duplicates(random_signatures(1), np.ones(1, bool)).tolist() == [False]


def test_pairs_of_a_large_bucket_grow_linearly():
    keys = np.random.default_rng(0).permutation(np.repeat(np.arange(3, dtype=np.uint64), [2, 40_000, 1]))
    a, b = (np.concatenate(side) for side in zip(*_candidates(keys), strict=True))
    assert len(a) == (39_999 + 39_998) + 1  # with the first and, from the third on, with the one before; one pair of 0s
    assert np.array_equal(keys[a], keys[b]) and (a < b).all()
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(a)


@pytest.mark.parametrize("identical", [False, True])
def test_memory_is_bounded(identical):
    n = 100_000
    signatures = np.zeros((n, WIDTH), np.uint16) if identical else random_signatures(n)
    tracemalloc.start()
    dropped = near_duplicates(signatures, memory=60 * n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dropped.sum() == identical * (n - 1)
    assert peak < 60 * n + (12 << 20)  # all bands at once would need 41 MB; the blocks of pairs do not grow with n


def test_edited_copies_of_a_novel_are_found_and_its_pages_stay(shared_data):
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    pages = [novel[i : i + 500] for i in range(0, len(novel) - 500, 500)]
    rng, alphabet = random.Random(0), content_key(novel)
    copies = [edited(page, 0.1, rng, alphabet) for page in pages[::3]]
    dropped = near_duplicates(np.stack([signature(text) for text in pages + copies]))
    assert not dropped[: len(pages)].any()
    assert dropped[len(pages) :].mean() > 0.98


# Decontaminator

LONG = "下列关于三国时期赤壁之战的叙述，正确的是哪一项？"  # 22 letters
SHORT = "写下坛经的禅宗六祖是（  ）"  # 10 letters


@pytest.fixture
def questions(tmp_path):
    """A folder with a C-Eval file and, one level down, a CMMLU file."""
    (tmp_path / "cmmlu").mkdir()
    (tmp_path / "ceval.csv").write_text(f"id,question,A,answer\n0,{LONG},甲,A\n1,肾在液为,唾,A\n", encoding="utf-8")
    (tmp_path / "cmmlu" / "a.csv").write_text(f"Question,A,Answer\n{SHORT},惠能,A\n", encoding="utf-8-sig")
    return tmp_path


def test_questions_are_found_through_signs_and_only_from_n_letters_on(questions):
    found = Decontaminator([questions])
    key = content_key(LONG)
    assert len(key) == 22 and (found.questions, found.skipped) == (3, 1)
    assert found.contaminated("前文。" + LONG + "后文")
    assert found.contaminated("前文，" + "、".join(key[3:19]) + "。后文")  # 16 letters of it
    assert not found.contaminated("前文，" + key[3:18] + "。后文")  # 15
    assert not found.contaminated("")


def test_short_questions_are_found_whole_and_the_shortest_not_at_all(questions):
    found = Decontaminator([questions])
    key = content_key(SHORT)
    assert len(key) == 10 and found.contaminated(f"请问：{SHORT}惠能")
    assert not found.contaminated(f"请问：{key[:9]}") and not found.contaminated(f"请问：{key[1:]}")
    assert not found.contaminated("按五行学说，肾在液为唾。")
    assert Decontaminator([questions], shortest=4).contaminated("按五行学说，肾在液为唾。")


def test_files_and_folders_are_read_alike(questions):
    one, other = questions / "ceval.csv", questions / "cmmlu" / "a.csv"
    assert Decontaminator([one, other]).questions == Decontaminator([str(questions)]).questions == 3
    assert not Decontaminator([other]).contaminated(LONG)
    assert not Decontaminator([]).contaminated(LONG)


def test_every_question_finds_itself_and_books_are_clean(shared_data):
    found = Decontaminator([shared_data / "multiple_choice"])
    assert (found.questions, found.skipped, len(found.short)) == (595, 61, 176)
    assert all(found.contaminated(f"第{i}题{question}答") for i, question in enumerate(found.short))
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    assert not found.contaminated(novel)
    answers = json.loads((shared_data / "sft" / "llamafactory_alpaca_zh_demo.json").read_text(encoding="utf-8"))
    assert not any(found.contaminated(answer["output"]) for answer in answers)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"id,stem,A\n0,x,y\n", "no column named question"),
        (b"", "no column named question"),
        ("id,question\n0,下列\n".encode("gbk"), "not a csv file in UTF-8"),
    ],
)
def test_bad_question_file_is_named(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.csv.*{message}"):
        Decontaminator([tmp_path])


def test_missing_questions_are_named(tmp_path):
    with pytest.raises(DataError, match="none.csv not found"):
        Decontaminator([tmp_path / "none.csv"])
    with pytest.raises(DataError, match="holds no csv file"):
        Decontaminator([tmp_path])
