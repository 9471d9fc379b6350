"""Settings and fixtures of all tests: one CPU thread, no network, one tiny model per family."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell that starts pytest in the background leaves SIGINT ignored, nohup SIGHUP, and ranks would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

FAMILIES = ("mbart", "mbart50", "nllb", "marian", "t5")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directory of each family. Tests must not write into them."""
    from tests.tiny import make_tiny_model

    parent = tmp_path_factory.mktemp("tiny")
    return {family: make_tiny_model(family, parent / family) for family in FAMILIES}
