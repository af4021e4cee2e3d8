"""Who may stream, and who waits in line for it."""

from __future__ import annotations

import asyncio


class Full(Exception):
    """As many wait as may."""


class Ticket:
    """A place in the line: 0 may stream, 1 is next."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._moved = asyncio.Event()

    def move(self, position: int) -> None:
        """To another place."""
        if position != self.position:
            self.position = position
            self._moved.set()

    async def moved(self) -> None:
        """Wait until the position is another one."""
        await self._moved.wait()
        self._moved.clear()


class WaitingQueue:
    """places: how many may stream. most_waiting: and how many may wait. For one event loop."""

    def __init__(self, places: int, most_waiting: int) -> None:
        self.places, self.most_waiting = places, most_waiting
        self._tickets: list[Ticket] = []  # those who stream, then those who wait, in order

    @property
    def streaming(self) -> int:
        """How many stream."""
        return min(len(self._tickets), self.places)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._tickets) - self.streaming

    def enter(self) -> Ticket:
        """A place to stream or the last one in line; `Full` if there is none."""
        if len(self._tickets) >= self.places + self.most_waiting:
            raise Full(f"{self.streaming} sessions are streaming and {self.waiting} are waiting: try again later")
        self._tickets.append(Ticket(self._position(len(self._tickets))))
        return self._tickets[-1]

    def leave(self, ticket: Ticket) -> None:
        """Give a place back; whoever is next moves up."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            for i, other in enumerate(self._tickets):
                other.move(self._position(i))

    def _position(self, index: int) -> int:
        return max(index - self.places + 1, 0)
