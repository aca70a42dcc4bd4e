import signal

import pytest

from training.watch import Watch


def test_a_second_signal_ends_the_program_as_without_a_watch() -> None:
    watch = Watch()
    with watch.signals():
        signal.raise_signal(signal.SIGINT)
        assert watch.reason(0) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
