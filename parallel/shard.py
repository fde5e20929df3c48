"""Who holds which part of a model: pure arithmetic on head, feed-forward and vocabulary ranges.

The unit of attention is a *(layer, KV head)* pair with the query heads that read it. Units of one
group of layers are dealt to ranks in contiguous runs, so that a rank's part of any single layer of
the group is itself contiguous. A group of one layer is plain tensor parallelism:

    8 KV heads, 2 ranks           rank 0: heads 0-3         rank 1: heads 4-7
    2 KV heads, 4 ranks           head 0 on ranks 0, 1      head 1 on ranks 2, 3     (query heads split)
    2 KV heads x 2 layers, 4 ranks, one group
                                  rank 0: layer a head 0    rank 1: layer a head 1
                                  rank 2: layer b head 0    rank 3: layer b head 1   (nothing held twice)

Units are split, never padded: ranks may hold unequal parts, and a rank may hold none.
"""

from __future__ import annotations

from dataclasses import dataclass


def split(total: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` contiguous, balanced ranges of `total` items; the first ones are
    larger."""
    assert 0 <= index < parts, f"expected a part below {parts}, found {index}"
    size, rest = divmod(total, parts)
    start = index * size + min(index, rest)
    return range(start, start + size + (index < rest))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadUnit:
    """One KV head of one layer, and the query heads that read it on this rank."""

    layer: int
    """Index within the group of layers."""
    kv_head: int
    query_heads: range


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShard:
    """A rank's part of one group of layers."""

    units: tuple[HeadUnit, ...]
    """Sorted by layer; every unit has the same number of query heads."""
    ff: range
    """Feed-forward units, the same range of every layer."""

    @property
    def queries_per_unit(self) -> int:
        return len(self.units[0].query_heads) if self.units else 0

    def units_of(self, layer: int) -> range:
        """Where the units of one layer of the group stand in `units`; maybe empty."""
        found = [i for i, unit in enumerate(self.units) if unit.layer == layer]
        return range(found[0], found[-1] + 1) if found else range(0)


def shard_group(
    num_layers: int, *, num_heads: int, num_kv_heads: int, ff_size: int, ranks: int, rank: int
) -> GroupShard:
    """The part of a group of `num_layers` layers that `rank` of `ranks` holds."""
    per_kv = num_heads // num_kv_heads
    assert per_kv * num_kv_heads == num_heads, (
        f"expected heads in whole groups, found {num_heads}/{num_kv_heads}"
    )

    def unit(number: int, queries: range) -> HeadUnit:
        layer, kv_head = divmod(number, num_kv_heads)
        start = kv_head * per_kv
        return HeadUnit(
            layer=layer,
            kv_head=kv_head,
            query_heads=range(start + queries.start, start + queries.stop),
        )

    total = num_layers * num_kv_heads
    if num_kv_heads >= ranks:  # split every layer alike: an exact pass stays balanced
        heads = split(num_kv_heads, ranks, rank)
        numbers = [layer * num_kv_heads + head for layer in range(num_layers) for head in heads]
        units = tuple(unit(number, range(per_kv)) for number in numbers)
    elif total >= ranks:  # too few heads in one layer, enough in the group
        units = tuple(unit(number, range(per_kv)) for number in split(total, ranks, rank))
    else:  # too few even in the group: several ranks read one KV head and share its query heads
        number = next(u for u in range(total) if rank in split(ranks, total, u))
        sharers = split(ranks, total, number)
        units = (unit(number, split(per_kv, len(sharers), rank - sharers.start)),)
    return GroupShard(units=units, ff=split(ff_size, ranks, rank))
