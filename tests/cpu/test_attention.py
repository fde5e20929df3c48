"""Attention of packed passes, in both its forms, against a plain float64 emulation.

The emulation knows neither pages nor passes. It goes through one row at a time, from the definition:
a request that keeps everything attends to all earlier positions; one that keeps a window attends as
StreamingLLM does, as if the tokens it keeps stood side by side, *at their positions within the
cache*.

    text      0 1 2 3 4 5 6 7 8 9         2 sinks, a window of 3
    kept      0 1           7 8 9
    positions 0 1           2 3 4         what RoPE turns keys and the query (4) by

Letters: T rows of a pass, S tokens of a text, U attention units, G query heads per unit, D head
width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flash import flash_on_cpu
from tests.paged import Place, ScatteredBlocks
from torch import Tensor

from paceline.runtime.inputs import pack
from paceline.runtime.kv.pool import KvPool
from paceline.runtime.layers.attention import attend
from paceline.runtime.layers.rope import RopeTable
from paceline.runtime.models.arch import Architecture, Rope

torch.set_num_threads(1)

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
UNITS_BESIDE = 1
"""Units of the same group, before and after those that attend."""


def architecture(head_dim: int) -> Architecture:
    """Only what rotation asks for is meant."""
    return Architecture(
        family="llama",
        vocab_size=1,
        hidden_size=head_dim,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        ff_size=1,
        norm_eps=1e-5,
        max_position=64,
        rope=Rope(theta=100.0),  # fast enough for the slowest head dimension to matter
        tied_embeddings=True,
        dtype="float32",
    )


@dataclass
class Text:
    """One request: the heads of all its tokens, and in which pieces they come."""

    pieces: list[int]
    """Rows of the passes it takes part in."""
    sinks: int = 0
    window: int = 0
    late: int = 0
    """Passes that go by before it comes."""
    heads: Tensor = field(init=False)  # [S, U, G+2, D]
    found: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(self.pieces)


@dataclass(kw_only=True)
class Case:
    """A number of texts and the shape of their heads."""

    texts: list[Text]
    units: int = 2
    queries: int = 2
    head_dim: int = 16
    block_size: int = 16
    layer_window: int | None = None
    ready: int = 64
    """Positions whose rotations are kept."""
    seed: int = 0
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)
    """Of the heads, the pages and the context."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for text in self.texts:
            shape = (text.length, self.units, self.queries + 2, self.head_dim)
            heads = torch.randn(shape, generator=generator)
            heads[:, :, : self.queries + 1] *= 2.0  # sharp enough that every key matters
            text.heads = heads.to(self.dtypes[0])


# ---------------------------------------------------------------------------------------- emulation


def turned(head: Tensor, position: int, *, theta: float = 100.0) -> Tensor:
    """RoPE of one head, `[..., D]`: pairs (i, i + D/2) turn by position * theta^(-2i/D)."""
    half = head.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = head[..., :half], head[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def kept(position: int, *, sinks: int, window: int) -> list[int]:
    """The tokens in the cache of a request when it attends from a position."""
    if not window:
        return list(range(position + 1))
    return [j for j in range(position + 1) if j < sinks or j > position - window]


def emulated(case: Case, text: Text) -> Tensor:
    """`[S, U, G, D]` float64: what every token's query heads see."""
    G, heads = case.queries, text.heads.double()
    rows = []
    for position in range(text.length):
        cache = kept(position, sinks=text.sinks, window=text.window)
        seen = [
            (place, j)
            for place, j in enumerate(cache)
            if case.layer_window is None
            or j < text.sinks
            or len(cache) - 1 - place < case.layer_window
        ]
        query = turned(heads[position, :, :G], len(cache) - 1)  # [U, G, D]
        keys = torch.stack([turned(heads[j, :, G], place) for place, j in seen], 1)  # [U, S, D]
        values = torch.stack([heads[j, :, G + 1] for _, j in seen], 1)
        weights = (query @ keys.transpose(1, 2) / math.sqrt(case.head_dim)).softmax(-1)
        rows.append(weights @ values)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------- run


def run(case: Case, *, native: bool, pages: bool = False) -> list[Tensor]:
    """The same through the runtime, every pass packed: `[S, U, G, D]` per text. With `pages`, through
    a library that reads them where it can."""
    arch, (_, of_pages, of_context) = architecture(case.head_dim), case.dtypes
    num_blocks = sum(-(-text.length // case.block_size) for text in case.texts) + 3
    pool = KvPool(
        [case.units + 2 * UNITS_BESIDE],
        head_dim=case.head_dim,
        num_blocks=num_blocks,
        block_size=case.block_size,
        dtype=of_pages,
        device=CPU,
        tiled=not pages,
    )
    # whatever was there before: the kernel touches nothing it must not see; torch only hides it
    pool.groups[0].fill_(math.nan if native else 1e4)
    beside = [0, *range(UNITS_BESIDE + case.units, case.units + 2 * UNITS_BESIDE)]
    before = others(pool, beside)
    rope = RopeTable(arch, max_len=case.ready, device=CPU)
    blocks = ScatteredBlocks(num_blocks, seed=case.seed)
    places = [
        Place(blocks, block_size=case.block_size, sinks=text.sinks, window=text.window)
        for text in case.texts
    ]
    num_passes = max(text.late + len(text.pieces) for text in case.texts)
    done = [0] * len(case.texts)
    for number in range(num_passes):
        taking = [
            (i, text.pieces[number - text.late])
            for i, text in enumerate(case.texts)
            if 0 <= number - text.late < len(text.pieces)
        ]
        if not taking:
            continue
        rows = pack(
            torch.zeros(sum(count for _, count in taking), dtype=torch.int64),
            [places[i].segment(start=done[i], num_rows=count) for i, count in taking],
            pool=pool,
            rope=rope,
            scale=case.head_dim**-0.5,
            native=native,
            pages=pages,
        )
        heads = torch.cat([case.texts[i].heads[done[i] : done[i] + count] for i, count in taking])
        context = attend(
            heads,
            rows=rows,
            group=0,
            units=range(UNITS_BESIDE, UNITS_BESIDE + case.units),
            window=case.layer_window,
            dtype=of_context,
        )
        assert context.dtype == of_context
        first = 0
        for i, count in taking:
            part = context[first : first + count]
            case.texts[i].found.append(part.view(count, case.units, case.queries, -1))
            first, done[i] = first + count, done[i] + count
    assert torch.equal(others(pool, beside), before), "others' KV"
    return [torch.cat(text.found).double() for text in case.texts]


def others(pool: KvPool, units: list[int]) -> Tensor:
    """What lies in these units, with something in place of NaN."""
    parts = (pool.keys(0)[units], pool.values(0)[units])
    return torch.cat([part.flatten() for part in parts]).nan_to_num()


def check(case: Case, *, native: bool, pages: bool = False) -> None:
    half = BF16 in case.dtypes
    for text in case.texts:
        text.found.clear()
    for text, found in zip(case.texts, run(case, native=native, pages=pages), strict=True):
        expected = emulated(case, text)
        difference = (found - expected).abs()
        # a token more or less, or at another angle, moves a row by tenths
        assert difference.max() < (0.1 if half else 2e-4)
        assert difference.mean() < (0.01 if half else 1e-5)


# --------------------------------------------------------------------------------------------- tests


@st.composite
def texts(draw: st.DrawFn, *, longest: int = 12) -> Text:
    pieces = draw(
        st.lists(st.integers(1, longest) | st.sampled_from([1, 16, 17, 40]), min_size=1, max_size=5)
    )
    sinks, window = draw(
        st.sampled_from([(0, 0)]) | st.tuples(st.integers(1, 20), st.integers(1, 40))
    )
    return Text(pieces, sinks=sinks, window=window, late=draw(st.integers(0, 2)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        texts=draw(st.lists(texts(), min_size=1, max_size=4)),
        units=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([4, 8, 12, 16, 20, 32, 40, 64])),
        block_size=draw(st.sampled_from([16, 32])),
        layer_window=draw(st.sampled_from([None, None, 1, 5, 16, 30])),
        ready=draw(st.sampled_from([64, 300])),
        seed=draw(st.integers(0, 99)),
    )


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_any_packing_of_any_requests_is_what_the_emulation_says(native: bool, case: Case) -> None:
    check(case, native=native)


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_a_library_that_reads_pages_gives_what_the_emulation_says(case: Case) -> None:
    with flash_on_cpu() as calls:
        check(case, native=False, pages=True)
    alone = max(text.late + len(text.pieces) for text in case.texts)
    if all(not (text.sinks or text.window) for text in case.texts):
        assert len(calls) <= alone
        assert sum(calls) == sum(text.length for text in case.texts)
    if all(text.sinks or text.window for text in case.texts):
        assert not calls


@pytest.mark.parametrize("head_dim", [8, 12, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("block_size", [16, 32])
def test_every_shape_of_heads_gives_what_the_emulation_says(
    native: bool, head_dim: int, queries: int, block_size: int
) -> None:
    given_texts = [Text([20, 1, 3]), Text([1, 1, 9], sinks=2, window=5), Text([33])]
    check(
        Case(texts=given_texts, head_dim=head_dim, queries=queries, block_size=block_size, units=1),
        native=native,
    )


@pytest.mark.parametrize(
    "dtypes",
    [(F32, F32, BF16), (F32, BF16, BF16), (BF16, F32, BF16), (BF16, BF16, BF16)],
    ids=lambda each: "-".join(str(dtype).removeprefix("torch.") for dtype in each),
)
@pytest.mark.parametrize("head_dim", [12, 64])
def test_bfloat16_stays_within_its_rounding(
    native: bool, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], head_dim: int
) -> None:
    given_texts = [Text([20, 1, 3]), Text([30, 1, 9], sinks=2, window=7), Text([1, 33])]
    check(Case(texts=given_texts, dtypes=dtypes, head_dim=head_dim, layer_window=20), native=native)


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (5, 140), (130, 20)])
def test_texts_of_more_keys_than_are_looked_at_together(
    native: bool, sinks: int, window: int
) -> None:
    given_texts = [
        Text([127, 1, 2, 20], sinks=sinks, window=window),
        Text([1, 100, 45, 6], sinks=sinks, window=window),
        Text([3, 1, 1]),
    ]
    check(Case(texts=given_texts, units=1, ready=300), native=native)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [5, 5, 3, 2, 1, 1, 3, 20]], ids=str)
@pytest.mark.parametrize(("sinks", "window"), [(1, 1), (4, 8), (17, 16), (3, 40)])
def test_rows_on_both_sides_of_where_a_window_leaves_the_sinks_share_a_pass(
    native: bool, pieces: list[int], sinks: int, window: int
) -> None:
    """The queries of a tile then look at the sinks by different angles."""
    check(Case(texts=[Text(pieces, sinks=sinks, window=window)], queries=3), native=native)


def test_positions_beyond_the_kept_rotations_are_turned_all_the_same(native: bool) -> None:
    check(Case(texts=[Text([30, 1, 1, 50])], ready=32), native=native)


def test_a_window_wider_than_the_kept_rotations_leaves_the_sinks(native: bool) -> None:
    check(Case(texts=[Text([30, 1, 9], sinks=4, window=20)], ready=16), native=native)


@pytest.mark.parametrize("layer_window", [1, 7, 15, 16, 17, 64])
def test_a_layer_s_own_window_moves_on_with_the_text(native: bool, layer_window: int) -> None:
    given_texts = [Text([50, 1, 1]), Text([1] * 30), Text([40], sinks=2, window=12)]
    check(Case(texts=given_texts, layer_window=layer_window), native=native)


def test_blocks_behind_a_window_may_belong_to_others(native: bool) -> None:
    """A request that keeps a window gives the blocks behind it back; another fills them."""
    case = Case(texts=[Text([78], sinks=3, window=10), Text([40])])
    old, new = case.texts
    passes = Passes(native=native, num_blocks=5)
    of_old = Place(ScatteredBlocks(5), sinks=old.sinks, window=old.window)
    of_new = Place(ScatteredBlocks(0))
    passes.feed(old.heads[:74], of_old, start=0)
    of_new.table.extend(of_old.table.ids()[1:4].tolist())  # positions 16 to 63
    filled = passes.feed(new.heads, of_new, start=0)
    later = passes.feed(old.heads[74:], of_old, start=74)
    assert (filled - emulated(case, new)).abs().max() < 2e-4
    assert (later - emulated(case, old)[74:]).abs().max() < 2e-4


def test_rejected_rows_are_forgotten_by_feeding_others_at_their_positions(native: bool) -> None:
    """Verification writes rows that do not stay: a pass over the same positions follows."""
    case = Case(texts=[Text([30])])
    (text,) = case.texts
    passes, place = Passes(native=native, num_blocks=3), Place(ScatteredBlocks(3))
    wrong = torch.randn(8, 2, 4, 16, generator=torch.Generator().manual_seed(9))
    found = []
    for start, end in ((0, 14), (14, 17), (17, 30)):
        passes.feed(wrong, place, start=start)
        found.append(passes.feed(text.heads[start:end], place, start=start))
    assert (torch.cat(found) - emulated(case, text)).abs().max() < 2e-4


class Passes:
    """Passes of one segment each, over a pool of two units of two query heads."""

    def __init__(self, *, native: bool, num_blocks: int) -> None:
        self._native = native
        self._rope = RopeTable(architecture(16), max_len=64, device=CPU)
        self._pool = KvPool(
            [2], head_dim=16, num_blocks=num_blocks, block_size=16, dtype=F32, device=CPU
        )

    def feed(self, heads: Tensor, place: Place, *, start: int) -> Tensor:
        rows = pack(
            torch.zeros(len(heads), dtype=torch.int64),
            [place.segment(start=start, num_rows=len(heads))],
            pool=self._pool,
            rope=self._rope,
            scale=0.25,
            native=self._native,
        )
        found = attend(heads, rows=rows, group=0, units=range(2), window=None, dtype=F32)
        return found.view(len(heads), 2, 2, 16).double()


@pytest.fixture
def one_block() -> tuple[KvPool, RopeTable, Place]:
    pool = KvPool([1], head_dim=8, num_blocks=4, block_size=16, dtype=F32, device=CPU)
    place = Place(ScatteredBlocks(4))
    place.segment(start=0, num_rows=16)
    return pool, RopeTable(architecture(8), max_len=64, device=CPU), place


def test_rows_beyond_a_request_s_blocks_are_refused(
    one_block: tuple[KvPool, RopeTable, Place],
) -> None:
    pool, rope, place = one_block
    segment = place.segment(start=10, num_rows=6)
    beyond = type(segment)(num_rows=7, end=17, table=segment.table)
    tokens = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(AssertionError, match="found 7 rows up to 17 in 1 blocks"):
        pack(tokens, [beyond], pool=pool, rope=rope, scale=1.0, native=True)


def test_a_pass_of_other_tokens_than_its_segments_is_refused(
    one_block: tuple[KvPool, RopeTable, Place],
) -> None:
    pool, rope, place = one_block
    tokens = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(AssertionError, match="expected 6 tokens, found 5"):
        pack(
            tokens,
            [place.segment(start=10, num_rows=6)],
            pool=pool,
            rope=rope,
            scale=1.0,
            native=True,
        )
