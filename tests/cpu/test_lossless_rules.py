"""Speculative text is distributed as the target's own: measured for each rule, and for wrong ones.

Two levels. *Kernel*: one round over a fixed p and q that disagree; the first token emitted must
follow p. *Sequence*: a toy Markov target and drafter; whole rounds until three tokens are there;
all 125 texts must come as often as the target's chain makes them, which covers the hand-over
between rounds.

Power. A chi-square test here fails below a p-value of 1e-4. With 100,000 rounds over 12 tokens it
sees, nine times in ten, a rule whose probabilities are off by 2 % (root mean square, relative);
with 12,000 texts over 125 cells, by 9 %. A wrong rule must fail with a p-value under 1e-12; those
below do with chi-squares of hundreds to tens of thousands.

Letters: V vocabulary, n nodes of a tree.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from paceline.runtime.sampling.sampler import (
    Purpose,
    RoundUniforms,
    Uniforms,
    draw,
    uniform,
)
from paceline.runtime.spec.tree import ROOT, DraftTree
from paceline.runtime.spec.verify import verify_greedy, verify_point_mass, verify_sampled

torch.set_num_threads(1)

Round = Callable[["Toy", int, Uniforms], list[int]]
"""One round: the pair of models, the last committed token, the numbers -> the tokens emitted."""


@dataclass(frozen=True)
class Toy:
    """A target and a drafter that look one token back: row x is the law of the token after x."""

    target: Tensor  # [V, V]
    draft: Tensor  # [V, V]


@cache
def make_toy(vocab_size: int, *, seed: int = 0) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    shape = (vocab_size, vocab_size)
    target = (1.2 * torch.randn(shape, generator=generator)).softmax(-1)
    draft = (1.2 * torch.randn(shape, generator=generator)).softmax(-1)
    return Toy(target, 0.25 * target + 0.75 * draft)


# ----------------------------------------------------------------------------------------- drafters


@cache
def rows(law: Tensor, last: int, tree: DraftTree) -> Tensor:
    """The law after the root and after each node [1 + n, V]."""
    return law[torch.tensor((last, *tree.token_ids))]


def draw_shape(toy: Toy, last: int, uniforms: Uniforms, *, parents: tuple[int, ...]) -> DraftTree:
    """Draw a tree of a fixed shape, siblings without replacement."""
    left = {ROOT: toy.draft[last].clone()}
    depths = {ROOT: 0}
    lanes: Counter[int] = Counter()
    token_ids: list[int] = []
    for node, parent in enumerate(parents):
        depths[node] = depth = 1 + depths[parent]
        token_id = draw(left[parent], uniforms(depth, purpose=Purpose.DRAFT, lane=lanes[depth]))
        lanes[depth] += 1
        left[parent][token_id] = 0.0
        left[node] = toy.draft[token_id].clone()
        token_ids.append(token_id)
    return DraftTree(tuple(token_ids), parents)


def draw_heap(toy: Toy, last: int, uniforms: Uniforms, *, num_nodes: int) -> DraftTree:
    """DySpec: always draw where acceptance is likeliest. The shape depends on what is drawn."""
    token_ids: list[int] = []
    parents: list[int] = []
    depths: dict[int, int] = {ROOT: 0}
    lanes: Counter[int] = Counter()
    slots = [(-1.0, 0, ROOT, toy.draft[last], 1.0)]
    for tie_break in itertools.count(1, 2):
        value, _, parent, left, mass = heapq.heappop(slots)
        depth = depths[parent] + 1
        token_id = draw(left, uniforms(depth, purpose=Purpose.DRAFT, lane=lanes[depth]))
        lanes[depth] += 1
        depths[len(token_ids)] = depth
        token_ids.append(token_id)
        parents.append(parent)
        if len(token_ids) == num_nodes:
            return DraftTree(tuple(token_ids), tuple(parents))
        chance = left[token_id].item() / mass
        rest = left.clone()  # as it is: draw() does not ask for a sum of one
        rest[token_id] = 0.0
        sibling = (value * (1.0 - chance), tie_break, parent, rest, mass * (1.0 - chance))
        heapq.heappush(slots, sibling)
        child = (value * chance, tie_break + 1, len(token_ids) - 1, toy.draft[token_id], 1.0)
        heapq.heappush(slots, child)
    raise AssertionError("unreachable")


@cache
def choose_top(toy: Toy, last: int, *, width: int, depth: int) -> DraftTree:
    """The drafter's best tokens after every node, chosen without chance."""
    token_ids: list[int] = []
    parents: list[int] = []
    level = [(ROOT, last)]
    for _ in range(depth):
        grown = []
        for parent, token_id in level:
            for best in toy.draft[token_id].topk(width).indices.tolist():
                grown.append((len(token_ids), best))
                token_ids.append(best)
                parents.append(parent)
        level = grown
    return DraftTree(tuple(token_ids), tuple(parents))


# -------------------------------------------------------------------------------------- right rules


def emitted(tree: DraftTree, path: Iterable[int], token_id: int) -> list[int]:
    return [*(tree.token_ids[node] for node in path), token_id]


def plain(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    return [draw(toy.target[last], uniforms(1, purpose=Purpose.TOKEN))]


def sampled(*parents: int) -> Round:
    def one_round(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
        tree = draw_shape(toy, last, uniforms, parents=parents)
        probs, draft_probs = rows(toy.target, last, tree), rows(toy.draft, last, tree)
        verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
        return emitted(tree, verdict.path, verdict.token_id)

    return one_round


def heap(num_nodes: int) -> Round:
    def one_round(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
        tree = draw_heap(toy, last, uniforms, num_nodes=num_nodes)
        probs, draft_probs = rows(toy.target, last, tree), rows(toy.draft, last, tree)
        verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
        return emitted(tree, verdict.path, verdict.token_id)

    return one_round


def point_mass(*, width: int, depth: int) -> Round:
    def one_round(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
        tree = choose_top(toy, last, width=width, depth=depth)
        verdict = verify_point_mass(tree, rows(toy.target, last, tree), uniforms=uniforms)
        return emitted(tree, verdict.path, verdict.token_id)

    return one_round


# -------------------------------------------------------------------------------------- wrong rules


@dataclass(frozen=True)
class PositionUniforms:
    """Drafts keyed by position alone: a position drafted again is drafted with the same number."""

    seed: int
    num_committed: int

    def __call__(self, depth: int, *, purpose: Purpose, lane: int = 0) -> float:
        return uniform(
            self.seed,
            position=self.num_committed - 1 + depth,
            purpose=purpose,
            lane=lane,
            round_start=0 if purpose == Purpose.DRAFT else None,
        )


# Drawn first after 0: token 1, which the target hardly ever takes; almost always it takes 2. Below
# token 1 the drafter draws either 0 (number under a half) or a surprise, and only in the first case
# does the heap's third node offer 2 as well. Without that offer the round ends, and the next one,
# after 2, has a number above a half to begin with.
TRAP = Toy(
    target=torch.tensor(
        [
            [0.02, 0.02, 0.90, 0.03, 0.03],
            [0.20, 0.20, 0.20, 0.20, 0.20],
            [0.20, 0.20, 0.20, 0.20, 0.20],
            [0.10, 0.20, 0.30, 0.20, 0.20],
            [0.20, 0.30, 0.10, 0.20, 0.20],
        ]
    ),
    draft=torch.tensor(
        [
            [0.02, 0.60, 0.36, 0.01, 0.01],
            [0.500, 0.125, 0.125, 0.125, 0.125],
            [0.20, 0.20, 0.20, 0.20, 0.20],
            [0.20, 0.20, 0.20, 0.20, 0.20],
            [0.20, 0.20, 0.20, 0.20, 0.20],
        ]
    ),
)


def residual(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0.0)


def wrong_chosen_tested_as_drawn(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    """The drafter's best token, accepted with p / q as if it had been drawn."""
    tree = choose_top(toy, last, width=1, depth=1)
    probs, draft_probs = rows(toy.target, last, tree), rows(toy.draft, last, tree)
    verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
    return emitted(tree, verdict.path, verdict.token_id)


def wrong_top_3_with_independent_coins(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    """Each of the three best tokens has its own p / q coin; p and q are never updated."""
    p, q = toy.target[last], toy.draft[last]
    for lane, token_id in enumerate(q.topk(3).indices.tolist()):
        if uniforms(1, purpose=Purpose.ACCEPT, lane=lane) * q[token_id] < p[token_id]:
            return [token_id]
    return [draw(residual(p, q), uniforms(1, purpose=Purpose.RESIDUAL))]


def wrong_unlikely_children_dropped(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    """Drawn properly, then pruned: children the drafter gave 0.25 or less are not offered."""
    drawn = draw_shape(toy, last, uniforms, parents=(-1, -1, 0, 0, 1, 1))
    kept: dict[int, int] = {ROOT: ROOT}
    token_ids: list[int] = []
    parents: list[int] = []
    for node, (token_id, parent) in enumerate(zip(drawn.token_ids, drawn.parents, strict=True)):
        before = last if parent == ROOT else drawn.token_ids[parent]
        if parent in kept and toy.draft[before, token_id] > 0.25:
            kept[node] = len(token_ids)
            token_ids.append(token_id)
            parents.append(kept[parent])
    tree = DraftTree(tuple(token_ids), tuple(parents))
    probs, draft_probs = rows(toy.target, last, tree), rows(toy.draft, last, tree)
    verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
    return emitted(tree, verdict.path, verdict.token_id)


def wrong_longest_path_of_independent_coins(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    """A chosen tree; every path tosses its own p / q coins; the longest surviving one wins."""
    tree = choose_top(toy, last, width=2, depth=3)
    leaves = [node for node in range(tree.num_nodes) if not tree.children(node)]
    longest: tuple[int, ...] = ()
    for lane, leaf in enumerate(leaves):
        survived = 0
        before = last
        for depth, node in enumerate(tree.path(leaf), start=1):
            token_id = tree.token_ids[node]
            u = uniforms(depth, purpose=Purpose.ACCEPT, lane=lane)
            if u * toy.draft[before, token_id] >= toy.target[before, token_id]:
                break
            survived, before = depth, token_id
        longest = max(longest, tree.path(leaf)[:survived], key=len)
    end = tree.token_ids[longest[-1]] if longest else last
    law = toy.target[end] if len(longest) == 3 else residual(toy.target[end], toy.draft[end])
    u = uniforms(1 + len(longest), purpose=Purpose.RESIDUAL)
    return emitted(tree, longest, draw(law, u))


def wrong_q_of_another_drafter(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    """Drawn from the fuzzy drafter, tested with the q that the calibrated one gives later."""
    tree = draw_shape(toy, last, uniforms, parents=(-1, 0))
    calibrated = 0.5 * toy.draft + 0.5 * toy.target
    probs, draft_probs = rows(toy.target, last, tree), rows(calibrated, last, tree)
    verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
    return emitted(tree, verdict.path, verdict.token_id)


def wrong_same_coin_for_draft_and_accept(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
    """The number that drew a token also decides whether it stays."""

    def shared(depth: int, *, purpose: Purpose, lane: int = 0) -> float:
        return uniforms(
            depth, purpose=Purpose.DRAFT if purpose == Purpose.ACCEPT else purpose, lane=lane
        )

    return sampled(-1, 0)(toy, last, shared)


# -------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Fit:
    """How a sample compares with the law it should follow."""

    distance: float
    """Total variation between the sample's frequencies and the law."""
    noise: float
    """What `distance` would be, on average, for a right rule."""
    chi2: float
    degrees: int

    @property
    def p_value(self) -> float:
        half = torch.tensor([self.degrees / 2, self.chi2 / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))

    def __str__(self) -> str:
        return (
            f"TV {self.distance:.4f} (noise {self.noise:.4f}), "
            f"chi2 {self.chi2:.1f} (df {self.degrees}), p-value {self.p_value:.1e}"
        )


def compare(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> Fit:
    """Chi-square over the cells expected at least five times; the others together make one cell."""
    total = counts.total()
    distance = sum(abs(counts[cell] / total - p) for cell, p in law.items()) / 2
    noise = sum(math.sqrt(p * (1 - p) / (2 * math.pi * total)) for p in law.values())
    large = [cell for cell, p in law.items() if p * total >= 5]
    observed = [counts[cell] for cell in large]
    expected = [law[cell] * total for cell in large]
    if len(large) < len(law):
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return Fit(distance, noise, chi2, len(expected) - 1)


def measure_first_token(one_round: Round, *, num_rounds: int) -> Fit:
    toy = make_toy(12)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(num_rounds):
        counts[(one_round(toy, 0, RoundUniforms(seed, 1))[0],)] += 1
    return compare(counts, {(x,): p for x, p in enumerate(toy.target[0].double().tolist())})


Bind = Callable[[int, int], Uniforms]
"""Seed and number of committed tokens -> the numbers of the round."""


def write(one_round: Round, *, toy: Toy, seed: int, bind: Bind = RoundUniforms) -> tuple[int, ...]:
    """Three tokens after token 0, by whole rounds."""
    tokens = [0]
    while len(tokens) < 4:
        tokens += one_round(toy, tokens[-1], bind(seed, len(tokens)))
    return tuple(tokens[1:4])


def measure_text(
    one_round: Round, *, num_texts: int, toy: Toy | None = None, bind: Bind = RoundUniforms
) -> Fit:
    toy = toy or make_toy(5)
    counts = Counter(write(one_round, toy=toy, seed=seed, bind=bind) for seed in range(num_texts))
    law = toy.target.double().tolist()
    joint: dict[tuple[int, ...], float] = {
        (x, y, z): law[0][x] * law[x][y] * law[y][z]
        for x, y, z in itertools.product(range(5), repeat=3)
    }
    return compare(counts, joint)


def assert_exact(fit: Fit) -> None:
    assert fit.p_value > 1e-4, f"not the target's distribution: {fit}"
    assert fit.distance < 3 * fit.noise, f"not the target's distribution: {fit}"


def assert_caught(fit: Fit) -> None:
    assert fit.p_value < 1e-12, f"this rule is wrong and the test did not notice: {fit}"


# -------------------------------------------------------------------------------------------- tests

CHAINS = {1: sampled(-1), 2: sampled(-1, 0), 3: sampled(-1, 0, 1)}
BUSHY = sampled(-1, -1, 0, 0, 1, 1)


def test_chain_emits_first_tokens_as_the_target_does() -> None:
    assert_exact(measure_first_token(CHAINS[1], num_rounds=100_000))


def test_siblings_without_replacement_emit_first_tokens_as_the_target_does() -> None:
    assert_exact(measure_first_token(sampled(-1, -1, -1), num_rounds=40_000))


def test_top_3_as_point_masses_emit_first_tokens_as_the_target_does() -> None:
    assert_exact(measure_first_token(point_mass(width=3, depth=1), num_rounds=100_000))


@pytest.mark.parametrize("length", CHAINS)
def test_chain_writes_the_target_s_texts(length: int) -> None:
    assert_exact(measure_text(CHAINS[length], num_texts=12_000))


def test_tree_without_replacement_writes_the_target_s_texts() -> None:
    assert_exact(measure_text(BUSHY, num_texts=12_000))


def test_heap_tree_writes_the_target_s_texts() -> None:
    assert_exact(measure_text(heap(6), num_texts=12_000))


@pytest.mark.parametrize("width", [1, 2])
def test_chosen_drafts_write_the_target_s_texts(width: int) -> None:
    assert_exact(measure_text(point_mass(width=width, depth=3), num_texts=12_000))


def test_chosen_drafts_write_the_very_text_of_plain_decoding() -> None:
    toy = make_toy(5)
    for seed in range(1_000):
        text = write(plain, toy=toy, seed=seed)
        assert write(point_mass(width=1, depth=3), toy=toy, seed=seed) == text
        assert write(point_mass(width=2, depth=2), toy=toy, seed=seed) == text


def test_greedy_drafts_write_the_target_s_best_text() -> None:
    toy = make_toy(5)
    best = toy.target.argmax(-1).tolist()

    def one_round(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
        tree = draw_shape(toy, last, uniforms, parents=(-1, -1, 0, 0, 1, 1))
        verdict = verify_greedy(tree, [best[x] for x in (last, *tree.token_ids)])
        return emitted(tree, verdict.path, verdict.token_id)

    for seed in range(200):
        x = best[0]
        assert write(one_round, toy=toy, seed=seed) == (x, best[x], best[best[x]])


def test_heap_tree_is_exact_where_reused_numbers_would_show() -> None:
    assert_exact(measure_text(heap(3), toy=TRAP, num_texts=6_000))


def test_heap_tree_with_numbers_reused_across_rounds_is_caught() -> None:
    assert_caught(measure_text(heap(3), toy=TRAP, num_texts=6_000, bind=PositionUniforms))


@pytest.mark.parametrize("rule", [CHAINS[3], sampled(-1, -1, 0, 0)], ids=["chain", "tree"])
def test_fixed_shapes_are_exact_even_with_numbers_reused_across_rounds(rule: Round) -> None:
    assert_exact(measure_text(rule, toy=TRAP, num_texts=6_000, bind=PositionUniforms))


WRONG_RULES = [
    wrong_chosen_tested_as_drawn,
    wrong_top_3_with_independent_coins,
    wrong_unlikely_children_dropped,
    wrong_longest_path_of_independent_coins,
    wrong_q_of_another_drafter,
    wrong_same_coin_for_draft_and_accept,
]


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_wrong_rule_is_caught_in_the_text(rule: Round) -> None:
    assert_caught(measure_text(rule, num_texts=5_000))


@pytest.mark.parametrize("rule", WRONG_RULES[:2])
def test_wrong_rule_is_caught_in_the_first_token(rule: Round) -> None:
    assert_caught(measure_first_token(rule, num_rounds=5_000))
