"""Verification, in pure functions: which drafts the target keeps, and the one token it adds.

    draft      a token proposed by the drafter: a node of the tree
    accepted   a draft the target keeps; accepted drafts form a path from the root
    recovered  the target's own token where no draft was accepted although there were some
    bonus      the target's own token after a leaf, every draft down to it being accepted

A round emits the accepted drafts and then exactly one token, recovered or bonus. Three rules, all
of which leave the text distributed as the target alone would have written it:

    verify_greedy      temperature 0: follow the target's best token while a draft matches
    verify_point_mass  drafts chosen without chance (n-gram, top-k, beam): sample, then match
    verify_sampled     drafts drawn from q, without replacement among siblings: accept with p / q

Drafts that were *chosen* must never be tested with p / q: q was not the chance of that token to be
proposed. And q must be the distribution used for drawing, not a better one computed later.

Why the text is exact, round after round
----------------------------------------
Within a round, take the draws in the order of time. A child y is drawn from Q, which is q without
the siblings drawn before it, and whether it is drawn at all is settled before it is. Let R be the
law that the next token must still follow. Accepting y with min(1, R/Q), and leaving norm((R - Q)+)
to what comes after a rejection, gives a token of law R whatever Q was. The next sibling's and the
next depth's numbers are fresh; so, by induction, each token emitted has the law p given those
before it.

Across rounds the numbers of a round must moreover be independent of all that earlier rounds let
out. They are keyed by position (sampling/sampler.py), and several rounds may visit one position:
after a rejection at 7, a round that drafted 7 8 9 leaves 8 and 9 to be drafted again. By purpose:

- ACCEPT, RESIDUAL and TOKEN at position t are read only once everything before t is accepted, and
  then the round commits t. No later round comes back to t: each is read in one round only.
- DRAFT at position t is read by every round that reaches t. If it were keyed by position alone:
  - In a chain the text would still be exact. What a round commits up to position t, and whether it
    ends there, depends on numbers at positions <= t only. Those after t shaped drafts that were
    thrown away unread, and are as good as new. So too in a tree whose shape is fixed in advance.
  - In a tree that grows where its drafts score well (DySpec) it would not. Whether position t gets
    a second child, and so whether the round gets beyond t after the first is rejected, depends on
    what was drawn *below* the first: on DRAFT numbers after t. Where the round ends at t, the next
    one begins with those numbers, and given that it ended they are no longer uniform.
    tests/cpu/test_lossless_rules.py holds a pair of models where this moves a tenth of the
    probability. The same goes for anything that carries news of discarded drafts to the next round,
    such as a draft length set by their confidence.

Hence DRAFT is keyed by the number of tokens committed when its round began as well. A round commits
at least one token, so no DRAFT number is read in two rounds, and a drafter may remember and decide
what it likes.

The text stays a function of the seed. Rounds are atomic, so a request that is preempted or
restarted comes back to the same round starts and draws the same numbers. Sampled drafting does
depend, in its text though never in its law, on where rounds start: on the draft budget of each.
Sample-then-match does not: position t reads TOKEN at t and nothing else, so the text is that of
plain decoding with the same seed, for any drafts at all, even drafts made with foreknowledge of the
numbers.

Letters: V vocabulary, n nodes of the tree. Rows of [1 + n, V]: row 0 is after the root, row 1 + i
after node i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from paceline.runtime.sampling.sampler import Purpose, Uniforms, draw
from paceline.runtime.spec.tree import ROOT, DraftTree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round emits: the tokens of the nodes on `path`, then `token_id`."""

    path: tuple[int, ...]
    """The accepted nodes, from the root down."""
    token_id: int
    """The recovered or bonus token."""

    @property
    def num_accepted(self) -> int:
        return len(self.path)

    def emitted(self, tree: DraftTree) -> tuple[int, ...]:
        """The round's tokens."""
        return (*(tree.token_ids[node] for node in self.path), self.token_id)


def verify_greedy(tree: DraftTree, best_token_ids: Sequence[int]) -> Verdict:
    """Accept drafts that are the target's best token. `best_token_ids`: 1 + n of them, by row.

    Among equal logits the best token is the one of lowest id, everywhere and on every rank.
    """
    assert len(best_token_ids) == 1 + tree.num_nodes, (
        f"one best token per row, expected {1 + tree.num_nodes}, found {len(best_token_ids)}"
    )
    return verify_chosen(tree, lambda node, _depth: best_token_ids[1 + node])


def accepted_of_chain(draft_token_ids: Sequence[int], own_token_ids: Sequence[int]) -> int:
    """How many drafts of a chain the target's own tokens agree with: `verify_greedy` and
    `verify_point_mass` of a chain, given the token of each of its 1 + n rows."""
    assert len(own_token_ids) == 1 + len(draft_token_ids), (
        f"one token per row, expected {1 + len(draft_token_ids)}, found {len(own_token_ids)}"
    )
    kept = 0
    while kept < len(draft_token_ids) and draft_token_ids[kept] == own_token_ids[kept]:
        kept += 1
    return kept


def verify_point_mass(
    tree: DraftTree,
    probs: Tensor,  # [1 + n, V]
    *,
    uniforms: Uniforms,
) -> Verdict:
    """Draw the target's token and go on to the draft that matches it, if there is one.

    A draft y is accepted with probability p(y): what rejection gives when q is a point mass.
    """
    assert probs.shape[0] == 1 + tree.num_nodes, (
        f"one distribution per row, expected {1 + tree.num_nodes}, found {probs.shape[0]}"
    )
    return verify_chosen(
        tree, lambda node, depth: draw(probs[1 + node], uniforms(depth, purpose=Purpose.TOKEN))
    )


def verify_chosen(tree: DraftTree, next_token_id: Callable[[int, int], int]) -> Verdict:
    """Go down as long as the target's token is drafted. `next_token_id` is that token by the node it
    follows and by its own depth; it is asked along the path alone."""
    path: list[int] = []
    node = ROOT
    while True:
        token_id = next_token_id(node, 1 + len(path))
        for child in tree.children(node):
            if tree.token_ids[child] == token_id:
                node = child
                path.append(child)
                break
        else:
            return Verdict(tuple(path), token_id)


def verify_sampled(
    tree: DraftTree,
    probs: Tensor,  # [1 + n, V]
    draft_probs: Tensor,  # [at least 1 + the last node that has children, V]
    *,
    uniforms: Uniforms,
) -> Verdict:
    """Accept each child in drawing order with min(1, R/Q), R and Q shrinking by what was rejected.

    Row 1 + k of `draft_probs` is the normalised q that k's children were drawn from, the second
    child from q without the first, and so on. Rows of leaves are never read. Reads a few single
    elements per visited node and whole rows only where a draft is rejected, so leave large tensors
    where they are.
    """
    assert probs.shape[0] == 1 + tree.num_nodes, (
        f"one distribution per row, expected {1 + tree.num_nodes}, found {probs.shape[0]}"
    )
    assert probs.shape[1] == draft_probs.shape[1], (
        f"one vocabulary, found {probs.shape[1]} and {draft_probs.shape[1]}"
    )
    path: list[int] = []
    node = ROOT
    while children := tree.children(node):
        depth = 1 + len(path)
        target, draft = probs[1 + node], draft_probs[1 + node]  # [V], R and Q
        for lane, child in enumerate(children):
            token_id = tree.token_ids[child]
            q = draft[token_id].item()
            assert q > 0.0, f"node {child}: token {token_id} cannot have been drawn, its q is {q}"
            # u q < p is u < p / q without the division. Strictly less: u may be 0, and a token the
            # target gives no probability is then still rejected; u is never 1, so p >= q still
            # always accepts.
            u = uniforms(depth, purpose=Purpose.ACCEPT, lane=lane)
            if u * q < target[token_id].item():
                node = child
                path.append(child)
                break
            target = _subtract(target, draft)
            if lane + 1 < len(children):
                draft = _without(draft, token_id)
        else:
            u = uniforms(depth, purpose=Purpose.RESIDUAL)
            return Verdict(tuple(path), draw(target, u))
    u = uniforms(1 + len(path), purpose=Purpose.TOKEN)
    return Verdict(tuple(path), draw(probs[1 + node], u))


def _subtract(target: Tensor, draft: Tensor) -> Tensor:
    """norm((R - Q)+) [V], or R where nothing is left, which only rounding can bring about."""
    left = (target - draft).clamp_(min=0.0)
    mass = left.sum()
    return left.div_(mass) if mass.item() > 0.0 else target


def _without(draft: Tensor, token_id: int) -> Tensor:
    """Q [V] once `token_id` has been drawn and cannot be drawn again."""
    rest = draft.clone()
    rest[token_id] = 0.0
    mass = rest.sum()
    assert mass.item() > 0.0, f"a sibling drawn after token {token_id}, which had all of q"
    return rest.div_(mass)
