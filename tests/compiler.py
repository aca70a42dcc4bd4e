"""The mark of tests that need torch to compile."""

import pytest

from training import device

needs_a_compiler = pytest.mark.skipif(
    not device.can_compile(), reason="torch compiles with g++ and Python's headers"
)
