"""C-Eval (Huang et al., 2023, arXiv:2305.08322) and CMMLU (Li et al., 2023, arXiv:2306.09212): their files, and their
questions asked in two ways.

By letter the prompt is lm-evaluation-harness's, of its tasks ceval-valid and cmmlu, to the character, and the choices
are the letters. By text the options are not listed, and each is itself a choice: what a small model can tell, which has
not learnt that a letter stands for a line above.
"""

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

from dataset.formats import DataError, escaped, shortened
from evaluation.scoring import Question

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS.lower(), "answer")
CEVAL_SUBJECTS = """
    computer_network=计算机网络 operating_system=操作系统 computer_architecture=计算机组成 college_programming=大学编程
    college_physics=大学物理 college_chemistry=大学化学 advanced_mathematics=高等数学
    probability_and_statistics=概率统计 discrete_mathematics=离散数学
    electrical_engineer=注册电气工程师 metrology_engineer=注册计量师
    high_school_mathematics=高中数学 high_school_physics=高中物理 high_school_chemistry=高中化学
    high_school_biology=高中生物 middle_school_mathematics=初中数学 middle_school_biology=初中生物
    middle_school_physics=初中物理 middle_school_chemistry=初中化学 veterinary_medicine=兽医学
    college_economics=大学经济学 business_administration=工商管理 marxism=马克思主义基本原理
    mao_zedong_thought=毛泽东思想和中国特色社会主义理论体系概论 education_science=教育学 teacher_qualification=教师资格
    high_school_politics=高中政治 high_school_geography=高中地理 middle_school_politics=初中政治
    middle_school_geography=初中地理 modern_chinese_history=近代史纲要
    ideological_and_moral_cultivation=思想道德修养与法律基础 logic=逻辑学 law=法学
    chinese_language_and_literature=中国语言文学 art_studies=艺术学 professional_tour_guide=导游资格
    legal_professional=法律职业资格 high_school_chinese=高中语文 high_school_history=高中历史
    middle_school_history=初中历史 civil_servant=公务员 sports_science=体育学 plant_protection=植物保护
    basic_medicine=基础医学 clinical_medicine=临床医学 urban_and_rural_planner=注册城乡规划师 accountant=注册会计师
    fire_engineer=注册消防工程师 environmental_impact_assessment_engineer=环境影响评价工程师 tax_accountant=税务师
    physician=医师资格
"""
CMMLU_SUBJECTS = """
    agronomy=农学 anatomy=解剖学 ancient_chinese=古汉语 arts=艺术学 astronomy=天文学 business_ethics=商业伦理
    chinese_civil_service_exam=中国公务员考试 chinese_driving_rule=中国驾驶规则 chinese_food_culture=中国饮食文化
    chinese_foreign_policy=中国外交政策 chinese_history=中国历史 chinese_literature=中国文学
    chinese_teacher_qualification=中国教师资格 clinical_knowledge=临床知识 college_actuarial_science=大学精算学
    college_education=大学教育学 college_engineering_hydrology=大学工程水文学 college_law=大学法律
    college_mathematics=大学数学 college_medical_statistics=大学医学统计 college_medicine=大学医学
    computer_science=计算机科学 computer_security=计算机安全 conceptual_physics=概念物理学
    construction_project_management=建设工程管理 economics=经济学 education=教育学 electrical_engineering=电气工程
    elementary_chinese=小学语文 elementary_commonsense=小学常识 elementary_information_and_technology=小学信息技术
    elementary_mathematics=初等数学 ethnology=民族学 food_science=食品科学 genetics=遗传学 global_facts=全球事实
    high_school_biology=高中生物 high_school_chemistry=高中化学 high_school_geography=高中地理
    high_school_mathematics=高中数学 high_school_physics=高中物理学 high_school_politics=高中政治
    human_sexuality=人类性行为 international_law=国际法学 journalism=新闻学 jurisprudence=法理学
    legal_and_moral_basis=法律与道德基础 logical=逻辑学 machine_learning=机器学习 management=管理学 marketing=市场营销
    marxist_theory=马克思主义理论 modern_chinese=现代汉语 nutrition=营养学 philosophy=哲学
    professional_accounting=专业会计 professional_law=专业法学 professional_medicine=专业医学
    professional_psychology=专业心理学 public_relations=公共关系 security_study=安全研究 sociology=社会学
    sports_science=体育学 traditional_chinese_medicine=中医中药 virology=病毒学 world_history=世界历史
    world_religions=世界宗教
"""


class Benchmark(NamedTuple):
    """How a benchmark's files are named, what is asked, and how each prompt begins."""

    title: str
    hub: str  # its dataset on Hugging Face
    split: str  # the one whose answers are public
    layout: str  # of its files, for messages
    file: str  # a pattern of FOLDER/NAME of a file, without .csv
    subjects: dict[str, str]
    opening: str


def _subjects(text):
    return dict(item.split("=") for item in text.split())


BENCHMARKS = dict(
    ceval=Benchmark(
        "C-Eval", "ceval/ceval-exam", "val", "val/SUBJECT_val.csv", r".*/(?P<subject>\w+)_(?P<split>dev|val|test)",
        _subjects(CEVAL_SUBJECTS), "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
    ),
    cmmlu=Benchmark(
        "CMMLU", "haonan-li/cmmlu", "test", "test/SUBJECT.csv", r"(?:.*_)?(?P<split>dev|test)/(?P<subject>\w+)",
        _subjects(CMMLU_SUBJECTS), "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
    ),
)  # fmt: skip


class Item(NamedTuple):
    question: str
    options: list[str]
    answer: int


def item_of(place, fields):
    """The Item in the fields of a row, {column in lower case: text}; `place` is named in errors."""
    answer = fields["answer"].strip()
    if answer not in LETTERS or len(answer) != 1:
        raise DataError(f"{place}: the answer is {shortened(answer, 20)!r}, not A, B, C or D")
    if not fields["question"].strip():
        raise DataError(f"{place}: the question is empty")
    return Item(fields["question"], [fields[letter] for letter in LETTERS.lower()], LETTERS.index(answer))


def lower_columns(place, names):
    """Column names in lower case, if those of a question are among them."""
    found = [str(name).strip().lower() for name in names]
    if missing := [name for name in COLUMNS if found.count(name) != 1]:
        there = shortened(escaped(", ".join(map(str, names))))
        needed = missing[0] if len(missing[0]) > 1 else missing[0].upper()  # as C-Eval writes them
        raise DataError(f"{place}: one column {needed} is needed, beside the others of a question; there are {there}")
    return found


def read_csv(path):
    """The Items of a file of questions."""
    name = escaped(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name}: not UTF-8 (GBK?): convert it: iconv -f GB18030 -t UTF-8 {name} > NEW") from None
    records, rows = csv.reader(io.StringIO(text, newline=""), strict=True), []
    try:
        for row in records:
            if "".join(row).strip():
                rows.append((f"{name}:{records.line_num}", row))
    except csv.Error as error:
        raise DataError(f"{name}:{records.line_num}: not CSV: {error}") from None
    if len(rows) < 2:
        raise DataError(f"{name}: no question in it; it is empty or was not fully downloaded")
    columns, items = lower_columns(name, rows[0][1]), []
    for place, row in rows[1:]:
        if len(row) != len(columns):
            raise DataError(f"{place}: {len(row)} fields, but the header has {len(columns)}")
        items.append(item_of(place, dict(zip(columns, row, strict=True))))
    return items


def files_of(benchmark, folder):
    """{split: {subject: path}} of the files below a folder that are named as the benchmark names them."""
    found = {}
    for path in sorted(folder.rglob("*.csv")):
        match = re.fullmatch(benchmark.file, f"{path.absolute().parent.name}/{path.stem}")
        if match and match["subject"] in benchmark.subjects:
            other = found.setdefault(match["split"], {}).setdefault(match["subject"], path)
            if other != path:
                raise DataError(f"{escaped(path)} and {escaped(other)} are the same subject: give one of their folders")
    return found


class Local:
    """Questions in a folder; `split` is that of the benchmark or, where there is none of it, dev."""

    def __init__(self, benchmark, folder):
        if not Path(folder).is_dir():
            raise DataError(f"{escaped(folder)}: no such folder")
        self.place, self.files = escaped(folder), files_of(benchmark, Path(folder))
        self.split = benchmark.split if benchmark.split in self.files else "dev"
        if self.split not in self.files:
            there = "; there is only test, whose answers are not public" if self.files else ""
            raise DataError(f"{self.place}: no questions of {benchmark.title}, such as {benchmark.layout}{there}")

    def lacks(self, subjects):
        return [subject for subject in subjects if subject not in self.files[self.split]]

    def read(self, subject, split):
        if subject not in self.files.get(split, {}):
            raise DataError(f"{self.place}: no {split} questions of {subject}, of which shots are taken; or shots=0")
        return read_csv(self.files[split][subject])


class Hub:
    """Questions of a Hugging Face dataset, a subject a configuration of it, as lm-evaluation-harness reads it."""

    def __init__(self, benchmark, name):
        self.place, self.name, self.split = f"hf:{name}", name, benchmark.split

    def lacks(self, subjects):
        return []

    def read(self, subject, split):
        import datasets  # takes seconds, and a folder needs none of it

        place = f"{self.place}: {subject}, {split}"
        try:
            rows = datasets.load_dataset(self.name, subject, split=split)
        except Exception as error:  # the hub raises its own, requests', httpx's and OS errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{place}: not found or not reached: {reason}; give a folder as NAME=PATH") from None
        columns = lower_columns(place, rows.column_names)
        values = [["" if value is None else str(value) for value in row.values()] for row in rows]
        return [item_of(f"{place}, row {i}", dict(zip(columns, row, strict=True))) for i, row in enumerate(values, 1)]


def listed(item):
    """A question with its options, up to the answer."""
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, item.options, strict=True))
    return f"{item.question.strip()}\n{options}答案："


def plain(item):
    return f"{item.question.strip()}\n答案："


def texts(item):
    """Its options as choices; an empty one, which has no tokens, as what it says."""
    return [option.strip() or "无" for option in item.options]


def ask_letters(subject, title, item, shots):
    """A Question of what `load` gives, as the harness puts it."""
    examples = "".join(f"{listed(shot)} {LETTERS[shot.answer]}\n\n" for shot in shots)
    return Question(f"{title}{examples}{listed(item)}", [f" {letter}" for letter in LETTERS], item.answer, subject)


def ask_texts(subject, title, item, shots):
    """The same without the options, each of them a choice."""
    examples = "".join(f"{plain(shot)}{texts(shot)[shot.answer]}\n\n" for shot in shots)
    return Question(f"{title}{examples}{plain(item)}", texts(item), item.answer, subject)


def load(name, path, subjects, shots):
    """[(subject, opening of its prompts, Item, [Items that are shown before it])] and which split they are of.

    `path` is a folder, or hf:OWNER/NAME. Shots are the first of dev, but for the question itself, as in the harness.
    """
    benchmark = BENCHMARKS[name]
    source = Hub(benchmark, path.removeprefix("hf:")) if path.startswith("hf:") else Local(benchmark, path)
    wanted = [subject for subject in benchmark.subjects if not subjects or subject in subjects]
    if not wanted:
        raise DataError(f"subjects={','.join(subjects)}: none of them is a subject of {benchmark.title}")
    if missing := source.lacks(wanted):
        those = f"{len(missing)} of {len(wanted)} subjects of {benchmark.title} ({source.split})"
        some = shortened(", ".join(missing), 100)
        raise DataError(f"{source.place}: {those} are missing: {some}; add them, or name those to ask by --subjects=")
    found = []
    for subject in wanted:
        items, opening = source.read(subject, source.split), benchmark.opening.format(benchmark.subjects[subject])
        dev = source.read(subject, "dev") if shots else []
        for item in items:
            shown = [shot for shot in dev if source.split != "dev" or shot != item][:shots]
            if len(shown) < shots:
                few = f"{len(shown)} dev questions beside the one asked"
                raise DataError(f"{source.place}: {subject} has {few}, fewer than shots={shots}")
            found.append((subject, opening, item, shown))
    return found, source.split
