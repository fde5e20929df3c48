"""What each verification rule accepts, emits and reads, on trees small enough to check by eye.

That the emitted text has the right distribution is measured in test_lossless_rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paceline.runtime.sampling.sampler import Purpose, RoundUniforms, draw
from paceline.runtime.spec.tree import ROOT, DraftTree
from paceline.runtime.spec.verify import (
    Verdict,
    verify_greedy,
    verify_point_mass,
    verify_sampled,
)

torch.set_num_threads(1)

LAST_U = 1.0 - 2.0**-53
#        root
#       /    \
#     5 (0)  6 (1)
#    /   \      \
#  7 (2) 8 (3)   7 (4)
TREE = DraftTree((5, 6, 7, 8, 7), (-1, -1, 0, 0, 1))


@dataclass
class Fixed:
    """The same number for everything, with a record of what was asked for."""

    u: float
    asked: list[tuple[int, Purpose, int]] = field(default_factory=list)

    def __call__(self, depth: int, *, purpose: Purpose, lane: int = 0) -> float:
        self.asked.append((depth, purpose, lane))
        return self.u


def one_hot(*token_ids: int, vocab_size: int = 10) -> Tensor:
    """One row per token id [len(token_ids), V]."""
    return torch.nn.functional.one_hot(torch.tensor(token_ids), vocab_size).float()


@st.composite
def rounds(draw_: st.DrawFn) -> tuple[DraftTree, Tensor, Tensor, int]:
    """A tree honestly drawn from q; p and q [1 + n, 6], with zeros; the seed it was drawn by."""
    vocab_size = 6
    num_nodes = draw_(st.integers(0, 6))
    weights = st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=vocab_size, max_size=vocab_size
    ).filter(any)
    probs, draft_probs = (
        torch.tensor([draw_(weights) for _ in range(1 + num_nodes)]) for _ in range(2)
    )
    probs, draft_probs = (x / x.sum(-1, keepdim=True) for x in (probs, draft_probs))
    seed = draw_(st.integers(0, 2**32))
    uniforms = RoundUniforms(seed, 1)
    left = draft_probs.clone()
    token_ids: list[int] = []
    parents: list[int] = []
    for node in range(num_nodes):
        able = [parent for parent in range(ROOT, node) if left[1 + parent].any()]
        if not able:
            break
        parent = draw_(st.sampled_from(able))
        u = uniforms(1, purpose=Purpose.DRAFT, lane=node)
        token_ids.append(draw(left[1 + parent], u))
        parents.append(parent)
        left[1 + parent, token_ids[-1]] = 0.0
    tree = DraftTree(tuple(token_ids), tuple(parents))
    return tree, probs[: 1 + tree.num_nodes], draft_probs, seed


# ------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize(
    ("best_token_ids", "verdict"),
    [
        ([9, 0, 0, 0, 0, 0], Verdict((), 9)),
        ([5, 9, 7, 7, 7, 7], Verdict((0,), 9)),
        ([5, 8, 0, 0, 3, 0], Verdict((0, 3), 3)),
        ([6, 0, 7, 0, 0, 4], Verdict((1, 4), 4)),
    ],
)
def test_greedy_follows_the_best_tokens_while_they_are_drafted(
    best_token_ids: list[int], verdict: Verdict
) -> None:
    assert verify_greedy(TREE, best_token_ids) == verdict
    assert verdict.num_accepted == len(verdict.path)


def test_round_without_drafts_emits_one_token() -> None:
    nothing = DraftTree.chain([])
    probs = one_hot(4)
    assert verify_greedy(nothing, [4]) == Verdict((), 4)
    assert verify_point_mass(nothing, probs, uniforms=Fixed(0.5)) == Verdict((), 4)
    uniforms = Fixed(0.5)
    assert verify_sampled(nothing, probs, probs[:0], uniforms=uniforms) == Verdict((), 4)
    assert uniforms.asked == [(1, Purpose.TOKEN, 0)]


@given(rounds())
def test_point_mass_rule_on_certain_targets_is_the_greedy_rule(
    given_round: tuple[DraftTree, Tensor, Tensor, int],
) -> None:
    tree, probs, _, seed = given_round
    best = probs.argmax(-1).tolist()
    certain = one_hot(*best, vocab_size=6)
    verdict = verify_point_mass(tree, certain, uniforms=RoundUniforms(seed, 1))
    assert verdict == verify_greedy(tree, best)


# --------------------------------------------------------------------------------------- point mass


def test_point_mass_reads_one_number_per_emitted_token() -> None:
    uniforms = Fixed(0.5)
    verdict = verify_point_mass(TREE, one_hot(5, 8, 0, 0, 3, 0), uniforms=uniforms)
    assert verdict == Verdict((0, 3), 3)
    assert uniforms.asked == [(depth, Purpose.TOKEN, 0) for depth in (1, 2, 3)]


def test_point_mass_is_plain_decoding_even_for_drafts_that_foresee_the_numbers() -> None:
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(4, 4)  # the same law after every token
    num_accepted = 0
    for seed in range(100):
        uniforms = RoundUniforms(seed, 1)
        plain = [draw(probs[0], uniforms(depth, purpose=Purpose.TOKEN)) for depth in (1, 2, 3, 4)]
        foreseen = DraftTree.chain([*plain[:2], (plain[2] + 1) % 4])  # two right, one wrong
        verdict = verify_point_mass(foreseen, probs, uniforms=uniforms)
        assert [*plain[:2], verdict.token_id] == plain[:3]
        num_accepted += verdict.num_accepted
    assert num_accepted == 200


# ------------------------------------------------------------------------------------------ sampled


def test_drafts_from_the_target_itself_are_always_accepted() -> None:
    probs = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    chain = DraftTree.chain([3, 1, 4])
    for u in (0.0, 0.5, LAST_U):
        uniforms = Fixed(u)
        assert verify_sampled(chain, probs, probs, uniforms=uniforms).path == (0, 1, 2)
        expected = [(depth, Purpose.ACCEPT, 0) for depth in (1, 2, 3)]
        assert uniforms.asked == [*expected, (4, Purpose.TOKEN, 0)]


def test_token_the_target_excludes_is_rejected_even_by_a_coin_of_zero() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    draft_probs = torch.tensor([[1.0, 0.0, 0.0]])
    uniforms = Fixed(0.0)
    verdict = verify_sampled(DraftTree.chain([0]), probs, draft_probs, uniforms=uniforms)
    assert verdict == Verdict((), 1)
    assert uniforms.asked == [(1, Purpose.ACCEPT, 0), (1, Purpose.RESIDUAL, 0)]


def test_recovered_token_comes_from_where_the_target_exceeds_the_draft() -> None:
    probs = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    draft_probs = torch.tensor([[0.8, 0.1, 0.1]])  # what is left: 0, 0.4, 0.2
    tree = DraftTree.chain([0])
    for recovered, expected in ((0.0, 1), (0.66, 1), (0.67, 2), (LAST_U, 2)):

        def uniforms(depth: int, *, purpose: Purpose, lane: int = 0, u: float = recovered) -> float:
            return 0.26 if purpose == Purpose.ACCEPT else u  # 0.26 x 0.8 > 0.2

        assert verify_sampled(tree, probs, draft_probs, uniforms=uniforms) == Verdict((), expected)


def test_siblings_are_offered_in_drawing_order_with_what_the_first_left() -> None:
    probs = torch.tensor([[0.1, 0.3, 0.6], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    draft_probs = torch.tensor([[0.5, 0.5, 0.0]])
    tree = DraftTree((0, 1), (-1, -1))
    # Token 0 survives a coin under 0.2. Then R = (0, 0, 1), Q = (0, 1, 0): token 1 never survives.
    assert verify_sampled(tree, probs, draft_probs, uniforms=Fixed(0.19)) == Verdict((0,), 2)
    uniforms = Fixed(0.21)
    assert verify_sampled(tree, probs, draft_probs, uniforms=uniforms) == Verdict((), 2)
    assert uniforms.asked == [
        (1, Purpose.ACCEPT, 0),
        (1, Purpose.ACCEPT, 1),
        (1, Purpose.RESIDUAL, 0),
    ]


def test_residual_lost_to_rounding_leaves_the_target_as_it_was() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    # Above p everywhere, by one unit of rounding.
    draft_probs = torch.tensor([[0.5000001, 0.5, 0.0]])
    verdict = verify_sampled(DraftTree.chain([0]), probs, draft_probs, uniforms=Fixed(LAST_U))
    assert verdict == Verdict((), 1)


@given(rounds())
def test_sampled_emits_only_tokens_the_target_may_emit(
    given_round: tuple[DraftTree, Tensor, Tensor, int],
) -> None:
    tree, probs, draft_probs, seed = given_round
    before = probs.clone(), draft_probs.clone()
    verdict = verify_sampled(tree, probs, draft_probs, uniforms=RoundUniforms(seed, 1))
    node = ROOT
    for accepted in verdict.path:
        assert tree.parents[accepted] == node
        assert probs[1 + node, tree.token_ids[accepted]] > 0.0
        node = accepted
    assert probs[1 + node, verdict.token_id] > 0.0
    assert torch.equal(probs, before[0])
    assert torch.equal(draft_probs, before[1])


@given(rounds(), st.sampled_from([0.0, 0.3, 0.9, LAST_U]))
def test_no_number_is_read_for_a_position_the_round_does_not_commit(
    given_round: tuple[DraftTree, Tensor, Tensor, int], u: float
) -> None:
    tree, probs, draft_probs, _ = given_round
    uniforms = Fixed(u)
    verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
    assert max(depth for depth, _, _ in uniforms.asked) == verdict.num_accepted + 1
    assert len(set(uniforms.asked)) == len(uniforms.asked)
    assert all(purpose != Purpose.DRAFT for _, purpose, _ in uniforms.asked)


# ------------------------------------------------------------------------------------------- misuse


def test_rows_that_do_not_fit_the_tree_are_refused() -> None:
    chain = DraftTree.chain([1, 2])
    with pytest.raises(AssertionError, match="one best token per row, expected 3, found 2"):
        verify_greedy(chain, [1, 2])
    with pytest.raises(AssertionError, match="one distribution per row, expected 3, found 2"):
        verify_point_mass(chain, one_hot(1, 2), uniforms=Fixed(0.5))
    with pytest.raises(AssertionError, match="one distribution per row, expected 3, found 2"):
        verify_sampled(chain, one_hot(1, 2), one_hot(1, 2), uniforms=Fixed(0.5))
    with pytest.raises(AssertionError, match="one vocabulary, found 10 and 9"):
        verify_sampled(chain, one_hot(1, 2, 3), one_hot(1, 2, vocab_size=9), uniforms=Fixed(0.5))


def test_draft_that_its_q_excludes_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"token 1 cannot have been drawn, its q is 0\.0"):
        verify_sampled(DraftTree.chain([1]), one_hot(1, 2), one_hot(2), uniforms=Fixed(0.5))


def test_sibling_drawn_from_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="drawn after token 1, which had all of q"):
        verify_sampled(
            DraftTree((1, 2), (-1, -1)), one_hot(3, 3, 3), one_hot(1), uniforms=Fixed(0.5)
        )
