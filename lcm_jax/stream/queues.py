"""Queues between threads, so that frames are read and pictures written while others are drawn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _End:
    """The end of an iterable, with the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterable[T], depth: int = 8) -> Generator[T, None, None]:
    """Yield the items of an iterable that a thread reads at most `depth` items ahead; its errors are raised here.

    >>> list(prefetch(range(3)))
    [0, 1, 2]
    """
    buffer: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return buffer.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_End())
        except BaseException as error:  # raised where the items are read
            put(_End(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item = buffer.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()


class BackgroundWriter(Generic[T]):
    """A context with a thread that calls a function on each item in order, at most `depth` items behind.

    An error of the function is raised by the next `put`, or at the end of the context.

    >>> written = []
    >>> with BackgroundWriter(written.append) as background:
    ...     for item in range(3):
    ...         background.put(item)
    >>> written
    [0, 1, 2]
    """

    def __init__(self, function: Callable[[T], Any], depth: int = 8) -> None:
        self._items: queue.Queue[Any] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> BackgroundWriter[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._items.put(_End())
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, item: T) -> None:
        """Wait for room in the queue, and add an item. Raise the error of an earlier item, if there was one."""
        if self._error is not None:
            raise self._error
        self._items.put(item)

    def _work(self) -> None:
        while not isinstance(item := self._items.get(), _End):
            if self._error is None:
                try:
                    self._function(item)
                except BaseException as error:  # raised by `put`; later items are dropped
                    self._error = error


class Latest(Generic[T]):
    """A bounded queue of live data: when it is full, the oldest item is dropped, and counted in `dropped`.

    >>> newest = Latest(size=1)
    >>> for frame in range(3):
    ...     newest.put(frame)
    >>> newest.get(), newest.dropped
    (2, 2)
    """

    def __init__(self, size: int = 1) -> None:
        self._items: list[T] = []
        self._size, self.dropped = size, 0
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Add an item without waiting."""
        with self._changed:
            self._items.append(item)
            if len(self._items) > self._size:
                del self._items[0]
                self.dropped += 1
            self._changed.notify()

    def get(self, timeout: float | None = None) -> T:
        """Remove and return the oldest item. Raise queue.Empty if none comes in `timeout` seconds; None waits on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                raise queue.Empty
            return self._items.pop(0)

    def __len__(self) -> int:
        return len(self._items)
