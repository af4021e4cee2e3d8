"""Threads between the parts of a stream: reading and writing go on while pictures are made."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _End:
    """Of an iterable, and what ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterable[T], depth: int = 8) -> Iterator[T]:
    """The items of an iterable, which is read in a thread, at most `depth` items ahead; its errors are raised here."""
    held: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return held.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_End())
        except BaseException as error:  # told to the reader
            put(_End(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item = held.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()


class BackgroundWriter(Generic[T]):
    """A function that is called in a thread, in order, at most `depth` items behind; used as a context.

    An error of the function is raised by the next `put`, or at the end of the context.
    """

    def __init__(self, function: Callable[[T], Any], depth: int = 8) -> None:
        self._held: queue.Queue[Any] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> BackgroundWriter[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._held.put(_End())
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, item: T) -> None:
        """Wait for room and hand the item over."""
        if self._error is not None:
            raise self._error
        self._held.put(item)

    def _work(self) -> None:
        while not isinstance(item := self._held.get(), _End):
            if self._error is None:
                try:
                    self._function(item)
                except BaseException as error:  # told to the writer; what still comes is let go
                    self._error = error


class Latest(Generic[T]):
    """A bounded queue for what is live: when it is full the oldest item is dropped, and counted."""

    def __init__(self, size: int = 1) -> None:
        self._items: list[T] = []
        self._size, self.dropped = size, 0
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        with self._changed:
            self._items.append(item)
            if len(self._items) > self._size:
                del self._items[0]
                self.dropped += 1
            self._changed.notify()

    def get(self, timeout: float | None = None) -> T:
        """The oldest item; queue.Empty if none comes in `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                raise queue.Empty
            return self._items.pop(0)

    def __len__(self) -> int:
        return len(self._items)
