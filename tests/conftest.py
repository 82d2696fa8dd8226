"""What every test shares: few threads, float64 on demand, sample files, and a chain of small runs."""

import importlib
import signal
import sys

import pytest
import torch
from chains import MAINS, ROOT, make_data, make_model, train
from preparing import files_of, texts_of

import data_process
from configs.tokenizer import config as tokenizer_defaults
from tokenizer.train import Corpus as TrainingText
from tokenizer.train import train_bpe

# where the tests run in the background Ctrl-C is ignored, which scripts that they start would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(min(2, torch.get_num_threads()))  # the models here are too small for more


@pytest.fixture(autouse=True)
def products_of_float32():
    """What a test in bfloat16 sets for the process (common.distributed.setup) does not reach the next one."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def from_benchmarks(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def float64():
    """Tensors are float64 by default: sums in another order then differ by 1e-16, on whatever CPU, instead of 1e-7."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def module_in_float64():
    """The same for a module's fixtures and all its tests."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def shared_data():
    """Samples of public files that live beside the repository, not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample files at {folder}")
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The folder of a finished chain: corpora, tokenizer, data and a run of every stage. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("chain")
    make_data(folder, "pretrain,sft,rm,prompts")
    for stage in MAINS:
        train(folder, stage, folder / stage)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with data, a language model "sft" and a reward model "rm" that were never trained."""
    folder = tmp_path_factory.mktemp("small")
    make_data(folder, "prompts")
    make_model(folder, "sft")
    make_model(folder, "rm", seed=1, scalar_head=True)
    return folder


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def starts(prompts, replies):\n    return [r[:1] == '好' for r in replies]\n"
        "def odd(prompts, replies):\n    return [len(r) % 2 for r in replies]\n"  # never all alike
        "def takes_all(prompts, replies, **fields):\n"
        "    assert list(fields) == ['answer']\n    return odd(prompts, replies)\n"
        "def takes_label(prompts, replies, label):\n    return odd(prompts, replies)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)  # that of a test before


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(texts_of(200, 0)), encoding="utf-8")
    sample = TrainingText([str(folder / "text.txt")], 16384)
    (folder / "tokenizer.model").write_bytes(train_bpe(sample, tokenizer_defaults | dict(vocab_size=460)))
    return folder / "tokenizer.model"


@pytest.fixture
def build(tmp_path, tokenizer_path):
    """build(out, *options): run the stage into tmp_path/out; returns {file name: bytes} of what it wrote."""

    def run(out, *options):
        data_process.main([f"--out={tmp_path / out}", f"--tokenizer={tokenizer_path}", "--val_share=0.2", *options])
        return files_of(tmp_path / out)

    return run


# web_demo.py over a folder of runs; what it needs is imported by those who ask for it


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small):
    from web import make_runs

    return make_runs(tmp_path_factory.mktemp("out"), small)


@pytest.fixture(scope="module")
def server(runs):
    from web import served

    with served(runs) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    from web import client_of

    with client_of(server) as client:
        yield client
