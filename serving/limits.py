"""What the requests under way may hold together. What a single one may is for those who read it."""

from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import OverloadedError


class Budget:
    """An amount that requests share; all in the event loop."""

    def __init__(self, amount: int, refusal: str) -> None:
        """
        Args:
            amount: how much there is.
            refusal: what is told to who asks for more than is left.
        """
        self._left = amount
        self._refusal = refusal

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._left == 0

    def check(self) -> None:
        """Nothing is taken yet.

        Raises:
            OverloadedError: nothing is left.
        """
        if self.spent:
            raise OverloadedError(self._refusal)

    def take(self, amount: int) -> None:
        """Hold so much of it.

        Raises:
            OverloadedError: less is left; nothing was taken.
        """
        if amount > self._left:
            raise OverloadedError(self._refusal)
        self._left -= amount

    def give_back(self, amount: int) -> None:
        """What was taken."""
        self._left += amount

    @contextmanager
    def share(self) -> Iterator[None]:
        """Hold one of it meanwhile.

        Raises:
            OverloadedError: nothing is left.
        """
        self.take(1)
        try:
            yield
        finally:
            self.give_back(1)
