"""Commands of the documents: README's run, letter by letter, and of all others every file and every option exists."""

import argparse
import contextlib
import io
import json
import re
from importlib.util import find_spec

import pytest
from chains import OPTIONS, write_corpora
from commands import MARKS, ROOT, STAGE, call, commands, inline, main_of, read, script, words

from common.config import parse_config
from docs.course.pictures import PICTURES
from docs.links import documents

PAGES = [path.relative_to(ROOT).as_posix() for path in documents()]
# programs of others, of which only the name is known here
FOREIGN = set("pip curl cd mkdir npm unzip ruff git docker".split())
FOREIGN |= set("transformers llama-server llama-cli ollama vllm ./run lm_eval".split())
SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
# what is appended to each file of configs/demo: the miniature of tests/chains.py
SMALL = {stage: options | dict(max_steps=2) for stage, options in OPTIONS.items() if stage != "quantize"}
SMALL["grpo"] = {key: value for key, value in SMALL["ppo"].items() if key != "kl_target"} | dict(group_size=4)
SMALL["pretrain"] = {key: value for key, value in SMALL["pretrain"].items() if "." not in key} | dict(model=SHAPE)
SMALL["pretrain"] |= dict(sample_prompts=["酒店", "这本书"])
SMALL["quantize"] = dict(calibration_tokens=256, sample_tokens=8)
SMALL["tokenizer"] = dict(vocab_size=540)
SMALL["data"] = dict(positive="positive.txt", negative="negative.txt", people_daily="paper.txt", val_share=0.2)
SMALL["data"] |= dict(max_seq_len=64, rm_length_bin=8, prompts_train=24, prompts_val=8)


class Known(Exception):
    """The options have been read, and were right."""


def check(command):
    """AssertionError, or the error of the script's own parser, if a file or an option of a command is not there."""
    found = words(command)
    if found[0] == "bash":
        assert (ROOT / found[1]).is_file(), found[1]
        return
    assert found[0] in FOREIGN | {"python", "torchrun"}, found[0]
    if found[0] in FOREIGN:
        return
    path, arguments = script(found)
    if found[1:3] == ["-m", "pip"]:
        return
    assert (ROOT / path).is_file(), path
    stage = STAGE.search((ROOT / path).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        if "--help" in arguments or (path == "runs/datatrove_minhash.py" and not find_spec("datatrove")):
            return  # that package is not among the requirements
        if stage:
            parse_config(stage[1], arguments, "")
        elif path == "docs/course/pictures.py":
            assert set(arguments) <= PICTURES.keys()
        elif arguments:
            parse = argparse.ArgumentParser.parse_args

            def read_only(self, args=None, namespace=None):
                parse(self, args, namespace)
                raise Known

            patch.setattr(argparse.ArgumentParser, "parse_args", read_only)
            with pytest.raises(Known):
                call(main_of(path, patch), path, arguments, patch)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page, monkeypatch):
    monkeypatch.setenv("RECIPE", "general")  # what runs/recipe.sh says to configs/recipes
    monkeypatch.setenv("SIZE", "58m")
    text = read(page)
    for command in [command for command, _ in commands(text)] + inline(text):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {command}: {error}") from error


def test_a_wrong_command_is_found():
    wrong = ["python sft.py --max_step=3", "python no.py", "python benchmarks/gpu.py --fast", "bash runs/no.sh"]
    for command in [*wrong, "python -m common.compare --outs=a b", "python sft.py configs/no.py", "unknown --here"]:
        with pytest.raises((Exception, SystemExit)):
            check(command)


def checkout(folder):
    """Links to all of the project, but for the demo's configs, which are small here; and the corpora that they name."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "out", "data", "configs"):
            (folder / path.name).symlink_to(path)
    (folder / "configs" / "demo").mkdir(parents=True)
    for path in (ROOT / "configs").iterdir():
        if path.name != "demo":
            (folder / "configs" / path.name).symlink_to(path)
    for path in (ROOT / "configs/demo").glob("*.py"):
        changes = dict(SMALL.get(path.stem, {}))
        small = f"\nconfig['model'] = config['model'] | {changes.pop('model')!r}" if "model" in changes else ""
        small = f"{path.read_text(encoding='utf-8')}{small}\nconfig = config | {changes!r}\n"
        (folder / "configs/demo" / path.name).write_text(small, encoding="utf-8")
    write_corpora(folder)


def own_files(folder):
    """What a reader brings: wiki.json, books/, sft.json, pairs.jsonl and tokenizer.model."""
    lines = (folder / "positive.txt").read_text(encoding="utf-8").splitlines()
    long = ["".join(lines[i : i + 8]) for i in range(0, len(lines) - 8)]
    rows = [{"completion": text} for text in long]
    (folder / "wiki.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "books").mkdir()
    (folder / "books/one.txt").write_text("\n".join(reversed(long)), encoding="utf-8")
    rows = [dict(instruction=f"写第{i}条好评。", input="", output=line) for i, line in enumerate(lines)]
    (folder / "sft.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    bad = (folder / "negative.txt").read_text(encoding="utf-8").splitlines()
    rows = [
        dict(prompt=f"写第{i}条评价。", chosen=a, rejected=b) for i, (a, b) in enumerate(zip(lines, bad, strict=False))
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (folder / "tokenizer.model").write_bytes((folder / "out/demo/tokenizer/tokenizer.model").read_bytes())


def test_the_readme_has_every_stage_of_the_demo():
    stages = {f"configs/demo/{path.name}" for path in (ROOT / "configs/demo").glob("[!_]*.py")}
    assert stages == {word for command, _ in commands(read("README.md")) for word in words(command) if word in stages}


@pytest.mark.slow
def test_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # a chat that ends at once
    text = read("README.md")
    for command, comment in commands(text):
        if any(mark in comment for mark in MARKS):
            continue
        if "wiki.json" in command:
            own_files(tmp_path)
        path, arguments = script(words(command))
        call(main_of(path, monkeypatch), path, arguments, monkeypatch)
        said = capsys.readouterr().out
        assert said or path == "eval_generate.py", command
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


FIGURE = re.compile(r"\d\.\d|\d,\d{3}|\d ?[%×]")
SOURCE = re.compile(r"(?:python|bash|torchrun) +(?:-m +)?[\w./]+|https://github.com/")


def without_a_source(text, opening_counts):
    """The sections with figures in a table that name neither the command that printed them nor another project.

    What stands before the first section may name it for all, if opening_counts.
    """
    text = re.sub(r"^ *```.*?^ *```", lambda block: block[0].replace("\n#", "\n"), text, flags=re.M | re.S)
    opening, *sections = re.split(r"^## ", text, flags=re.M)
    if opening_counts and SOURCE.search(opening):
        return []
    rows = [" ".join(line for line in section.splitlines() if line.startswith("|")) for section in sections]
    shown = [section for section, row in zip(sections, rows, strict=True) if FIGURE.search(row)]
    return [section.splitlines()[0] for section in shown if not SOURCE.search(section)]


# the examples of the course are computed by tests of their own
@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/course/")])
def test_figures_have_the_command_that_printed_them(page):
    assert without_a_source(read(page), page.startswith("docs/")) == []


def test_figures_without_a_command_are_found():
    sections = "B\n```bash\n# C\nbash b.sh\n```\n| 1.5 |", "D\n| 2,000 |", "E\n| 3 |"
    page = "\n## ".join(["`python a.py`", *sections])
    assert without_a_source(page, False) == ["D"] and without_a_source(page, True) == []
