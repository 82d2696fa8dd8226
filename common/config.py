"""Stage configs (configs/<stage>.py, then a file, then --key=value), and how a script ends on bad input."""

import ast
import difflib
import errno
import io
import os
import re
import runpy
import signal
import sys
import tokenize
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from common import early
from common.ranges import CHOICES, INPUTS, contradiction, fault
from dataset.formats import DataError, escaped, shortened
from tokenizer import TokenizerError

# a disk that is full, read-only, gone or failing, and names that none has; Windows lacks some
NAMES = "ENOSPC EDQUOT EFBIG EROFS EIO ENODEV ENXIO ESTALE ENOTCONN ETIMEDOUT ENAMETOOLONG ELOOP".split()
DISK_ERRORS = {getattr(errno, name) for name in NAMES if hasattr(errno, name)}
DASHES = "—–―－−"  # what an input method makes of two hyphens
SECRET = ("api_key",)  # keys whose values are not shown
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ending = ExitStack()  # what is to be done when a script ends, in whatever way
_read_by: dict[str, str] = {}  # {name of a file or folder: key} of the config that was parsed last


class UserError(Exception):
    """A mistake or a state the user can act on: shown as one line, without a traceback."""


class ConfigError(UserError):
    """An unknown key, a value of the wrong type or out of its range, or an unreadable config file."""


def parse_config(
    stage: str, argv: list[str] | None, doc: str, configs_dir: Path = CONFIGS, file: TextIO | None = None
) -> dict:
    """configs/<stage>.py <- [config.py] <- [--key=value ...]; prints what differs from the defaults to `file`."""
    argv = sys.argv[1:] if argv is None else argv
    _read_by.clear()
    defaults_path = configs_dir / f"{stage}.py"
    defaults = _load(defaults_path, configs_dir)
    if "--help" in argv or "-h" in argv:
        print(_help(doc, defaults, _describe(defaults_path, configs_dir)))
        raise SystemExit(0)

    config = dict(defaults)
    files = [arg for arg in argv if not arg.startswith("-")]
    if dashed := [arg for arg in files if arg[0] in DASHES]:
        raise ConfigError(f"{shortened(dashed[0])}: options begin with two hyphens: --{dashed[0].lstrip(DASHES)}")
    if len(files) > 1:
        raise ConfigError(f"at most one config file, got {' '.join(files)} (options are written --key=value)")
    for path in files:
        config |= _read_file(Path(path), defaults, configs_dir)
    for option in argv:
        if option.startswith("-"):
            config |= _read_option(option, defaults)
    for key, value in config.items():
        if needed := fault(stage, key, value):
            raise ConfigError(escaped(f"{key}={shortened(_text(value))}: {needed}"))
    if line := contradiction(config):
        raise ConfigError(line)

    if os.environ.get("RANK", "0") == "0":  # torchrun starts this once per process
        for key, value in config.items():
            if value != defaults[key]:
                shown = "***" if key in SECRET else shortened(_text(value))
                print(escaped(f"{key} = {shown} (default {_text(defaults[key])})"), file=file)
    for key in filter(INPUTS.__contains__, config):
        for value in config[key] if isinstance(config[key], list | tuple) else [config[key]]:
            _read_by.setdefault(str(value or "").rpartition("=")[2], key)
    return _unflatten(config)


def run(main: Callable[[], Any]) -> None:
    """Call main(); bad input ends as one line on stderr and exit code 2, Ctrl-C as one line and 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be UTF-8
    if signal.getsignal(signal.SIGINT) is early.leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ending:
            main()
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            print("error: nobody reads the output any more", file=sys.stderr)
            sys.exit(141)  # a shell's number for it
        if not _is_users(error):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.strerror}: {error.filename}"
        if _is_out_of_memory(error):
            message = f"out of memory: fewer rows at once, such as batch_size, or a smaller model need less: {message}"
        message = _missing_key(message, error) + message
        print(f"error: {escaped(shortened(' '.join(message.splitlines()), 1000))}", file=sys.stderr)
        sys.exit(2)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed, as by `| head`; then what is printed goes nowhere."""
    try:
        print(flush=True)  # what was not written the first time is not tried again
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at the end fails again
        return True


def _missing_key(message: str, error: Exception) -> str:
    """`init_from: ` for a message about a file that is not there, which this key or its folder names; else nothing."""
    for name, key in _read_by.items():
        about = name and re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w-])", message)
        gone = isinstance(error, FileNotFoundError) or not os.path.lexists(name)
        if about and gone and f"{key}=" not in message and not message.startswith(key):
            return f"{key}: "
    return ""


def _is_users(error: Exception) -> bool:
    """Whether the user can act on this error; anything else is a bug and deserves its traceback."""
    kinds = (UserError, DataError, TokenizerError, FileNotFoundError, PermissionError)
    kinds += (IsADirectoryError, NotADirectoryError, FloatingPointError)  # the last of model.generate
    on_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return isinstance(error, kinds) or on_disk or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and NumPy's MemoryError, torch's OutOfMemoryError of a GPU and its RuntimeError of a CPU."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return torchs or isinstance(error, MemoryError)


def _read_file(path: Path, defaults: dict, configs_dir: Path) -> dict:
    """Flat values of a config file, each key known and of its default's type."""
    if path.suffix != ".py":
        raise ConfigError(f"{path}: a config file ends in .py, and options are written --key=value")
    values = _load(path, configs_dir)
    for key, value in values.items():
        try:
            values[key] = _checked(key, value, defaults)
        except Exception as error:  # of an object's own comparison or text too
            error = error if isinstance(error, ConfigError) else f"{key}: {said(error)}"
            file, line, _ = _describe(path, configs_dir).get(key, (path, None, ""))
            raise ConfigError(f"{file}:{line}: {error}" if line else f"{file}: {error}") from None
    return values


def _read_option(option: str, defaults: dict) -> dict:
    """{key: value} of one --key=value; a bare --key is true."""
    if not option.startswith("--"):
        raise ConfigError(f"{shortened(option)}: options are written --key=value")
    key, equals, text = option[2:].partition("=")
    default = defaults.get(key)
    switch = isinstance(default, bool) or True in CHOICES.get(key, ())
    if not equals and key in defaults and not switch:
        raise ConfigError(f"{option}: needs a value, written {option}=VALUE (default {_text(default)})")
    try:
        return {key: _checked(key, _parse(text, True if switch else default) if equals else True, defaults)}
    except ConfigError as error:
        raise ConfigError(f"{shortened(option)}: {error}") from None


def _checked(key: str, value: Any, defaults: dict) -> Any:
    """The value in its default's type, or ConfigError naming the key."""
    if key not in defaults:
        like = _nearest(key, defaults)
        which = f"the nearest is {like}" if like else "and none is like it: --help lists them"
        raise ConfigError(f"unknown key {shortened(key)} = {shortened(_text(value))}, {which}")
    if value in CHOICES.get(key, ()):  # of which not all need be of one type
        return value
    try:
        return _typed(value, defaults[key])
    except TypeError as error:
        raise ConfigError(f"{key} must be {error}, not {shortened(repr(value))}") from None


def _nearest(key: str, defaults: dict) -> str | None:
    """The known key most like this one, if one is; `dim` means model.dim, `modl.dim` too."""
    same_leaf = [known for known in defaults if known.split(".")[-1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, same_leaf or list(defaults), n=1, cutoff=0.0 if same_leaf else 0.6)
    return close[0] if close else None


def _parse(text: str, default: Any) -> Any:
    """Command-line text as a value of the default's type; else it stays text, for _typed to refuse."""
    if default is None:
        return None if text.lower() == "none" else text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if isinstance(default, int | float):
            return type(default)(text.encode("ascii"))  # of text, int and float take the digits of every script
        if isinstance(default, list | tuple):
            if text.startswith(("[", "(")):
                return ast.literal_eval(text)
            element = default[0] if default else ""
            return [_parse(part.strip(), element) for part in text.split(",")] if text else []
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last three of literal_eval
        pass
    return text


def _typed(value: Any, default: Any) -> Any:
    """The value if it has the default's type (an int may be a float), else TypeError: what was expected."""
    if default is None:
        if value is not None and not isinstance(value, str):
            raise TypeError("text or none")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError("true or false")
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise TypeError("a number")
        try:
            return float(value)
        except OverflowError:  # of a whole number
            raise TypeError("a number") from None
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError("a whole number")
    elif isinstance(default, list | tuple):
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        if len({type(element) for element in default}) == 1:
            try:
                value = [_typed(element, default[0]) for element in value]
            except TypeError as error:
                raise TypeError(f"a list, each element {error}") from None
        elif not default and not all(isinstance(element, str | int | float) for element in value):
            raise TypeError("a list of text or numbers")
        return type(default)(value)
    elif not isinstance(value, type(default)):
        raise TypeError("text" if isinstance(default, str) else f"a {type(default).__name__}")
    return value


def _text(value: Any) -> str:
    """The value as one would write it after --key=."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        parts = [str(element) for element in value]
        text = ",".join(parts)
        splits_back = text[:1] not in ("[", "(") and [part.strip() for part in text.split(",")] == parts
        return text if (splits_back and text) or not value else str(list(value))
    return str(value)


def flatten(config: dict, prefix: str = "") -> dict:
    """{"model": {"dim": 64}} -> {"model.dim": 64}"""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def options_of(stage: str, config: dict, configs_dir: Path = CONFIGS) -> list[str]:
    """The --key=value in which a resolved config differs from the defaults of its stage."""
    defaults = _load(configs_dir / f"{stage}.py", configs_dir)
    said = {key: _text(value) for key, value in flatten(config).items() if key in defaults and key not in SECRET}
    return [f"--{key}={value}" for key, value in said.items() if value != _text(defaults[key])]


def _unflatten(flat: dict) -> dict:
    """{"model.dim": 64} -> {"model": {"dim": 64}}"""
    config = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        inner = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return config


def _load(path: Path, configs_dir: Path) -> dict:
    """Run a config file and return its `config` dict, flat."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    _source(path)
    root = str(configs_dir.parent)  # `from configs.sft import config as base` works from any directory
    sys.path.insert(0, root)
    try:
        config = runpy.run_path(str(path)).get("config")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script must not end in silence, as if all were done
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise ConfigError(f"{path}:{line}: {said(error)}") from error
    finally:
        sys.path.remove(root)
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: defines no dict named config")
    try:
        return flatten(config)
    except RecursionError:
        raise ConfigError(f"{path}: config holds itself, or is nested without end") from None


def said(error: BaseException) -> str:
    """`KeyError: 'x'`: what a user's code raised, also where its own text cannot be made."""
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException as another:
        message = f"its text cannot be made, {type(another).__name__}"
    return f"{type(error).__name__}{': ' * bool(message)}{message}"


def _source(path: Path) -> str:
    """The text of a config file, in the encoding that it says it has; Python itself lets other bytes be in comments."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeError) as error:
        raise ConfigError(f"{path}: not the text of a Python file, save it as UTF-8: {said(error)}") from None


def _describe(path: Path, configs_dir: Path, name: str = "config") -> dict[str, tuple[Path, int, str]]:
    """{dotted key: (file, line, comment at line's end)}, following `from configs.x import config as base`."""
    source = _source(path)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    names: dict[str, dict] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{configs_dir.name}."):
            module = configs_dir.parent.joinpath(*node.module.split(".")).with_suffix(".py")
            for alias in node.names if module.is_file() else []:
                names[alias.asname or alias.name] = _describe(module, configs_dir, alias.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = _entries(node.value, names, path, comments)
    return names.get(name, {})


def _entries(node: ast.expr, names: dict[str, dict], path: Path, comments: dict[int, str]) -> dict:
    """The _describe entries of one expression: dict(...), {...}, a known name, or these joined by |."""
    if isinstance(node, ast.Name):
        return names.get(node.id, {})
    if isinstance(node, ast.BinOp):
        parts = [(None, node.left, 0), (None, node.right, 0)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        parts = [(None, arg, 0) for arg in node.args] + [(kw.arg, kw.value, kw.lineno) for kw in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = [(key.value, key.lineno) if isinstance(key, ast.Constant) else (None, 0) for key in node.keys]
        parts = [(key, value, line) for (key, line), value in zip(keys, node.values, strict=True)]
    else:
        return {}
    entries: dict[str, tuple[Path, int, str]] = {}
    for key, value, line in parts:
        inner = _entries(value, names, path, comments)
        if key is not None:
            inner = {f"{key}.{nested}": entry for nested, entry in inner.items()}
            inner |= {key: (path, line, comments.get(value.end_lineno) or comments.get(line, ""))}
        for dotted, (file, at, comment) in inner.items():
            inherited = entries.get(dotted, (file, at, ""))[2]  # an override without a comment keeps the base's
            entries[dotted] = (file, at, comment or inherited)
    return entries


def _help(doc: str, defaults: dict, described: dict) -> str:
    """The doc's first paragraph, then every key with its default and comment."""
    lines = [
        doc.strip().split("\n\n")[0],
        "",
        "usage: [config.py] [--key=value ...]  (a list: a,b or \"['a, b', 'c']\")",
        "",
    ]
    options = {f"--{key}={_text(value)}": described.get(key, (None, 0, ""))[2] for key, value in defaults.items()}
    width = min(40, max(map(len, options), default=0))
    lines += [f"  {option:<{width}}  {comment}".rstrip() for option, comment in options.items()]
    return "\n".join(lines)
