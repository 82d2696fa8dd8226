"""The design that no tool checks: which module imports which, what a stage script and a config file look like."""

import ast
import importlib
import io
import re
import tokenize

import pytest
from chains import ROOT

BASE = {
    "model",
    "generate",
    "dataset",
    "tokenizer",
    "lowbit",
    "configs",
}  # what everything may lean on, and they on nothing
WINGS = {"corpora", "alignment", "interop"}
STAGES = sorted({path.stem for path in ROOT.glob("*.py")} - BASE)
OURS = BASE | WINGS | {"common"} | set(STAGES)
ALLOWED = {name: {name} for name in BASE}  # top-level names that the modules of each top-level name may import
ALLOWED["generate"] = {"model"}
ALLOWED |= {"common": {"common"} | BASE - {"configs"}}
ALLOWED |= {wing: {wing, "common"} | BASE for wing in WINGS}
ALLOWED |= {stage: WINGS | {"common"} | BASE for stage in STAGES}
SCRIPTS_IN_PACKAGES = {"tokenizer/train.py": {"common"}}  # what these may import when run, not when imported
FILES = [*ROOT.glob("*.py"), *(path for name in OURS for path in (ROOT / name).rglob("*.py"))]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
STAGE_CONFIGS = sorted(path for path in FILES if re.fullmatch(r"configs/(?!__init__|sizes)\w+\.py", path))
DEMO_CONFIGS = sorted(path for path in FILES if re.fullmatch(r"configs/demo/(?!__init__)\w+\.py", path))


def parse(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(path, node, when_run=False):
    """(our top module, line, whether it happens only when the file is run) of every import below node."""
    if isinstance(node, ast.ImportFrom) and node.level:
        modules = [path.split("/")[0]]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module]
    elif isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        modules = []
    for module in modules:
        if module.split(".")[0] in OURS:
            yield module.split(".")[0], node.lineno, when_run
    when_run = when_run or is_main_guard(node) or isinstance(node, ast.FunctionDef)
    for child in ast.iter_child_nodes(node):
        yield from imports(path, child, when_run)


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path):
    top = path.split("/")[0].removesuffix(".py")
    wrong = []
    for module, line, when_run in imports(path, parse(path)):
        allowed = ALLOWED[top] | (SCRIPTS_IN_PACKAGES.get(path, set()) if when_run else set())
        if module not in allowed:
            wrong.append(f"{path}:{line} imports {module}")
    assert not wrong


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


@pytest.mark.parametrize("path", DEMO_CONFIGS)
def test_demo_config_invents_no_keys(path):
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert module.config.keys() == module.base.keys()
    for key, value in module.base.items():
        if isinstance(value, dict):
            assert module.config[key].keys() == value.keys(), key
