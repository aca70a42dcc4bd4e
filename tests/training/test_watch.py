import signal

import pytest

from training.watch import Watch


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_program_as_without_a_watch(first: signal.Signals) -> None:
    watch = Watch()
    with watch.signals():
        signal.raise_signal(first)
        assert watch.reason(0) == first
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
