"""common.report, common.family and common.markup: one page of a chain, its tree, and nothing in it that acts."""

import json
import re
from html.parser import HTMLParser

import pytest
from chains import failure
from tiny import tiny

from common import checkpoint, report
from common.config import ConfigError, options_of, parse_config
from common.family import HEIGHT, WIDTH, Box, draw, place
from common.files import REPORT_MARK, file_sha256
from common.markup import from_markdown, tag
from common.metrics import MetricLog
from common.tables import markdown_table

HOSTILE = "<script>alert(1)</script>&\"'\x00\x1b[31m\u202e</p><img src=x onerror=y>"


class Page(HTMLParser):
    """Elements [(name, attributes)] of a page, and all of its text but that of the style."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""

    def all(self, name):
        return [attributes for each, attributes in self.elements if each == name]


def save(folder, stage, parent=None, seed=0, name="ckpt.pt", **config):
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(stage=stage, step=seed, tokens_seen=9, config=config, tokenizer=b"x")
    if parent:
        facts["parent"] = dict(path=str(parent), stage="sft", sha256=file_sha256(parent))
    checkpoint.save(folder / name, model=tiny(seed), **facts)
    return folder / name


def log(folder, prompt="春日", reply="好诗", **metrics):
    kept = MetricLog(folder)
    kept.write(0, {"train/loss": 3.0})
    kept.write(1, {"train/loss": 2.0} | metrics)
    kept.plot([("loss", ["train/loss"])])
    kept.samples(0, [(prompt, "乱码")])
    kept.samples(1, [(prompt, reply)])


@pytest.fixture
def runs(tmp_path):
    """pretrain -> sft -> dpo, ppo; a reward model whose parent is gone; a second name of sft's file."""
    root = tmp_path / "out"
    first = save(root / "pretrain", "pretrain", data=str(tmp_path / "data"))
    second = save(root / "sft", "sft", first, 1, data=str(tmp_path / "data"), learning_rate=0.5, batch_size=32)
    (root / "sft" / "ckpt-1.pt").hardlink_to(second)
    for i, stage in enumerate(("dpo", "ppo")):
        save(root / stage, stage, second, 2 + i)
    other = save(tmp_path / "gone", "sft", seed=7)
    save(root / "rm", "rm", other, 5)
    for name in ("pretrain", "sft", "dpo"):
        log(root / name, reply=f"{name} 的诗", **{"val/loss": 1.5})
    return root


def page_of(root, *options):
    report.main([str(root), *options])
    return Page((root / "report.html").read_text(encoding="utf-8"))


def test_arrows_follow_the_hashes(runs):
    page = page_of(runs)
    known = {file_sha256(runs / name / "ckpt.pt"): name for name in ("pretrain", "sft", "dpo", "ppo", "rm")}
    gone = file_sha256(runs.parent / "gone" / "ckpt.pt")
    known[gone] = "gone"
    arrows = {(known[path["data-parent"]], known[path["data-child"]])
              for path in page.all("path") if path["class"] == "arrow"}  # fmt: skip
    assert arrows == {("pretrain", "sft"), ("sft", "dpo"), ("sft", "ppo"), ("gone", "rm")}
    boxes = {known[group["data-id"]]: group["class"] for group in page.all("g")}
    assert boxes == dict.fromkeys(("pretrain", "sft", "dpo", "ppo", "rm"), "box") | dict(gone="box lost")
    assert all(f"sha256 {digest[:8]}" in page.text for digest in known)


def test_an_arrow_goes_from_the_side_of_its_parent_to_that_of_its_child():
    boxes = [
        Box("a", "a", ()),
        Box("b", "b", (), "a"),
        Box("c", "c", (), "a"),
        Box("d", "d", (), "c"),
        Box("e", "e", ()),
    ]
    placed = place(boxes)
    assert placed["a"][1] == (placed["b"][1] + placed["c"][1]) / 2 and placed["d"][1] == placed["c"][1]
    spots = sorted(placed.values())
    assert not any(x == u and abs(y - v) < HEIGHT for (x, y), (u, v) in zip(spots, spots[1:], strict=False))
    for path in Page(draw(boxes)).all("path"):
        if path.get("class") == "arrow":
            begin, *_, (x, y) = [tuple(map(float, at.split(","))) for at in re.findall(r"[\d.]+,[\d.]+", path["d"])]
            parent, child = placed[path["data-parent"]], placed[path["data-child"]]
            assert begin == (parent[0] + WIDTH, parent[1] + HEIGHT / 2)
            assert child[0] - 10 < x < child[0] and y == child[1] + HEIGHT / 2


def test_the_page_has_all_of_the_chain_and_needs_nothing_else(runs):
    data = runs.parent / "data"
    data.mkdir()
    (data / "report.md").write_text("# 数据\n\n" + markdown_table(["source"], [["a|b"]]) + "\n", encoding="utf-8")
    (data / "meta.json").write_text(json.dumps(dict(command=dict(sft="python data_process.py --parts=sft"))))
    (runs / "report.md").write_text(
        f"哪个更好：\n\n| checkpoint |\n|---|\n| ppo |\n\n{REPORT_MARK}\n", encoding="utf-8"
    )
    page = page_of(runs)
    assert [each["id"] for each in page.all("section")] == "家谱 关键数字 数据 各阶段 样例 比较 命令 版本与校验".split()
    replies = [f"{name} 的诗" for name in ("pretrain", "sft", "dpo")]
    assert page.text.index("pretrain 的诗") < page.text.index("sft 的诗") < page.text.index("dpo 的诗")
    for said in (*replies, "a|b", "哪个更好", "python data_process.py --parts=sft", "验证损失 1.5"):
        assert said in page.text
    assert f"python sft.py --data={data} --learning_rate=0.5 --batch_size=32" in page.text
    assert not [name for name, _ in page.elements if name in ("script", "link", "iframe", "object", "form", "base")]
    assert [image["src"].split(",")[0] for image in page.all("img")] == ["data:image/png;base64"] * 3
    links = [value for _, each in page.elements for key, value in each.items() if key in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)
    (style,) = re.findall("<style>(.*?)</style>", (runs / "report.html").read_text(encoding="utf-8"), re.S)
    assert "url(" not in style and "@import" not in style
    before = (runs / "report.html").read_bytes()
    page_of(runs)
    assert (runs / "report.html").read_bytes() == before


def test_what_is_hostile_is_only_text(runs):
    log(runs / "ppo", HOSTILE, HOSTILE, **{f"val/{HOSTILE}": 1.0})
    save(runs / "<b>&'", "<i>stage", runs / "sft" / "ckpt.pt", 9, data=HOSTILE, **{"</pre>": "</style>"})
    (runs / "report.md").write_text(f"{HOSTILE}\n# {HOSTILE}\n| {HOSTILE} |\n|---|\n- {HOSTILE}\n", encoding="utf-8")
    page = page_of(runs)  # every element is closed where it should be
    assert not page.open
    kinds = {name for name, _ in page.elements}
    assert not kinds & {"script", "b", "i"} and "<script>alert(1)</script>&" in page.text
    assert not any(key.startswith("on") for _, each in page.elements for key in each)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page.text) and "\\x00\\x1b[31m\\u202e" in page.text


def test_damage_is_told_with_the_run(runs):
    whole = (runs / "ppo" / "ckpt.pt").read_bytes()
    at = whole.index(b"data/0") + 2000  # among the weights: the header is whole
    (runs / "ppo" / "ckpt.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    (runs / "dpo" / "ckpt.pt").write_bytes(b"PK")
    with open(runs / "sft" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "val/lo')
    (runs / "sft" / "loss.png").write_bytes(b"GIF89a")
    (runs / "under_way").mkdir()
    log(runs / "under_way")
    text = page_of(runs).text
    for said in (
        "ckpt.pt：damaged",
        "ckpt.pt：cut short",
        "metrics.jsonl：有 1 行",
        "loss.png：不是 PNG",
        "没有 ckpt.pt",
    ):
        assert said in text


@pytest.mark.parametrize("folder, words", [("nowhere", "no such folder"), ("empty", "no run in it")])
def test_no_runs_is_one_line_and_leaves_nothing(folder, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert words in failure(capsys, report.main, [str(tmp_path / folder)])
    assert not list((tmp_path / "empty").iterdir())


def test_a_page_of_somebody_else_stays(runs):
    page = runs / "report.html"
    for other in (b"<p>mine</p>\n", f"{REPORT_MARK}\nmore".encode()):
        page.write_bytes(other)
        with pytest.raises(ConfigError, match="not written by"):
            report.main([str(runs)])
        assert page.read_bytes() == other
    with pytest.raises(ConfigError, match="html"):
        report.main([str(runs), f"--out={runs / 'page.txt'}"])


def test_the_command_of_an_import_imports(runs):
    save(runs / "foreign", "pretrain", seed=9, import_llama2c="stories.bin", tokenizer="tok.model", out="out/foreign")
    page_of(runs)
    text = (runs / "report.html").read_text(encoding="utf-8")
    assert "python export.py --import_llama2c=stories.bin --tokenizer=tok.model --out=out/foreign" in text


def test_options_give_the_config_back(tmp_path):
    given = ["--sample_prompts=['a, b', 'c']", "--model.dim=128", "--min_learning_rate=1e-05", "--eval_interval=7"]
    config = parse_config("pretrain", [*given, "--out=a b"], "")
    assert parse_config("pretrain", options_of("pretrain", json.loads(json.dumps(config))), "") == config


def test_markdown_of_ours_becomes_what_it_shows(tmp_path):
    odd = ["a|b\\", "一\n二", "*x* `y` <z> [w] snake_case _u_"]
    blocks = "- one\n- two\n<!-- whose -->\nend\n<!-- whose -->\n![p](no.png)"
    page = Page(from_markdown(f"# T\n\n{markdown_table(['h'] * 3, [odd])}\n\n{blocks}\n", tmp_path))
    assert page.text == "Thhh" + "".join(odd) + "onetwo" + "end" + "no.png：No such file or directory"
    assert [name for name, _ in page.elements if name in ("h3", "td", "li")] == ["h3", *["td"] * 3, *["li"] * 2]


def test_elements_escape_text_and_attributes():
    assert tag("a", "<", tag("b", "&"), None, title='"') == '<a title="&quot;">&lt;<b>&amp;</b></a>'
