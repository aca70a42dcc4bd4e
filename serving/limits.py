"""Limits on what all requests under way hold together; those on a single one are where it is read."""

from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import Lacking, OverloadedError


class Budget:
    """An amount that requests share; to be used in the event loop only."""

    def __init__(self, amount: int, name: Lacking, refusal: str) -> None:
        """
        Args:
            amount: how much there is in all.
            name: of what.
            refusal: message of the error that is raised when too little is left.
        """
        self._left = amount
        self._name: Lacking = name
        self._refusal = refusal

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._left == 0

    def check(self) -> None:
        """Raise `OverloadedError` if nothing is left; takes nothing."""
        if self.spent:
            raise OverloadedError(self._refusal, self._name)

    def take(self, amount: int) -> None:
        """Take an amount.

        Raises:
            OverloadedError: less than that is left; nothing was taken.
        """
        if amount > self._left:
            raise OverloadedError(self._refusal, self._name)
        self._left -= amount

    def give_back(self, amount: int) -> None:
        """Give back an amount that was taken."""
        self._left += amount

    @contextmanager
    def share(self) -> Iterator[None]:
        """Hold an amount of one within the `with` block.

        Raises:
            OverloadedError: nothing is left.
        """
        self.take(1)
        try:
            yield
        finally:
            self.give_back(1)
