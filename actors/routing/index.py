"""Which engine has read how much of a prompt before: an approximate index of their prefix caches.

    stored_blocks, removed_blocks of each engine ──> told      hash ──> bits, one per engine
    what was routed there just now ────────────────> expected  hash ──> bits, until they expire

    a prompt's hashes   h0        h1        h2        h3
    engines with it     A B C     A B       A B       -
                                  C: 1 block          A, B: 3 blocks

One walk along a prompt answers for all engines, and ends with the last engine that knows it. Engines
evict what they like without asking, and their news are a moment old: the index is a guess that costs
time where it is wrong, never a wrong token.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from paceline.runtime.schedule.prefix import BlockHash, extend_hashes, root_hash
from paceline.runtime.types import Request

EXPECT_S = 10.0
"""How long a prefix is believed to be where it was routed, until the engine says so itself."""
MOST_EXPECTED = 1 << 17
MOST_TOLD = 1 << 20
"""Of one engine that has not said how many blocks it has."""

_FIRST_PIECE = 8
"""Blocks that are hashed before it is known whether anybody has them, and how the pieces grow."""


class Chain:
    """The hashes of a prompt's full blocks, made as far as they are asked for."""

    def __init__(self, token_ids: Sequence[int], *, salt: str, block_size: int) -> None:
        self.block_size = block_size
        self._token_ids = token_ids
        self._hashes: list[BlockHash] = []
        self._root = root_hash(salt)

    def __len__(self) -> int:
        return len(self._token_ids) // self.block_size

    def first(self, count: int) -> list[BlockHash]:
        """Those of the first `count` blocks, or of all there are."""
        if len(self._hashes) < min(count, len(self)):
            extend_hashes(
                self._hashes,
                self._token_ids[: count * self.block_size],
                root=self._root,
                block_size=self.block_size,
            )
        return self._hashes[:count]


def chains_of(whole: Request, *, block_sizes: Iterable[int]) -> dict[int, Chain]:
    """A request's prompt and text by block size; none where no engine could have read it before."""
    rows_asked = whole.params.prompt_logprobs is not None and not whole.output_token_ids
    if whole.params.kv_policy != "full" or rows_asked:
        return {}
    token_ids = whole.prompt_token_ids + whole.output_token_ids
    return {size: Chain(token_ids, salt=whole.cache_salt, block_size=size) for size in block_sizes}


class PrefixIndex:
    """Not for several threads."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._told: dict[bytes, int] = {}
        self._counts: Counter[str] = Counter()
        """How many hashes each engine has told."""
        self._expected: dict[bytes, tuple[int, float]] = {}
        self._expiring: deque[tuple[float, list[BlockHash]]] = deque()

    def __len__(self) -> int:
        """Hashes that are kept."""
        return len(self._told) + len(self._expected)

    def add(self, engine_id: str) -> None:
        """Begin to keep an engine's."""
        taken = 0
        for bit in self._bits.values():
            taken |= bit
        self._bits[engine_id] = ~taken & (taken + 1)

    def forget(self, engine_id: str) -> None:
        """Drop an engine and all that it had."""
        self._clear(engine_id)
        del self._bits[engine_id]

    def update(
        self,
        engine_id: str,
        *,
        stored: Iterable[bytes],
        removed: Iterable[bytes],
        most: int = 0,
    ) -> None:
        """Take an engine's news; it has `most` blocks, if that is known. One that names more has
        removed some unheard, and starts again from nothing."""
        bit, told = self._bits[engine_id], self._told
        for each in stored:
            mask = told.get(each, 0)
            if not mask & bit:
                told[each] = mask | bit
                self._counts[engine_id] += 1
        for each in removed:
            mask = told.get(each, 0)
            if mask & bit:
                self._counts[engine_id] -= 1
                _put(told, each, mask & ~bit)
            if (expected := self._expected.get(each)) is not None:
                self._expected[each] = (expected[0] & ~bit, expected[1])
        if self._counts[engine_id] > (most or MOST_TOLD):
            self._clear(engine_id)

    def expect(
        self, engine_ids: Iterable[str], chains: Mapping[int, Chain], *, now_s: float
    ) -> None:
        """A prompt is on its way to these: soon they will have read it."""
        bits = 0
        for engine_id in engine_ids:
            bits |= self._bits[engine_id]
        until_s, expected = now_s + EXPECT_S, self._expected
        for chain in chains.values():
            hashes = chain.first(len(chain))
            for each in hashes:
                before = expected.get(each)
                expected[each] = (bits if before is None else before[0] | bits, until_s)
            self._expiring.append((until_s, hashes))
        self._expire(now_s)

    def cached(
        self, chains: Mapping[int, Chain], *, now_s: float, hoping: bool = True
    ) -> dict[str, int]:
        """How many leading tokens of a prompt each engine has."""
        cached: dict[str, int] = {}
        for size, chain in chains.items():
            for engine_id, count in self.longest(chain, now_s=now_s, hoping=hoping).items():
                cached[engine_id] = max(count * size, cached.get(engine_id, 0))
        return cached

    def longest(self, chain: Chain, *, now_s: float, hoping: bool = True) -> dict[str, int]:
        """How many leading blocks of a prompt each engine has; those that have none are left out.
        Unless `hoping`, only what engines said counts: of what was expected of a placement that
        failed, nothing has come."""
        self._expire(now_s)
        told = self._told
        expected = self._expected if hoping else {}
        alive, count, found = -1, 0, []
        piece = _FIRST_PIECE
        while alive and count < len(chain):
            hashes = chain.first(piece)
            for each in hashes[count:]:
                mask = told.get(each, 0)
                if (soon := expected.get(each)) is not None:
                    mask |= soon[0]
                if mask != alive:
                    left = alive & mask
                    if left != alive:
                        found.append((alive & ~mask, count))
                        alive = left
                        if not alive:
                            break
                count += 1
            piece *= _FIRST_PIECE
        found.append((alive, count))
        return {
            engine_id: blocks
            for engine_id, bit in self._bits.items()
            for mask, blocks in found
            if mask & bit and blocks
        }

    def _expire(self, now_s: float) -> None:
        expiring, expected = self._expiring, self._expected
        while expiring and (expiring[0][0] <= now_s or len(expected) > MOST_EXPECTED):
            until_s, hashes = expiring.popleft()
            for each in hashes:
                latest = expected.get(each)
                if latest is not None and latest[1] <= until_s:
                    del expected[each]

    def _clear(self, engine_id: str) -> None:
        bit = self._bits[engine_id]
        for each in [each for each, mask in self._told.items() if mask & bit]:
            _put(self._told, each, self._told[each] & ~bit)
        for each, (mask, until_s) in list(self._expected.items()):
            if mask & bit:
                self._expected[each] = (mask & ~bit, until_s)
        del self._counts[engine_id]


def _put(masks: dict[bytes, int], key: bytes, mask: int) -> None:
    if mask:
        masks[key] = mask
    else:
        del masks[key]
