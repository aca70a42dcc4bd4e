"""The mark of tests that need OpenVINO: where it should be installed, they fail without it."""

import platform
import sys

import pytest

needs_openvino = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="OpenVINO is installed on x86-64 Linux only",
)
