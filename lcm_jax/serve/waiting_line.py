"""The queue of clients: some may stream, the others wait in line for it."""

from __future__ import annotations

import asyncio


class Full(Exception):
    """An error: as many clients wait as are allowed."""


class Ticket:
    """A place in the queue: position 0 may stream, 1 is next."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._moved = asyncio.Event()

    def move(self, position: int) -> None:
        """Change the position."""
        if position != self.position:
            self.position = position
            self._moved.set()

    async def moved(self) -> None:
        """Wait until the position has changed."""
        await self._moved.wait()
        self._moved.clear()


class WaitingQueue:
    """The queue of one event loop; places: how many clients may stream. most_waiting: how many more may wait.

    >>> queue = WaitingQueue(places=1, most_waiting=2)
    >>> first, second = queue.enter(), queue.enter()
    >>> queue.leave(first)
    >>> second.position, queue.streaming, queue.waiting
    (0, 1, 0)
    """

    def __init__(self, places: int, most_waiting: int) -> None:
        self.places, self.most_waiting = places, most_waiting
        self._tickets: list[Ticket] = []  # those who stream, then those who wait, in order

    @property
    def streaming(self) -> int:
        """The number of clients that stream."""
        return min(len(self._tickets), self.places)

    @property
    def waiting(self) -> int:
        """The number of clients that wait."""
        return len(self._tickets) - self.streaming

    def enter(self) -> Ticket:
        """Return a place to stream, or the last one in line. Raise `Full` if there is none."""
        if len(self._tickets) >= self.places + self.most_waiting:
            raise Full(f"{self.streaming} sessions are streaming and {self.waiting} are waiting: try again later")
        self._tickets.append(Ticket(self._position(len(self._tickets))))
        return self._tickets[-1]

    def leave(self, ticket: Ticket) -> None:
        """Give a place back, so that those behind it move up."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            for i, remaining in enumerate(self._tickets):
                remaining.move(self._position(i))

    def _position(self, index: int) -> int:
        return max(index - self.places + 1, 0)
