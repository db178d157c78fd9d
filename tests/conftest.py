"""What every test shares: no network, one torch thread."""

import os
import sys

import pytest

# Read once when the Hugging Face libraries are imported, so it has to stand before any of them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums of floats do not depend on the cores; tests that need no torch do not import it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
