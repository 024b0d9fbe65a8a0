"""From row ids to places: a hash map over arrays, for ids by the thousand at a time."""

from __future__ import annotations

import numpy as np

from . import compiled


class IdMap:
    """int64 ids, 0 or more, to int64 values. Grows by itself; 16 bytes a cell, at most 5/8 of the cells in use.

    capacity: ids that it holds before it grows. One thread at a time. Without Numba it is a dict, with the same results.
    """

    def __new__(cls, capacity: int = 1024) -> IdMap:
        """The compiled one, or the truth where there is no Numba."""
        return super().__new__(cls if compiled() else DictMap)

    def __init__(self, capacity: int = 1024) -> None:
        self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        bits = max(6, ((capacity * 8 + 4) // 5 - 1).bit_length())  # the fewest with 5/8 of the cells >= capacity
        self._cells = np.full((1 << bits, 2), -1, np.int64)
        self._shift = 64 - bits
        self._size = 0

    def get(self, ids: np.ndarray) -> np.ndarray:
        """[n] int64 values of ids [n]; -1 where an id is absent."""
        from .probing import find

        values = np.empty(len(ids), np.int64)
        find(0, len(ids), self._cells, self._shift, _int64(ids), values)
        return values

    def put(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Insert or overwrite; where an id appears twice the last one stays."""
        from .probing import insert

        ids, values, done = _int64(ids), _int64(values), 0
        while True:
            room = len(self._cells) * 5 // 8 - self._size
            done, added = insert(done, len(ids), self._cells, self._shift, ids, values, room)
            self._size += added
            if done == len(ids):
                return
            old_ids, old_values = self.items()
            self._resize(2 * self._size)
            self.put(old_ids, old_values)

    def remove(self, ids: np.ndarray) -> None:
        """Forget these ids; absent ones are nothing to forget."""
        from .probing import delete

        self._size -= delete(0, len(ids), self._cells, self._shift, _int64(ids))

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids and their values, in no order."""
        used = self._cells[self._cells[:, 0] >= 0]
        return used[:, 0].copy(), used[:, 1].copy()

    def clear(self) -> None:
        """Forget everything; the cells stay allocated."""
        self._cells.fill(-1)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes of RAM."""
        return self._cells.nbytes


class DictMap(IdMap):
    """The slow truth: the same in a dict."""

    def __init__(self, capacity: int = 1024) -> None:
        self._dict: dict[int, int] = {}

    def get(self, ids: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.array([self._dict.get(i, -1) for i in ids.tolist()], np.int64)

    def put(self, ids: np.ndarray, values: np.ndarray) -> None:  # noqa: D102
        self._dict.update(zip(ids.tolist(), values.tolist(), strict=True))

    def remove(self, ids: np.ndarray) -> None:  # noqa: D102
        for i in ids.tolist():
            self._dict.pop(i, None)

    def items(self) -> tuple[np.ndarray, np.ndarray]:  # noqa: D102
        return np.array(list(self._dict), np.int64), np.array(list(self._dict.values()), np.int64)

    def clear(self) -> None:  # noqa: D102
        self._dict.clear()

    def __len__(self) -> int:
        return len(self._dict)

    @property
    def nbytes(self) -> int:  # noqa: D102
        return 128 * len(self._dict)  # two integers and their entry, about


def _int64(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.int64)
