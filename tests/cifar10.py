"""The mark of tests that need the data set itself, not the bundled sample."""

import os
from pathlib import Path

import pytest

from training import data

ROOT = os.environ.get(data.ROOT_VARIABLE, "")
needs_cifar10 = pytest.mark.skipif(
    not (Path(ROOT) / data.FOLDER).is_dir() or not ROOT,
    reason="CIFAR10_ROOT is not set to a folder",
)
