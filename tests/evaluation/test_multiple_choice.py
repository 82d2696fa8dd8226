"""C-Eval and CMMLU: files as they come, prompts to the character, and lm-evaluation-harness on the same questions."""

import csv
import json
from pathlib import Path

import pytest
from questions import QUESTIONS, RENAMED, make_checkpoint, write_ceval, write_cmmlu

import eval_generate
import export
from dataset.formats import DataError
from evaluation.multiple_choice import BENCHMARKS, Item, ask_letters, ask_texts, files_of, load
from evaluation.scoring import chosen, make_rows, score
from tokenizer import Tokenizer

# files


def test_both_layouts_are_read(tmp_path):
    for name, write, subjects in [("ceval", write_ceval, ["law", "logic"]), ("cmmlu", write_cmmlu, RENAMED.values())]:
        found, split = load(name, str(write(tmp_path / name)), list(subjects), shots=1)
        assert split == BENCHMARKS[name].split
        assert {subject for subject, *_ in found} == set(subjects)
        by_question = {item.question: (item, shots) for _, _, item, shots in found}
        item, shots = by_question["下列哪一项不是物权？"]
        assert item == Item("下列哪一项不是物权？", ["所有权", "抵押权", "债权", "地役权"], 2)
        assert [shot.question for shot in shots] == ["多少岁以上是成年人？"]  # the first of dev
        assert by_question["若p则q，非q，所以：\n（　）"][0].options[3] == "p, q"


def test_prompts_are_the_harness_own_to_the_character():
    title = BENCHMARKS["ceval"].opening.format("法学")
    item, shot = Item(" 问题？ ", ["甲", "乙", "丙", "丁"], 1), Item("先问？", ["一", "二", "三", ""], 3)
    asked = ask_letters("law", title, item, [shot])
    assert asked.context == (
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        "先问？\nA. 一\nB. 二\nC. 三\nD. \n答案： D\n\n"
        "问题？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    )
    assert asked.choices == [" A", " B", " C", " D"] and asked.answer == 1
    asked = ask_texts("law", title, item, [shot])
    assert asked.context == title + "先问？\n答案：无\n\n问题？\n答案："
    assert asked.choices == ["甲", "乙", "丙", "丁"] and asked.answer == 1


def test_only_dev_is_asked_without_the_question_among_its_shots(tmp_path):
    write_ceval(tmp_path)
    for path in (tmp_path / "val").iterdir():
        path.unlink()
    found, split = load("ceval", str(tmp_path), ["law"], shots=2)
    assert split == "dev" and len(found) == 3
    assert all(item not in shots and len(shots) == 2 for _, _, item, shots in found)
    with pytest.raises(DataError, match="law has 2 dev questions beside the one asked, fewer than shots=3"):
        load("ceval", str(tmp_path), ["law"], shots=3)


HEADER = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no question in it; it is empty"),
        (HEADER, "no question in it"),
        (HEADER + "0,问,1,2,3,4,E\n", r"law_val.csv:2: the answer is 'E', not A, B, C or D"),
        (HEADER + "0,问,1,2,3,4,AB\n", r"law_val.csv:2: the answer is 'AB'"),
        (HEADER + "0,问,1,2,3,4,\n", r"law_val.csv:2: the answer is ''"),
        (HEADER + "0,问,1,2,3,A\n", r"law_val.csv:2: 6 fields, but the header has 7"),
        (HEADER + "0, ,1,2,3,4,A\n", r"law_val.csv:2: the question is empty"),
        (HEADER + '0,"问,1,2,3,4,A\n', r"law_val.csv:\d: not CSV"),
        ("id,instruction,output\n0,a,b\n", "law_val.csv: one column question is needed.* there are id, instruction"),
        ("question,A,B,C,D,answer,Answer\n问,1,2,3,4,A,B\n", "one column answer is needed"),
        ((HEADER + "0,问,1,2,3,4,A\n").encode("gbk"), r"not UTF-8 \(GBK\?\): convert it: iconv -f GB18030"),
        ((HEADER + "0,问,1,2,3,4,A\n").encode("utf-16"), "not UTF-8"),
        (b"\x00\x01\x02" * 50, "law_val.csv"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, content, message):
    write_ceval(tmp_path)
    (tmp_path / "val" / "law_val.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load("ceval", str(tmp_path), ["law"], shots=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "encode", [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.replace("\n", "\r\n").encode()]
)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, encode):
    expected, _ = load("ceval", str(write_ceval(tmp_path / "a", {"law": QUESTIONS["law"]})), ["law"], 0)
    path = tmp_path / "a" / "val" / "law_val.csv"
    path.write_bytes(encode(path.read_text(encoding="utf-8").replace("\r\n", "\n")))
    assert load("ceval", str(tmp_path / "a"), ["law"], 0)[0] == expected


def test_a_missing_subject_is_named(tmp_path):
    write_ceval(tmp_path)
    with pytest.raises(
        DataError, match="50 of 52 subjects of C-Eval .val. are missing: computer_network, .*--subjects="
    ):
        load("ceval", str(tmp_path), [], 0)
    (tmp_path / "dev" / "law_dev.csv").unlink()
    with pytest.raises(DataError, match="no dev questions of law, of which shots are taken"):
        load("ceval", str(tmp_path), ["law"], 1)
    with pytest.raises(DataError, match="no such folder"):
        load("ceval", str(tmp_path / "none"), [], 0)
    with pytest.raises(DataError, match="no questions of CMMLU, such as test/SUBJECT.csv"):
        load("cmmlu", str(tmp_path / "dev"), [], 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "logic_val.csv").write_text("x")
    with pytest.raises(DataError, match="are the same subject"):
        load("ceval", str(tmp_path), ["logic"], 0)


def test_only_test_questions_have_no_answers(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "law_test.csv").write_text("id,question,A,B,C,D\n0,问,1,2,3,4\n", encoding="utf-8")
    with pytest.raises(DataError, match="there is only test, whose answers are not public"):
        load("ceval", str(tmp_path), [], 0)


def test_a_dataset_of_the_hub_is_read_by_subject(tmp_path, monkeypatch):
    """A folder laid out as a dataset of the hub: what load_dataset makes of a name, and the error of a missing one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_ceval(tmp_path / "set")
    rows = [dict(split=split, path=f"{split}/law_{split}.csv") for split in ("dev", "val")]
    config = [dict(config_name="law", data_files=rows)]
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs: {json.dumps(config)}\n---\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found, _ = load("ceval", f"hf:{tmp_path / 'set'}", ["law"], 1)
    assert [item.question for _, _, item, _ in found] == [row[0] for row in QUESTIONS["law"]]
    assert found[0][2].options == list(QUESTIONS["law"][0][1:5])
    with pytest.raises(DataError, match="logic, val: not found or not reached: .*; give a folder as NAME=PATH"):
        load("ceval", f"hf:{tmp_path / 'set'}", ["logic"], 0)


@pytest.mark.parametrize("name, n", [("ceval", 260), ("cmmlu", 335)])
def test_the_published_dev_files_are_read(shared_data, name, n):
    folder = shared_data / "multiple_choice" / f"{name}_dev"
    if not folder.is_dir():
        pytest.skip(f"no questions at {folder}")
    found, split = load(name, str(folder), [], shots=4)
    assert split == "dev" and len(found) == n
    assert {subject for subject, *_ in found} == set(BENCHMARKS[name].subjects)


# one forward a question


@pytest.mark.parametrize("vocabulary", ["ours", "tokenizer/chatglm3_tokenizer.model"])
def test_four_letters_are_read_with_one_forward(request, vocabulary):
    if vocabulary == "ours":
        path = request.getfixturevalue("tokenizer_path")
    else:
        path = request.getfixturevalue("shared_data") / vocabulary
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}")
    items = [Item(question, options, 0) for question, *options, _ in QUESTIONS["law"]]
    asked = [ask_letters("law", "法学题。\n\n", item, []) for item in items]
    for row in make_rows(Tokenizer.load(path), asked, [], 512):
        assert row.tails == [[], [], [], []]


# lm-evaluation-harness


def harness(model, name, splits, shots):
    """{question: (log-likelihoods of the letters, accuracy)} by the harness's own YAML, evaluator and HFLM.

    `splits` is {subject: {split: rows of a .csv}}; where there is only dev it is the test split.
    """
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-dev.txt")
    import datasets
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    folder, tasks = Path(lm_eval.__file__).parent / "tasks" / name, {}
    prefix, default = {
        "ceval": ("ceval-valid", "_default_ceval_yaml"),
        "cmmlu": ("cmmlu", "_default_template_yaml"),
    }[name]
    for subject, rows in splits.items():
        config = yaml.safe_load((folder / default).read_text(encoding="utf-8"))
        config |= yaml.safe_load((folder / f"{prefix}_{subject}.yaml").read_text(encoding="utf-8"))
        data = datasets.DatasetDict({split: datasets.Dataset.from_list(each) for split, each in rows.items()})
        config |= dict(custom_dataset=lambda data=data, **_: data, num_fewshot=shots)
        if list(rows) == ["dev"]:
            config |= dict(validation_split=None, test_split="dev")
        config.pop("include")
        tasks[config["task"]] = ConfigurableTask(config=config)
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
    samples = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=True)["samples"]
    column = "question" if name == "ceval" else "Question"
    return {
        (task.removeprefix(f"{prefix}_"), sample["doc"][column]): (
            [resps[0][0] for resps in sample["resps"]],
            sample["acc"],
        )
        for task, theirs in samples.items()
        for sample in theirs
    }


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [{key: value for key, value in row.items() if key} for row in csv.DictReader(file)]


def compare_with_harness(tmp_path, tok, name, source, subjects, shots, stage):
    ckpt = make_checkpoint(tmp_path / "run", tok, stage)
    export.main([f"--ckpt={ckpt}", "--format=hf", f"--out={tmp_path / 'hf'}"])
    benchmark = BENCHMARKS[name]
    files = files_of(benchmark, source)
    splits = {
        subject: {split: rows_of(files[split][subject]) for split in files}
        for subject in subjects or benchmark.subjects
    }
    theirs = harness(tmp_path / "hf", name, splits, shots)
    asked, _ = load(name, str(source), subjects, shots)
    loaded = eval_generate.load(ckpt, eval_generate.setup("cpu", "float32"))
    questions = [ask_letters(*each) for each in asked]
    opening = [loaded.tokenizer.opening_id] if loaded.continues else []
    ours = score(loaded.model, loaded.tokenizer, questions, opening)
    assert len(theirs) == len(asked)
    for (subject, _, item, _), question, logps in zip(asked, questions, ours.logps, strict=True):
        expected, right = theirs[subject, item.question]
        # both sum the same float32 terms, of size 10, in another order
        assert logps == pytest.approx(expected, abs=1e-4)
        assert (chosen([logps])[0] == question.answer) == bool(right) and chosen([logps]) == chosen([expected])
    return ours.cut


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shots, stage", [("ceval", 0, "pretrain"), ("ceval", 2, "sft"), ("cmmlu", 1, "pretrain"), ("cmmlu", 0, "sft")]
)
def test_the_harness_chooses_alike(tmp_path, tokenizer_path, name, shots, stage):
    """Also where the context is too short for all of it, and both cut its left."""
    source = (write_ceval if name == "ceval" else write_cmmlu)(tmp_path / name)
    subjects = list(QUESTIONS) if name == "ceval" else list(RENAMED.values())
    cut = compare_with_harness(tmp_path, Tokenizer.load(tokenizer_path), name, source, subjects, shots, stage)
    assert cut > 0 or shots == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ceval", "cmmlu"])
def test_the_harness_chooses_alike_on_the_published_dev_files(tmp_path, tokenizer_path, shared_data, name):
    source = shared_data / "multiple_choice" / f"{name}_dev"
    if not source.is_dir():
        pytest.skip(f"no questions at {source}")
    compare_with_harness(tmp_path, Tokenizer.load(tokenizer_path), name, source, [], 0, "pretrain")
