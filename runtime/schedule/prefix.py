"""Names for prefixes: a block is known by everything that was read up to its end.

    salt ──> root ──hash(root, block 0)──> h0 ──hash(h0, block 1)──> h1 ──...

Equal hashes mean equal tokens from the very first on and an equal salt, so a block found by its
hash holds just the KV that would be computed for it. Only full blocks have one. 16 bytes of
BLAKE2b: nobody can craft a prompt that is mistaken for another's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

_DIGEST_BYTES = 16


def root_hash(salt: str) -> BlockHash:
    """What the first block of a request with this salt is chained to."""
    return BlockHash(blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest())


def block_hash(parent: BlockHash, ids: bytes) -> BlockHash:
    """The hash of a full block, given that of the one before it; `ids` are its token ids as
    unsigned 32-bit numbers."""
    return BlockHash(blake2b(parent + ids, digest_size=_DIGEST_BYTES).digest())


def extend_hashes(
    hashes: list[BlockHash], token_ids: Sequence[int], *, root: BlockHash, block_size: int
) -> None:
    """Append the hashes of the full blocks of `token_ids` that are not there yet."""
    parent = hashes[-1] if hashes else root
    first, last = len(hashes), len(token_ids) // block_size
    if first >= last:
        return
    ids = array("I", token_ids[first * block_size : last * block_size])
    data, width = ids.tobytes(), block_size * ids.itemsize
    for at in range(0, len(data), width):
        parent = block_hash(parent, data[at : at + width])
        hashes.append(parent)
