"""What a rank's link is told of a model's pool: its shape, what of it is here, and where that
lies."""

from __future__ import annotations

from typing import cast

from paceline.runtime.kv.pool import TILE
from paceline.runtime.models.model import Model
from paceline.runtime.transfer.layout import (
    PAGE,
    Dtype,
    GroupPlace,
    Held,
    ModelLayout,
    ModelName,
    PoolPlace,
    UnitPlace,
)


def describe_pool(model: Model, name: ModelName) -> tuple[ModelLayout, PoolPlace]:
    """Of a model whose pool is shared."""
    pool, arch = model.pool, model.decoder.arch
    assert pool.shared is not None, "expected a shared pool"
    assert TILE == PAGE, f"expected pools of pages, found tiles of {TILE} tokens"
    found: dict[int, tuple[Held, UnitPlace]] = {}
    for group in model.decoder.groups:
        for index, layer in enumerate(group.layers):
            units = group.units[index]
            if units:
                heads = [unit.kv_head for unit in group.shard.units[units.start : units.stop]]
                assert heads == list(range(heads[0], heads[-1] + 1)), (
                    f"expected heads side by side, found {heads}"
                )
                held = Held(layer=layer, head_start=heads[0], head_stop=heads[-1] + 1)
                found[layer] = held, UnitPlace(group=group.index, first_unit=units.start)
    ordered = [found[layer] for layer in sorted(found)]
    layout = ModelLayout(
        name=name,
        num_layers=arch.num_layers,
        num_kv_heads=arch.num_kv_heads,
        head_dim=pool.head_dim,
        dtype=cast(Dtype, str(pool.groups[0].dtype).removeprefix("torch.")),
        held=tuple(held for held, _ in ordered),
    )
    place = PoolPlace(
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        groups=tuple(
            GroupPlace(offset_bytes=offset, num_units=part.shape[2])
            for offset, part in zip(pool.shared.offsets, pool.groups, strict=True)
        ),
        units=tuple(unit for _, unit in ordered),
    )
    return layout, place
