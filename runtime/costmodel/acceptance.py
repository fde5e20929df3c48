"""Tokens of a round, by how likely drafts are kept.

A round that drafts `n` tokens emits those that are kept, up to the first that is not, and one of the target's own. The
chance of a draft is that of being kept if all before it were. With layers side by side the first draft of a round comes
from an exact pass, the later ones from approximate ones.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = {1: 1.0, 2: 0.69 / 0.70, 3: 0.67 / 0.70, 4: 0.65 / 0.70, 5: 0.58 / 0.70}
"""Of an exact drafter's acceptance, what is left with so many layers side by side. Assumed: EasySpec (arXiv
2502.02493) reports a loss of at most 7 %, 4 as the best size and 5 as worse, and no figures per size."""


def round_tokens(chances: Sequence[float]) -> float:
    """Tokens that a round emits on average: 1 + the sum of the products of the chances so far."""
    tokens, all_kept = 1.0, 1.0
    for chance in chances:
        all_kept *= chance
        tokens += all_kept
    return tokens


def chain_tokens(chance: float, num_drafts: int) -> float:
    """The same where every draft is as likely: (1 - a^(n+1)) / (1 - a)."""
    return round_tokens([chance] * num_drafts)


def parallel_tokens(chance: float, window: int) -> float:
    """That a pass of the target emits on average where it and the drafter, on ranks of its own, take equally long for
    `window` drafts: PEARL (arXiv 2408.11850), which begins anew after a mismatch with a pass over one token.

    After such a pass comes one over a window with the chance a, and after a window another one with the chance
    a^n; passes over a window emit (1 - a^n) / (1 - a) tokens, the others one.
    """
    all_kept = chance**window
    return (1 - all_kept) / ((1 - chance) * (1 + chance - all_kept))


def tree_tokens(acceptance: float, depth: int) -> float:
    """By EasySpec's measure: `acceptance` is the share of the tree's depth that is kept."""
    return 1.0 + acceptance * depth


def best_draft_length(chance: float, draft_cost: float) -> tuple[int, float]:
    """How many tokens to draft, and the speed-up over none.

    `draft_cost` is a draft's time over that of verifying, which is taken not to grow with the drafts. Drafting goes on
    while the next draft's chance of counting is worth more than its time.
    """
    num_drafts = 0
    while chance ** (num_drafts + 1) > (
        draft_cost * chain_tokens(chance, num_drafts) / (1 + num_drafts * draft_cost)
    ):
        num_drafts += 1
    return num_drafts, chain_tokens(chance, num_drafts) / (1 + num_drafts * draft_cost)
