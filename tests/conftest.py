"""What every test shares: the repository on sys.path, few threads, the folder of sample files."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, torch.get_num_threads()))  # the models here are too small for more


@pytest.fixture(scope="session")
def shared_data():
    """Samples of public files that live beside the repository, not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample files at {folder}")
    return folder
