"""The mark of tests that need the data set itself, not the bundled sample."""

import os
from pathlib import Path

import pytest

from training import data

CIFAR10 = os.environ.get(data.ROOT_VARIABLE, "")
needs_cifar10 = pytest.mark.skipif(
    not (Path(CIFAR10) / data.FOLDER).is_dir() or not CIFAR10,
    reason="CIFAR10_ROOT is not set to a folder",
)
