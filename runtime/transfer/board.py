"""The board: how far the KV of each offered request is, for whoever sends it on.

    word 0        heartbeat of the link              word 2..3     nonce, by which a peer knows this board
    word 8 + s    generation of slot s               after them    marks [slots, layers of both models]

A mark is a number of tokens: of that layer, all before it are written. Shared memory of 64-bit
words. The model loop of one rank writes marks, and nobody waits for anybody: a reader that finds
another generation than it was told knows that the slot's marks are another request's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HEAD = 8
_HEARTBEAT, _NONCE = 0, slice(2, 4)


class Board:
    """A view of such memory, which must begin at a multiple of eight and be zero at first."""

    def __init__(
        self, buffer: Buffer, *, num_slots: int, num_layers: int, num_draft_layers: int
    ) -> None:
        """`num_layers` are all of the target, held by this rank or not; `num_draft_layers` likewise,
        0 without a drafter."""
        words = np.frombuffer(memoryview(buffer), dtype=np.int64)
        need = self.nbytes(
            num_slots=num_slots, num_layers=num_layers, num_draft_layers=num_draft_layers
        )
        assert words.nbytes >= need, f"expected {need} bytes, found {words.nbytes}"
        at = _HEAD + num_slots
        split = at + num_slots * num_layers
        end = split + num_slots * num_draft_layers
        self._head = words[:_HEAD]
        self._generations = words[_HEAD:at]
        self.marks: NDArray[np.int64] = words[at:split].reshape(num_slots, num_layers)
        """`[slots, layers]`, to read and to raise."""
        self.draft_marks: NDArray[np.int64] = words[split:end].reshape(num_slots, num_draft_layers)

    @staticmethod
    def nbytes(*, num_slots: int, num_layers: int, num_draft_layers: int) -> int:
        return 8 * (_HEAD + num_slots * (1 + num_layers + num_draft_layers))

    def begin(self, slot: int, generation: int) -> None:
        """The slot is now another request's, of which nothing is known to be written.

        The generation goes first and comes last: whoever reads it before and after a mark, and finds
        the same, has read a mark of that generation.
        """
        assert generation > 0, f"expected a positive generation, found {generation}"
        self._generations[slot] = 0
        self.marks[slot] = 0
        self.draft_marks[slot] = 0
        self._generations[slot] = generation

    def generation(self, slot: int) -> int:
        return int(self._generations[slot])

    def read(self, slot: int, generation: int, *, draft: bool = False) -> NDArray[np.int64] | None:
        """A copy of a slot's marks by layer, if they are of that generation."""
        marks = (self.draft_marks if draft else self.marks)[slot]
        if self._generations[slot] != generation:
            return None
        found = marks.copy()
        return found if self._generations[slot] == generation else None

    @property
    def heartbeat(self) -> int:
        return int(self._head[_HEARTBEAT])

    def beat(self) -> None:
        """Of the link alone: it still goes round its loop."""
        self._head[_HEARTBEAT] += 1

    @property
    def nonce(self) -> bytes:
        """16 bytes, drawn once by the rank."""
        return bytes(self._head[_NONCE].tobytes())

    @nonce.setter
    def nonce(self, value: bytes) -> None:
        self._head[_NONCE] = np.frombuffer(value, dtype=np.int64)
