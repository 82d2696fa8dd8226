"""What every test shares: the repository on sys.path, few threads, the folder of sample files."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, torch.get_num_threads()))  # the models here are too small for more


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
