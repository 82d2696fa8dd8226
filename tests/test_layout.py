"""The design that no tool checks: which module imports which, what a stage script and a config file look like."""

import ast
import importlib
import io
import re
import tokenize
from dataclasses import fields

import pytest
from chains import ROOT

from model import ModelConfig

# the floors of the house: what stands on one may import from those below it, and from its own folder
BASE = {"model", "head", "generate", "dataset", "tokenizer", "lowbit", "verse", "configs"}
WINGS = {"corpora", "alignment", "interop", "evaluation", "serving"}
STAGES = sorted({path.stem for path in ROOT.glob("*.py")} - BASE)
OURS = BASE | WINGS | {"common"} | set(STAGES)
ALLOWED = {name: {name} for name in BASE} | {"verse": {"verse", "dataset"}}
ALLOWED |= {"model": {"generate", "head"}, "generate": set(), "head": set()}
ALLOWED |= {"common": {"common"} | BASE - {"configs"}}
ALLOWED |= {wing: {wing, "common"} | BASE for wing in WINGS}
ALLOWED |= {stage: WINGS | {"common"} | BASE for stage in STAGES}
# stages that live with what they make or read
SCRIPTS_IN_PACKAGES = {"tokenizer/train.py": {"common"}, "corpora/poems.py": set(), "alignment/ranked.py": set()}
FIRST = {"tokenizer/__init__.py": "common/early.py"}  # as python -m imports it before the script
FILES = [*ROOT.glob("*.py"), *(path for name in OURS for path in (ROOT / name).rglob("*.py"))]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
STAGE_CONFIGS = sorted(path for path in FILES if re.fullmatch(r"configs/(?!__init__|sizes)\w+\.py", path))
DEMO_CONFIGS = sorted(
    path for path in FILES if re.fullmatch(r"configs/(?:demo|poems|recipes)/(?!__init__)\w+\.py", path)
)


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def parse(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def module_of(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """(file of ours, line) of every import in a file, wherever in it that stands."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {(MODULES.get(name) or MODULES.get(node.module), node.lineno) for name in names}
        elif isinstance(node, ast.Import):
            yield from ((MODULES.get(alias.name), node.lineno) for alias in node.names)


IMPORTS = {path: [(other, line) for other, line in imports(path) if other] for path in FILES}


def top(path):
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path):
    allowed = ALLOWED[top(path)] | SCRIPTS_IN_PACKAGES.get(path, set())
    wrong = [(other, line) for other, line in IMPORTS[path] if top(other) not in allowed and other != FIRST.get(path)]
    assert [f"{path}:{line} imports {other}" for other, line in wrong] == []


def reached_from(path):
    """Every file that an import of this one brings, itself among them."""
    reached, waiting = {path}, [path]
    while waiting:
        new = {other for other, _ in IMPORTS[waiting.pop()]} - reached
        reached |= new
        waiting += new
    return reached


@pytest.mark.parametrize("path", FILES)
def test_no_import_comes_round(path):
    assert [other for other, _ in IMPORTS[path] if path in reached_from(other)] == []


def test_the_root_holds_the_model_and_stages():
    assert {path.stem for path in ROOT.glob("*.py")} - set(STAGES) == {"model", "head", "generate"}


def test_common_never_trains():
    calls = [
        f"{path}:{node.lineno}"
        for path in FILES
        if path.startswith("common/")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "backward"
    ]
    assert not calls


@pytest.mark.parametrize("stage", STAGES)
def test_stage_script_says_how_to_run_it_and_runs(stage):
    tree = parse(f"{stage}.py")
    assert re.search(rf"^    .*\b{stage}\.py\b", ast.get_docstring(tree) or "", re.MULTILINE), (
        "no command in its docstring"
    )
    main = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(main) == 1 and ast.unparse(main[0].args).startswith("argv")
    assert is_main_guard(tree.body[-1]) and ast.unparse(tree.body[-1].body) == "run(main)"


@pytest.mark.parametrize("path", [f"{stage}.py" for stage in STAGES] + list(SCRIPTS_IN_PACKAGES))
def test_script_has_its_config_file(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    names = [node.args[0].value for node in calls if ast.unparse(node.func).endswith("parse_config")]
    assert names and all(f"configs/{name}.py" in STAGE_CONFIGS for name in names)


def leaves(call, prefix=""):
    """(dotted name, value node) of every key of dict(...), those of a dict(...) within it too."""
    assert isinstance(call, ast.Call) and ast.unparse(call.func) == "dict" and not call.args
    for keyword in call.keywords:
        name = f"{prefix}{keyword.arg}"
        if isinstance(keyword.value, ast.Call):
            yield from leaves(keyword.value, name + ".")
        else:
            yield name, keyword.value


@pytest.mark.parametrize("path", STAGE_CONFIGS)
def test_config_is_literals_with_a_comment_a_key(path):
    (assignment,) = [node for node in parse(path).body if not isinstance(node, ast.Expr)]
    assert ast.unparse(assignment.targets) == "config"
    tokens = tokenize.generate_tokens(io.StringIO((ROOT / path).read_text(encoding="utf-8")).readline)
    comments = {token.start[0]: token.string.strip("# ") for token in tokens if token.type == tokenize.COMMENT}
    keys = dict(leaves(assignment.value))
    for value in keys.values():
        ast.literal_eval(value)
    assert [name for name, value in keys.items() if not comments.get(value.end_lineno)] == []
    lines = [value.end_lineno for value in keys.values()]
    assert len(lines) == len(set(lines)), "two keys on one line"


def stage_of(path):
    """The script that a file of defaults in configs/ is for."""
    name = path.split("/")[-1]
    scripts = {
        "tokenizer.py": "tokenizer/train.py",
        "poem_data.py": "corpora/poems.py",
        "ranked.py": "alignment/ranked.py",
    }
    return scripts.get(name, name)


def keys_read(path):
    """Every text in a file that may be a key it reads: "key" as in config["key"], or one of "several keys".split()."""
    nodes = list(ast.walk(parse(path)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    lists = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr == "split"]
    lists = [node.value.split() for node in lists if isinstance(node, ast.Constant)]
    return {text for text in texts if text.isidentifier()}.union(*lists)


@pytest.mark.parametrize("path", STAGE_CONFIGS)
def test_every_config_key_is_read(path):
    (assignment,) = [node for node in parse(path).body if not isinstance(node, ast.Expr)]
    leaves_of = {name.split(".")[-1] for name, _ in leaves(assignment.value) if not name.startswith("model.")}
    read = set().union(*map(keys_read, reached_from(stage_of(path)) - set(STAGE_CONFIGS)))
    assert sorted(leaves_of - read) == []
    model = {name.split(".")[-1] for name, _ in leaves(assignment.value) if name.startswith("model.")}
    assert model <= {field.name for field in fields(ModelConfig)}


# what documents, comments and docstrings name: files of ours by their path or, where that is clear, by name
NAMED = re.compile(r"(?<![\w./*<>$-])(?:[\w-]+/)*[\w-]+\.(?:py|sh|md)\b", re.ASCII)
MODULE = re.compile(r"python3? -m ([\w.]+)")
FOREIGN = {"tokenizer.py", "grpo_trainer.py", "rloo_trainer.py", "gguf.md", "docs/gguf.md"}  # llama2.c's, TRL's, ggml's
# made by the scripts or by the reader
MADE = ("out/", "data/", "README.md", "report.md", "compare.md", "quantize.md", "samples.md", "config.py")
TRACKED = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.*") if ".venv" not in path.parts]
TEXTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("docs/**/*.py"),
    *ROOT.glob("runs/*"),
    *ROOT.glob("requirements*.txt"),
]
TEXTS += [ROOT / path for path in FILES] + [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/**/*.py")]


def prose(path):
    """A file's text; of Python its comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    return "\n".join(comments + docs)


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in TEXTS])
def test_paths_that_are_named_exist(path):
    text = prose(ROOT / path)
    named = {name for name in NAMED.findall(text) if name not in FOREIGN and not name.startswith(MADE)}
    there = {name for file in TRACKED for name in (file, file.split("/")[-1], file.split("/", 1)[-1])}
    assert sorted(named - there) == []
    modules = {name for name in MODULE.findall(text) if top(name.replace(".", "/")) in OURS}
    assert sorted(modules - MODULES.keys()) == []


@pytest.mark.parametrize("path", DEMO_CONFIGS)
def test_demo_config_invents_no_keys(path):
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert module.config.keys() == module.base.keys()
    for key, value in module.base.items():
        if isinstance(value, dict):
            assert module.config[key].keys() == value.keys(), key
