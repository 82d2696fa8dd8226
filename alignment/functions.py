"""Rewards that are Python functions: the built-in one, those of a user's module or file, and how they are called."""

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from common.config import ConfigError, said
from common.files import file_sha256


def length_reward(prompts, replies, lo, hi):
    """1 for a reply of lo to hi characters, falling linearly to 0 at no characters and at twice hi."""
    return [max(0.0, min(1.0, len(reply) / max(lo, 1), 2 - len(reply) / hi)) for reply in replies]


def reward_function(config):
    """(f(prompts, replies, **fields) -> rewards, all lists; its module) of `reward`: "length", or "module:function".

    The module, or a path to its .py file, is sought from the current directory too. "length" has no module.
    """
    name = config["reward"]
    if name == "length":
        bounds = config["reward_length"]
        if len(bounds) != 2 or not bounds[0] <= bounds[1] or bounds[1] < 1:
            raise ConfigError(f"reward_length={bounds}: the shortest and the longest reply in characters are needed")
        return lambda prompts, replies: length_reward(prompts, replies, *bounds), None
    return find_function(f"reward={name}", name, "model, length, ")


def find_function(label, name, others=""):
    """(function, its module) of "module:function"; `label` is how an error calls it, `others` what it may be too."""
    place, _, function_name = name.rpartition(":")
    if not (place and function_name):
        raise ConfigError(f"{label}: {others}module:function or path/to/file.py:function is needed")
    if not (place.endswith(".py") or all(part.isidentifier() for part in place.split("."))):
        raise ConfigError(f"{label}: {place} is no name of a module; a file is written path/to/file.py:function")
    try:
        with torch_as_before():
            module = load_file(Path(place)) if place.endswith(".py") else load_module(place)
            function = getattr(module, function_name, None)
    except KeyboardInterrupt:
        raise
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError(f"{label}: cannot import {place}: {error}") from None
    except BaseException as error:
        raise ConfigError(f"{label}: cannot import {place}: {told(error)}") from error
    if not callable(function):
        raise ConfigError(f"{label}: {getattr(module, '__file__', None) or place} has no function {function_name}")
    return function, module


def load_module(name):
    if os.getcwd() not in sys.path:
        sys.path.insert(1, os.getcwd())  # after the project's own folder, before what is installed
    return importlib.import_module(name)


def load_file(path):
    """The module in a file, whose folder it may import from, as if Python had been called with it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(1, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"reward_of_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def told(error):
    """`KeyError: 'x' (FILE:3)`: an error and the line that raised it, where that is one of a file."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    syntax = isinstance(error, SyntaxError) and error.filename
    file, line = (error.filename, error.lineno) if syntax else (frame.filename, frame.lineno)
    return said(error) if file.startswith("<frozen ") else f"{said(error)} ({file}:{line})"


@contextmanager
def torch_as_before():
    """Takes back what a user's code sets for all of torch: without gradients, say, nothing would be learnt."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


def file_identity(function, module):
    """What a resumed run compares of a function: path and sha256 of the file it stands in; None if there is none."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function)) if module else None
    except (TypeError, ValueError):  # an object that can be called, or one that wraps itself
        path = None
    path = path or getattr(module, "__file__", None)
    return dict(path=path, sha256=file_sha256(Path(path))) if path and Path(path).is_file() else None


def fields_taken(label, function, fields):
    """Which of the prompts' fields a function gets: those it has a parameter of that name for, or with **, all.

    The first two parameters are the prompts and the replies; a field of their names is left out, in a line. Raises
    ConfigError where it needs one that the prompts do not have.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some that are written in C, or have none
        return []
    rest = {p.name: p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in rest.values():
        if p.default is p.empty and p.name not in fields:
            has = ", ".join(fields) or "none"
            raise ConfigError(f"{label} needs the field {p.name} of the prompts, which have {has}")
    taken = list(fields) if any(p.kind is p.VAR_KEYWORD for p in parameters) else [n for n in fields if n in rest]
    clashes = [p.name for p in parameters[:2] if p.name in taken]
    if clashes and os.environ.get("RANK", "0") == "0":
        print(
            f"{label}: not passed, as its own parameters have these names: {', '.join(clashes)} of the prompts",
            file=sys.stderr,
        )
    return [field for field in taken if field not in clashes]


def call(name, function, prompts, replies, fields):
    """What a reward function makes of copies, which it may change; what it raises as one line."""
    try:
        with torch_as_before():
            return function(list(prompts), list(replies), **copy.deepcopy(fields))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(f"{name} raised {told(error)}") from error
