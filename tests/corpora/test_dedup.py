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
from corpora.dedup import (
    BANDS,
    CONVERSATION_THRESHOLD,
    ROWS,
    SHINGLE,
    SHORT,
    THRESHOLD,
    _candidates,
    conversation_signature,
    is_copied_conversation,
    is_copied_document,
    near_duplicates,
    signature,
)
from corpora.records import compared_turns
from corpora.sources import list_units, read_records

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


def test_words_of_an_alphabet_are_units():
    # Of 4 and 5 words two shingles of three are common, of five in all; of letters nearly all would be.
    assert (signature("The old bridge stands") == signature("the old bridge, stands")).all()
    agreement = (signature("the old bridge stands") == signature("the old bridge stands alone")).mean()
    assert abs(agreement - 2 / 3) < 0.15
    one, other = "the ship is at the old bridge over there", "she is in the other ship near there"
    assert (signature(one) == signature(other)).mean() < 0.05
    assert not np.array_equal(signature("用Python写代码"), signature("用Pascal写代码"))


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
    """The definition: one after the other stays, unless it is linked to one that does or is like that by another."""
    n = len(signatures)
    equal = signatures[:, None] == signatures[None]  # (N, N, WIDTH)
    alike = equal.mean(-1) >= threshold
    linked = equal.reshape(n, n, BANDS, ROWS).all(-1).any(-1) & alike
    repeats = np.full(n, -1)
    for i in range(n):
        for j in np.flatnonzero(linked[i, :i]):
            kept = j if repeats[j] < 0 else repeats[j]
            if alike[i, kept]:
                repeats[i] = kept
                break
    return repeats


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
    assert 20 < (wanted >= 0).sum() < 100
    assert np.array_equal(near_duplicates(signatures, threshold=threshold), wanted)


def test_memory_and_memmap_change_nothing(tmp_path):
    signatures = noisy_copies(300, 200)
    signatures.tofile(tmp_path / "signatures")
    on_disk = np.memmap(tmp_path / "signatures", np.uint16, "r", shape=signatures.shape)
    wanted = near_duplicates(signatures)
    assert (wanted >= 0).any()
    for memory in (0, 8 * 500 * 7, 1 << 30):  # one band a pass, three, all
        assert np.array_equal(near_duplicates(on_disk, memory=memory), wanted)


def test_shared_band_alone_is_not_enough():
    signatures = random_signatures(2)
    enough = int(np.ceil(THRESHOLD * WIDTH))
    signatures[1, : enough - 1] = signatures[0, : enough - 1]
    assert near_duplicates(signatures).tolist() == [-1, -1]
    signatures[1, enough - 1] = signatures[0, enough - 1]
    assert near_duplicates(signatures).tolist() == [-1, 0]


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_every_band_is_looked_at(memory):
    signatures = random_signatures(2 * BANDS)
    for band in range(BANDS):
        values = slice(band * ROWS, (band + 1) * ROWS)
        signatures[BANDS + band, values] = signatures[band, values]
    repeats = near_duplicates(signatures, threshold=ROWS / WIDTH, memory=memory)
    assert repeats.tolist() == [-1] * BANDS + list(range(BANDS))


def test_preferred_documents_stay():
    signatures = random_signatures(4)[[0, 1, 0, 2, 0, 3, 1, 0]]
    assert near_duplicates(signatures).tolist() == [-1, -1, 0, -1, 0, -1, 1, 0]
    prefer = np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
    assert near_duplicates(signatures, prefer).tolist() == [4, 6, 4, -1, -1, -1, -1, 4]  # one stays of each, even so


def test_a_chain_is_not_one_group():
    # Neighbours agree in one half of their values, others in nothing: each second one repeats one that stays.
    n = 600
    chain = random_signatures(n, 5)
    for i in range(1, n):
        half = slice(0, WIDTH // 2) if i % 2 else slice(WIDTH // 2, WIDTH)
        chain[i, half] = chain[i - 1, half]
    assert near_duplicates(chain).tolist() == [i - 1 if i % 2 else -1 for i in range(n)]


def test_only_confirmed_pairs_are_links():
    signatures = random_signatures(2)[[0, 1, 0, 1, 0]]
    asked = []

    def confirm(i, j):
        asked.append((i, j))
        return (i, j) != (0, 2)

    assert near_duplicates(signatures, confirm=confirm).tolist() == [-1, -1, -1, 1, 0]
    assert len(asked) == len(set(asked)) and all(i < j for i, j in asked)


def test_none_and_one():
    assert near_duplicates(random_signatures(0)).tolist() == []
    assert near_duplicates(random_signatures(1), np.ones(1, bool)).tolist() == [-1]


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
    repeats = near_duplicates(signatures, memory=60 * n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (repeats >= 0).sum() == identical * (n - 1)
    links = 2 * n * identical  # all bands at once would need 41 MB; the blocks of pairs do not grow with n
    assert peak < 60 * n + 40 * links + (12 << 20)


def test_edited_copies_of_a_novel_are_found_and_its_pages_stay(shared_data):
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    pages = [novel[i : i + 500] for i in range(0, len(novel) - 500, 500)]
    rng, alphabet = random.Random(0), content_key(novel)
    copies = [edited(page, 0.1, rng, alphabet) for page in pages[::3]]
    dropped = near_duplicates(np.stack([signature(text) for text in pages + copies])) >= 0
    assert not dropped[: len(pages)].any()
    assert dropped[len(pages) :].mean() > 0.98


@pytest.mark.parametrize("characters", [200, 300])
def test_edited_copies_of_shorter_pages_are_found(shared_data, characters):
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    pages = [novel[i : i + characters] for i in range(0, 400 * characters, characters)]
    rng, alphabet = random.Random(0), content_key(novel)
    documents = pages + [edited(page, 0.1, rng, alphabet) for page in pages]
    dropped = documents_dropped(documents)
    assert not dropped[: len(pages)].any()
    assert dropped[len(pages) :].mean() > 0.95


def documents_dropped(documents):
    turns = [[text] if len(text) < SHORT else [] for text in documents]
    signatures = np.stack([signature(text) for text in documents])
    return near_duplicates(signatures, confirm=lambda i, j: is_copied_document(turns[i], turns[j])) >= 0


BORN = "{}（{}年{}月—），{}人，中国男子球员，司职{}，曾效力于{}足球俱乐部，代表国家队出场{}次。"
NEWS = "新华社电，全国人大常委会今天举行会议，决定任命{}为{}部部长，免去{}的{}部部长职务，会议还审议了其他议案。"
LONGER = (
    "会议指出，过去一年各地区各部门认真落实有关部署，各项工作取得了新的进展，人民生活水平继续提高，社会大局保持稳定。"
    "与会人员表示，今后还要深入乡村和工厂，多听群众的意见，把困难想得更多一些，把办法准备得更充分一些。"
)


@pytest.mark.parametrize(
    "one, other",
    [
        ("水的沸点是一百摄氏度，这在一个大气压下是对的。", "水的沸点是一百摄氏度，这在一个大气压下是错的。"),
        ("国务院决定任命张三为财政部部长。", "国务院决定任命李四为教育部部长。"),
        (NEWS.format("张三", "财政", "王五", "财政"), NEWS.format("李四", "教育", "赵六", "教育")),
        ("他于1990年出生于江苏省南京市，球员，司职前锋。", "他于1985年出生于江苏省苏州市，球员，司职门将。"),
        (BORN.format("张伟", 1990, 3, "江苏省南京市", "前锋", "江苏舜天", 12),
         BORN.format("刘洋", 1985, 7, "山东省青岛市", "门将", "山东鲁能", 31)),
        (LONGER + "李明说这项规定是合法的。", LONGER + "李明说这项规定是违法的。"),
        (LONGER + "比赛结果是三比一。", LONGER + "比赛结果是一比三。"),
    ],
)  # fmt: skip
def test_short_documents_of_other_facts_stay(one, other):
    assert not documents_dropped([one, other, one.replace("，", " ") + "！"])[:2].any()


def test_short_documents_that_differ_in_a_sign_are_copies():
    text = NEWS.format("张三", "财政", "王五", "财政")
    assert documents_dropped([text, text.replace("，", "、") + "！！"]).tolist() == [False, True]
    copy = (LONGER + TEXT).replace("取得了", "取得").replace("继续", "持续").replace("深入", "走进")
    assert documents_dropped([LONGER + TEXT, copy]).tolist() == [False, True]


# conversations

BOIL = "先烧开水，再下面条，煮三分钟，捞出来加一点盐和葱花，趁热端上桌。"
REWORDED = BOIL.replace("趁热", "马上").replace("一点", "些").replace("先", "")
STORY = ["你好呀，请讲一个故事", "从前有座山，山上有座庙，庙里有个老和尚。"]
TASK = "请读下面的句子，判断它说的是哪一类事情，只回答类别的名字，不要解释理由："
CITY = "{0}的省会是哪个城市？请用一句完整的话回答。", "{0}的省会是{1}，它是全省的政治、经济和文化中心。"


@pytest.mark.parametrize(
    "a, b, same",
    [
        (["怎样煮一碗面？", BOIL], ["怎样煮一碗面", BOIL.replace("，", " ")], True),  # punctuation
        (["怎样煮一碗面？", BOIL], ["怎么煮一碗面", BOIL.replace("面条", "面").replace("一点", "点儿")], True),
        (["怎样煮一碗面？", BOIL], ["怎样煮一碗面？", BOIL.replace("趁热", "马上")], False),
        (["怎样煮一碗面？", BOIL], ["怎样煮一碗面？", REWORDED], True),
        (["怎样煮一碗面？", BOIL], ["怎样煮一碗粥？", BOIL], False),  # another question, the answer of both
        (["怎样煮一碗面？", BOIL], ["怎样煮一碗面？", "面条要用冷水和，揉好了再切，最后下锅。"], False),
        ([f"{TASK}房间很干净", "好评"], [f"{TASK}房间很安静", "好评"], False),  # a stock answer
        ([f"{TASK}房间很干净", "好评"], [f"{TASK}房间很干净。", "好评"], True),
        ([f"{TASK}房间很干净", "这句话说的是好评。"], [f"{TASK}房间不干净", "这句话说的是差评。"], False),
        ([t.format("广东省", "广州市") for t in CITY], [t.format("湖南省", "长沙市") for t in CITY], False),
        ([t.format("江苏省", "南京市") for t in CITY], [t.format("浙江省", "杭州市") for t in CITY], False),
        (["What is the capital of France?", "The capital of France is Paris, on the river Seine."],
         ["What is the capital of Spain?", "The capital of Spain is Madrid, on the river Seine."], False),
        (["小明有12个苹果，吃了3个，还剩几个？", "小明还剩12-3=9个苹果，所以答案是9个。"],
         ["小红有15个橘子，吃了4个，还剩几个？", "小红还剩15-4=11个橘子，所以答案是11个。"], False),
        ([f"{TASK}3<5", "这个式子要看上下文才能判断对错。"], [f"{TASK}3>5", "这个式子要看上下文才能判断对错。"], False),
        ([f"{TASK}1:2", "这个式子要看上下文才能判断对错。"], [f"{TASK}12", "这个式子要看上下文才能判断对错。"], False),
        ([*STORY, "谢谢", "不客气，再见。"], [*STORY, "谢谢", "还想听别的故事吗？"], False),  # another last answer
        ([*STORY, "谢谢", "不客气，再见。"], [*STORY, "谢谢！", "不客气，再见"], True),
        ([*STORY, "谢谢", "不客气，再见。"], STORY, False),
        (["请写一首关于秋天的诗"], ["请写一首关于秋天的诗。"], True),  # questions alone
        (["请写一首关于秋天的诗"], ["请写一首关于夏夜的诗"], False),
    ],
)  # fmt: skip
def test_what_is_a_copied_conversation(a, b, same):
    assert is_copied_conversation(a, b) is is_copied_conversation(b, a) is same


def near_duplicates_of(conversations):
    signatures = np.stack([conversation_signature("\n".join(turns)) for turns in conversations])
    pair = lambda i, j: is_copied_conversation(conversations[i], conversations[j])  # noqa: E731
    return near_duplicates(signatures, confirm=pair, threshold=CONVERSATION_THRESHOLD) >= 0


FRUIT = "苹果 香蕉 橘子 葡萄 西瓜 桃子 草莓 樱桃 荔枝 芒果 柠檬 石榴 菠萝 山楂 枇杷".split()


@pytest.mark.parametrize(
    "question, answer",
    [
        (f"{TASK}我爱吃{{}}", "这件事说的是饮食，没有别的意思。"),
        ("用“{}”造一个句子，要通顺，不超过二十个字。", "今天我在市场上买了三斤{}，又新鲜又便宜。"),
        ("请把英文单词翻译成中文并造句：{}", "好的，请问您想要简体中文还是繁体中文的翻译呢？"),
        ("你和{}是什么关系，是同一家公司开发的吗？", "我是小羊驼，由一个小团队训练的中文助手，很高兴认识您。"),
        (
            "写一个函数，统计列表里有几个{}，并举例说明怎么用。",
            "def count(items):\n    return items.count('{}')  # 逐个比较",
        ),
    ],
)
def test_records_of_one_template_stay(question, answer):
    conversations = [[question.format(fruit), answer.format(fruit)] for fruit in FRUIT]
    assert not near_duplicates_of(conversations).any()


def test_edited_copies_of_real_conversations_are_found_and_the_conversations_stay(shared_data):
    """Of those of 40 characters and more: in a shorter one a word makes another."""
    names = dict(llamafactory_alpaca_zh_demo="json", oaast_sft_zh="json", sharegpt_zh_200="jsonl")
    rng, dropped, found, planted = random.Random(0), 0, 0, 0
    for name, suffix in names.items():
        layout = "sharegpt" if suffix == "jsonl" else "alpaca"
        units = list_units("x", layout, str(shared_data / "sft" / f"{name}.{suffix}"))
        read = [compared_turns(record) for unit in units for _, record, _ in read_records(unit) if record]
        conversations = list({" ".join("".join(turns).split()): turns for turns in read}.values())  # each once
        alphabet = [c for c in "".join(map("".join, conversations[:100])) if c.isalpha()]
        longer = [turns for turns in conversations if len("".join(turns)) >= 40]
        copies = [[edited(text, 0.1, rng, alphabet) if text else "" for text in turns] for turns in longer]
        gone = near_duplicates_of(conversations + copies)
        dropped += gone[: len(conversations)].sum()
        found += gone[len(conversations) :].sum()
        planted += len(copies)
    assert planted > 1700 and found / planted >= 0.95
    assert dropped / planted <= 0.005  # and these are copies: the same question with much the same answer
