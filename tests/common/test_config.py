"""Layers, types and messages of common/config.py on throw-away config packages; files that common/files.py writes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from chains import ROOT

from common.config import ConfigError, UserError, parse_config, run
from common.files import save_config, write_file

DEFAULTS = """
config = dict(
    out="out/demo",  # where the run is written
    init_from=None,  # another run's directory
    max_steps=100,  # optimizer steps
    learning_rate=3e-4,  # peak; cosine to a tenth
    compile="auto",  # torch.compile
    resume=True,  # continue
    betas=[0.9, 0.95],  # Adam
    tasks=["ceval", "cmmlu"],  # benchmarks
    windows=(1, 2),  # tokens
    extra=[],  # file names
    model=dict(  # the shape
        dim=64,  # width
        dropout=0.0,  # share of activations
    ),
)
"""


@pytest.fixture
def configs(tmp_path, request):
    """A config package whose name is unique to the test, so that Python's module cache cannot mix two."""
    package = tmp_path / f"conf_{abs(hash(request.node.nodeid))}"
    package.mkdir()
    (package / "sft.py").write_text(DEFAULTS, encoding="utf-8")
    return package


def parse(configs, *argv, doc="Doc."):
    return parse_config("sft", list(argv), doc, configs)


def error(configs, *argv):
    with pytest.raises(ConfigError) as caught:
        parse(configs, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_alone_print_nothing(configs, capsys):
    config = parse(configs)
    assert config["model"] == {"dim": 64, "dropout": 0.0}
    assert config["windows"] == (1, 2)
    assert capsys.readouterr().out == ""


def test_layers_and_printed_differences(configs, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        f"from {configs.name}.sft import config as base\n"
        "config = base | dict(max_steps=20, learning_rate=1, model=dict(dim=128))\n"
    )
    config = parse(configs, str(file), "--max_steps=30", "--model.dropout=0.1")
    assert config["max_steps"] == 30  # the command line is above the file
    assert config["learning_rate"] == 1.0 and type(config["learning_rate"]) is float
    assert config["model"] == {"dim": 128, "dropout": 0.1}
    assert capsys.readouterr().out.splitlines() == [
        "max_steps = 30 (default 100)",
        "learning_rate = 1.0 (default 0.0003)",
        "model.dim = 128 (default 64)",
        "model.dropout = 0.1 (default 0.0)",
    ]


def test_differences_can_go_to_standard_error(configs, capsys):
    parse_config("sft", ["--max_steps=30"], "Doc.", configs, file=sys.stderr)
    assert capsys.readouterr() == ("", "max_steps = 30 (default 100)\n")


def test_options_may_come_before_the_file(configs, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("config = dict(max_steps=20)\n")
    assert parse(configs, "--max_steps=30", str(file))["max_steps"] == 30


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("--compile", "compile", True),
        ("--compile=true", "compile", True),
        ("--resume=False", "resume", False),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-5", "learning_rate", 1e-5),
        ("--compile=FALSE", "compile", False),
        ("--compile=auto", "compile", "auto"),
        ("--windows=-1,2", "windows", (-1, 2)),
        ("--init_from=out/a=b", "init_from", "out/a=b"),  # split on the first `=` only
        ("--init_from=none", "init_from", None),
        ("--out=none", "out", "none"),
        ("--out=数据", "out", "数据"),
        ("--betas=0.9,1", "betas", [0.9, 1.0]),
        ("--betas=[0.9, 0.99]", "betas", [0.9, 0.99]),
        ("--tasks=ceval", "tasks", ["ceval"]),
        ("--tasks=a, b", "tasks", ["a", "b"]),
        ("--tasks=", "tasks", []),
        ("--tasks=['a,b']", "tasks", ["a,b"]),
        ("--windows=3,4,5", "windows", (3, 4, 5)),
        ("--extra=x,y", "extra", ["x", "y"]),
    ],
)
def test_command_line_values(configs, option, key, value):
    parsed = parse(configs, option)[key]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--lerning_rate=1", ["--lerning_rate=1", "unknown key", "nearest is learning_rate"]),
        ("--dim=1", ["nearest is model.dim"]),
        ("--modl.dim=1", ["nearest is model.dim"]),
        ("--model.dims=1", ["nearest is model.dim"]),
        ("--model=1", ["unknown key model", "model.d"]),
        ("--max_steps.x=1", ["nearest is max_steps"]),
        ("--max_steps=٣", ["max_steps must be a whole number", "'٣'"]),
        ("--learning_rate=１", ["learning_rate must be a number", "'１'"]),
        ("--windows=1,２", ["each element a whole number"]),
        ("--max_steps=1.5", ["--max_steps=1.5", "max_steps must be a whole number", "'1.5'"]),
        ("--max_steps=true", ["a whole number"]),
        ("--max_steps=", ["a whole number"]),
        ("--learning_rate=fast", ["learning_rate must be a number", "'fast'"]),
        ("--learning_rate=nan", ["a number", "nan"]),
        ("--resume=1", ["resume must be true or false", "'1'"]),
        ("--compile=1", ["compile=1: auto, true or false is needed"]),
        ("--learning_rate=inf", ["learning_rate=inf: more than 0 and at most 10 is needed"]),
        ("--max_steps", ["needs a value", "--max_steps=VALUE"]),
        ("--betas=0.9,x", ["a list, each element a number"]),
        ("--betas=[0.9,", ["a list"]),
        ("--windows=[1.5]", ["each element a whole number"]),
        ("-max_steps=3", ["--key=value"]),
        ("3", ["3", ".py", "--key=value"]),
    ],
)
def test_bad_options_name_key_and_value(configs, option, parts):
    message = error(configs, option)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("source", "line", "parts"),
    [
        ("config = dict(\n    max_step=3,\n)", 2, ["unknown key max_step = 3", "nearest is max_steps"]),
        (
            'config = dict(\n    out="a",\n    max_steps="3",\n)',
            3,
            ["max_steps must be a whole number", "'3'"],
        ),
        ("config = dict(model=dict(\n    dim=True))", 2, ["model.dim must be a whole number, not True"]),
        (
            'config = {\n    "model": {\n        "dmi": 1}}',
            3,
            ["unknown key model.dmi", "nearest is model.dim"],
        ),
        ("config = dict(out=None)", 1, ["out must be text, not None"]),
        ("config = dict(init_from=3)", 1, ["init_from must be text or none, not 3"]),
        ("config = dict(betas=0.9)", 1, ["betas must be a list, not 0.9"]),
        ("config = dict(extra=[[]])", 1, ["extra must be a list of text or numbers, not [[]]"]),
        ("config = dict(model=3)", 1, ["unknown key model = 3"]),
        ("x = 1\nconfig = dict(out=y)", 2, ["NameError"]),
        ("x = 1\nconfig = dict(", 2, ["SyntaxError"]),
        ("config = 3", None, ["defines no dict named config"]),
        ("config = dict()\nraise SystemExit", 2, [":2: SystemExit"]),
        ("class Odd(BaseException):\n    __str__ = 3\nraise Odd", 3, ["Odd: its text cannot be made, TypeError"]),
        ("config = {}\nconfig['model'] = config", None, ["config holds itself"]),
        ("class Odd:\n    __repr__ = 3\nconfig = dict(out=Odd())", 3, ["out: TypeError: 'int' object is not callable"]),
    ],
)
def test_bad_files_name_file_line_and_key(configs, tmp_path, source, line, parts):
    file = tmp_path / "mine.py"
    file.write_text(source + "\n")
    message = error(configs, str(file))
    assert message.startswith(f"{file}:{line}:" if line else f"{file}: "), message
    assert all(part in message for part in parts), message


def test_a_file_in_another_encoding_names_its_line(configs, tmp_path):
    file = tmp_path / "mine.py"
    file.write_bytes("# -*- coding: gbk -*-\n# 步数\nconfig = dict(max_step=3)\n".encode("gbk"))
    assert error(configs, str(file)) == f"{file}:3: unknown key max_step = 3, the nearest is max_steps"


def test_missing_or_second_file(configs, tmp_path):
    assert "nowhere.py: no such config file" in error(configs, "nowhere.py")
    assert "at most one config file" in error(configs, "a.py", "b.py")
    with pytest.raises(ConfigError, match=r"other.py: no such config file"):
        parse_config("other", [], "", configs)


def test_help_shows_every_key_comment_and_default(configs, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(configs, "--help", doc="What it does,\nin two lines.\n\nDetails.")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("What it does,\nin two lines.\n")
    assert "Details" not in out
    shown = dict(line.strip().split("  ", 1) for line in out.splitlines() if line.startswith("  --"))
    assert {option: comment.strip() for option, comment in shown.items()} == {
        "--out=out/demo": "where the run is written",
        "--init_from=none": "another run's directory",
        "--max_steps=100": "optimizer steps",
        "--learning_rate=0.0003": "peak; cosine to a tenth",
        "--compile=auto": "torch.compile",
        "--resume=true": "continue",
        "--betas=0.9,0.95": "Adam",
        "--tasks=ceval,cmmlu": "benchmarks",
        "--windows=1,2": "tokens",
        "--extra=": "file names",
        "--model.dim=64": "width",
        "--model.dropout=0.0": "share of activations",
    }


def test_help_values_are_accepted_back(configs, capsys):
    with pytest.raises(SystemExit):
        parse(configs, "-h")
    options = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert parse(configs, *options) == parse(configs)
    assert capsys.readouterr().out == ""
    # Lists that commas alone cannot carry are shown as Python literals.
    for tasks in (["a, b", "c"], [""], ["", "c"], [" a"], ["[a", "b"], ["a"]):
        (configs / "sft.py").write_text(DEFAULTS.replace('["ceval", "cmmlu"]', repr(tasks)), encoding="utf-8")
        with pytest.raises(SystemExit):
            parse(configs, "-h")
        shown = re.search(r"  (--tasks=.*?) *  benchmarks", capsys.readouterr().out)[1]
        assert parse(configs, shown)["tasks"] == tasks


def test_help_follows_derived_defaults(configs, capsys):
    (configs / "dpo.py").write_text(
        f"from {configs.name}.sft import config as base\n"
        "config = base | dict(\n    max_steps=5,\n    out='out/dpo',  # preference run\n)\n"
    )
    with pytest.raises(SystemExit):
        parse_config("dpo", ["--help"], "DPO.", configs)
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "--max_steps=5 optimizer steps" in lines  # overridden without a comment: the base's is kept
    assert "--out=out/dpo preference run" in lines
    assert "--model.dim=64 width" in lines


def test_parsing_twice_shares_nothing(configs):
    parse(configs)["model"]["dim"] = 1
    assert parse(configs)["model"]["dim"] == 64


def test_only_the_first_process_prints(configs, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert parse(configs, "--max_steps=3")["max_steps"] == 3
    assert capsys.readouterr().out == ""


def test_save_config_round_trips_and_leaves_no_temporary_file(tmp_path):
    config = {"out": "数据", "lr": 3e-4, "model": {"dim": 64}, "init_from": None}
    save_config(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8")) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_write_file_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(TypeError):
        write_file(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_would_steer_a_terminal_is_escaped(configs, capsys):
    parse(configs, "--out=a\x1b[31m\nb\x9b\udcff")
    assert capsys.readouterr().out == "out = a\\x1b[31m\\nb\\x9b\\udcff (default out/demo)\n"
    with pytest.raises(SystemExit):
        run(lambda: parse(configs, "--max_steps=\x1b[2J"))
    assert "\\x1b[2J" in (err := capsys.readouterr().err) and "\x1b" not in err


def test_what_is_very_long_is_not_shown_whole(configs, capsys):
    long = "一" * 100_000
    parse(configs, f"--out={long}")
    assert len(capsys.readouterr().out) < 500
    for option in (f"--max_steps={long}", f"--{long}=1", long, f"--{long}", f"--max_steps={'9' * 4000}"):
        with pytest.raises(SystemExit):
            run(lambda option=option: parse(configs, option))
        assert len(line := capsys.readouterr().err) < 1200 and " ... " in line
    with pytest.raises(SystemExit):
        run(raising(UserError(f"{long}: not there")))
    assert len(line := capsys.readouterr().err) < 1200 and line.endswith(": not there\n")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (ConfigError("a.py:3: unknown key"), "error: a.py:3: unknown key"),
        (UserError("first\nsecond"), "error: first second"),
        (
            FileNotFoundError(2, "No such file or directory", "x.bin"),
            "error: No such file or directory: x.bin",
        ),
        (PermissionError("no way"), "error: no way"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (
            MemoryError("7 PiB"),
            "error: out of memory: fewer rows at once, such as batch_size, or a smaller model need less: 7 PiB",
        ),
    ],
)
def test_run_ends_bad_input_in_one_line(capsys, failure, line):
    with pytest.raises(SystemExit) as caught:
        run(raising(failure))
    assert caught.value.code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(("module", "name"), [("dataset.formats", "DataError"), ("tokenizer", "TokenizerError")])
def test_run_knows_the_errors_of_the_lower_modules(capsys, module, name):
    kind = getattr(pytest.importorskip(module), name)
    with pytest.raises(SystemExit) as caught:
        run(raising(kind("half a file")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: half a file\n"


def test_the_key_of_a_missing_file_is_named(tmp_path, capsys):
    gone, there = tmp_path / "gone", tmp_path / "there"
    there.mkdir()
    parse_config("sft", [f"--init_from={gone}", f"--data={there}"], "")
    capsys.readouterr()
    for message, line in (
        (f"no checkpoint at {gone}", f"init_from: no checkpoint at {gone}"),
        (f"init_from={gone}: none", f"init_from={gone}: none"),
        (f"{gone}-2/ckpt.pt is damaged", f"{gone}-2/ckpt.pt is damaged"),  # another
        (f"{there}/sft.pkl not found", f"{there}/sft.pkl not found"),  # the folder is there
    ):
        with pytest.raises(SystemExit):
            run(raising(UserError(message)))
        assert capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(SystemExit):
        run((there / "meta.json").read_text)
    assert capsys.readouterr().err == f"error: data: No such file or directory: {there / 'meta.json'}\n"


def test_run_knows_when_memory_is_out(capsys):
    gpu = raising(torch.OutOfMemoryError("CUDA\nGPU"))
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**15), gpu):
        with pytest.raises(SystemExit):
            run(allocate)
        line = capsys.readouterr().err
        assert line.startswith("error: out of memory: fewer rows at once") and line.count("\n") == 1


def test_run_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(OSError, match="reset"):
        run(raising(OSError(104, "Connection reset by peer")))


def test_run_ends_interruption_with_130(capsys):
    with pytest.raises(SystemExit) as caught:
        run(raising(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("n", [1, 100_000], ids=["at the end", "in the midst"])
def test_a_reader_that_leaves_is_one_line(tmp_path, n):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.config import run; "
    code += f"run(lambda: [sys.stdin.read(), *(print('x' * 80) for _ in range({n}))])"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "error: nobody reads the output any more\n")


def test_script_exit_code_and_streams(configs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from common.config import parse_config, run\n"
        f"run(lambda: parse_config('sft', None, 'Doc.', Path({str(configs)!r})))\n"
    )
    command = [sys.executable, str(script)]
    bad = subprocess.run([*command, "--max_stepz=3"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: --max_stepz=3: unknown key max_stepz = 3, the nearest is max_steps\n"
    good = subprocess.run([*command, "--max_steps=3"], capture_output=True, text=True, cwd=tmp_path)
    assert (good.returncode, good.stdout, good.stderr) == (0, "max_steps = 3 (default 100)\n", "")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("compile=True", None),
        ("compile='auto'", None),
        ("compile=1", "compile=1: auto, true or false is needed"),
        ("out='a\\0b'", "text without NUL and halves of surrogate pairs is needed"),
        ("out='a\\ud800'", "text without NUL and halves of surrogate pairs is needed"),
        ("tasks=['a', 'a\\0b']", "text without NUL and halves of surrogate pairs is needed"),
        ("max_steps=-1", "max_steps=-1: at least 0 is needed"),
        ("learning_rate=10**400", "mine.py:1: learning_rate must be a number, not 1000"),
    ],
)
def test_values_of_a_file_are_held_to_their_ranges(configs, tmp_path, source, line):
    file = tmp_path / "mine.py"
    file.write_text(f"config = dict({source})\n")
    if line is None:
        assert parse(configs, str(file))["compile"] in (True, "auto")
    else:
        assert line in error(configs, str(file))
    (configs / "sft.py").write_text(DEFAULTS.replace("max_steps=100", "max_steps=-1"), encoding="utf-8")
    assert error(configs) == "max_steps=-1: at least 0 is needed"  # where the defaults themselves were edited


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
@pytest.mark.parametrize("value", ["1", "'x'", "中"])
def test_a_file_that_is_not_utf_8_is_refused(configs, tmp_path, encoding, value):
    file = tmp_path / "mine.py"
    file.write_bytes(f"# 注释\nconfig = dict(max_steps={value})  # 步数\n".encode(encoding))
    assert error(configs, str(file)).startswith(f"{file}: not the text of a Python file, save it as UTF-8: SyntaxError")


@pytest.mark.parametrize("dash", ["—", "——", "–"])
def test_a_dash_of_an_input_method_is_told(configs, dash):
    assert error(configs, f"{dash}max_steps=3") == f"{dash}max_steps=3: options begin with two hyphens: --max_steps=3"


def test_no_key_is_named_where_none_is_like_it(configs):
    assert error(configs, "--zq=3") == "--zq=3: unknown key zq = 3, and none is like it: --help lists them"


def test_a_key_is_not_shown(capsys):
    assert parse_config("web_demo", ["--api_key=hidden"], "")["api_key"] == "hidden"
    assert capsys.readouterr().out == "api_key = *** (default none)\n"
