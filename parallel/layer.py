"""Which layers of a drafter run side by side, and which rank runs them in the published placement.

    size 3 over 8 layers, first and last exact:   [0] [1 2 3] [4 5 6] [7]

Source: EasySpec (arXiv 2502.02493), section "layer-parallel speculation".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Groups = tuple[tuple[int, ...], ...]
"""Consecutive layers, cut into groups that each run side by side. A group of one is an ordinary
layer."""


def exact_groups(num_layers: int) -> Groups:
    """Every layer by itself: the model as it was trained."""
    return tuple((layer,) for layer in range(num_layers))


def layer_groups(num_layers: int, *, size: int, exact: Collection[int] | None = None) -> Groups:
    """Cut layers into consecutive groups of at most `size`, leaving those in `exact` alone.

    `exact` holds layer indices, negative ones counted from the end; None means first and last.
    Raises ValueError for a layer that does not exist or a size below 1.
    """
    if size < 1:
        raise ValueError(f"layer_parallel_size must be at least 1, not {size}")
    alone: set[int] = set()
    for layer in (0, -1) if exact is None else exact:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"exact layer {layer} does not exist in a model of {num_layers} layers"
            )
        alone.add(layer % num_layers)
    groups: list[tuple[int, ...]] = []
    current: list[int] = []
    for layer in range(num_layers):
        if layer in alone or len(current) == size:
            if current:
                groups.append(tuple(current))
            current = []
        if layer in alone:
            groups.append((layer,))
        else:
            current.append(layer)
    if current:
        groups.append(tuple(current))
    return tuple(groups)


def check_groups(groups: Sequence[Sequence[int]], *, num_layers: int) -> Groups:
    """The same groups as tuples. Raises ValueError unless they are all layers, once each, in
    order."""
    flat = [layer for group in groups for layer in group]
    if flat != list(range(num_layers)) or not all(groups):
        raise ValueError(
            f"layer_groups must list the layers 0 to {num_layers - 1} once each and in order; found {flat}"
        )
    return tuple(tuple(group) for group in groups)


def owner(position: int, *, ranks: int) -> int:
    """The rank that runs the layer at `position` of its group in the published placement."""
    return position % ranks
