"""What interleaving halves of a batch, or drafting ahead on ranks of its own, makes of a pair of models.

    lockstep      all ranks: drafter, then target                         time of both
    interleaved   all ranks: drafter for one half, target for the other   each reads its weights once per half
    ahead         g ranks the drafter's, the others the target's          a slower target, drafting off its path

Times are those of `passes`, tokens those of `simulate`. Two passes on one rank share its memory, its arithmetic and
the host that launches them; what they wait for, collectives and kernels that begin, either does while the other runs.
That is the best that streams can do; caches and schedulers of GPUs make it worse.
"""

from __future__ import annotations

from dataclasses import replace

from paceline.runtime.costmodel.memory import RankMemory, held, rank_memory
from paceline.runtime.costmodel.passes import Pass
from paceline.runtime.costmodel.rounds import (
    Choice,
    Drafting,
    Round,
    Setting,
    draft_pass,
    drafts_of,
    engine_memory,
    telling_s,
    verify_pass,
)
from paceline.runtime.costmodel.simulate import (
    Lanes,
    Span,
    Stages,
    ahead,
    draw_interleaved,
    draw_lockstep,
)

PASSES = 600
"""Of the target that are simulated, over all sequences: the speed is then known to about 3 %, and as much too low at a
large batch, as the first passes find no drafts."""
SEED = 1


def stages_of(setting: Setting, drafting: Drafting) -> Stages:
    """Times of one schedule's stages, for the sequences that share a pass: all, or half where halves take turns."""
    first, later, verify, plain = _passes(setting, drafting)
    machine, told_s, told_drafts_s = setting.machine, telling_s(setting, drafting), 0.0
    if drafting.schedule == "ahead":  # its ranks tell each other; the target's hear by the plan
        told_drafts_s = machine.all_reduce_s(0, ranks=drafting.draft_tensor_parallel_size)
        ranks = target_ranks(setting, drafting)
        told_s = machine.execution.step_s + machine.all_reduce_s(0, ranks=ranks)
    return Stages(
        first_s=first.total_s + told_drafts_s,
        later_s=later.total_s + told_drafts_s,
        verify_s=verify.total_s,
        plain_s=plain.total_s,
        telling_s=told_s,
    )


def target_ranks(setting: Setting, drafting: Drafting) -> int:
    """Those that the target has."""
    taken = drafting.draft_tensor_parallel_size if drafting.schedule == "ahead" else 0
    return setting.ranks - taken


def together_s(setting: Setting, drafting: Drafting) -> float:
    """Drafting for one half of the batch and verifying the other, side by side on the same ranks."""
    first, later, verify, _ = _passes(setting, drafting)
    more = drafting.num_speculative_tokens - 1
    return max(
        first.total_s + more * later.total_s,
        verify.total_s,
        first.busy_s + more * later.busy_s + verify.busy_s,
        first.launches_s + more * later.launches_s + verify.launches_s,
    )


def _passes(setting: Setting, drafting: Drafting) -> tuple[Pass, Pass, Pass, Pass]:
    """The drafter's first and later ones, the target's over drafts and over none."""
    if drafting.schedule == "interleaved":
        setting = replace(setting, batch=-(-setting.batch // 2))
    ranks = target_ranks(setting, drafting)
    tokens = drafts_of(setting, drafting).round_tokens
    return (
        draft_pass(setting, drafting, rows_each=tokens, exact=True),
        draft_pass(setting, drafting, rows_each=drafting.tree_width, exact=False),
        verify_pass(setting, drafting.num_nodes, ranks=ranks),
        verify_pass(setting, 0, ranks=ranks),
    )


def evaluate_interleaved(setting: Setting, drafting: Drafting) -> Choice:
    """Two halves in turn: each is drafted for, then verified, so that a round of a half takes two slots."""
    stages, drafts = stages_of(setting, drafting), drafts_of(setting, drafting)
    drafting_s = stages.drafting_s(drafts.depth)
    made = Round(
        exact_s=stages.first_s,
        grouped_s=drafting_s - stages.first_s,
        verify_s=stages.verify_s,
        telling_s=2 * stages.telling_s,
        tokens=drafts.round_tokens,
        overlapped_s=drafting_s + stages.verify_s - 2 * together_s(setting, drafting),
    )
    return _choice(setting, drafting, made, engine_memory(setting, drafting))


def evaluate_ahead(setting: Setting, drafting: Drafting) -> Choice:
    """Simulated. A round is one pass of the target; drafting is what the drafter does meanwhile."""
    stages = stages_of(setting, drafting)
    passes = max(30, PASSES // setting.batch)
    drafts = drafts_of(setting, drafting)
    run = ahead(stages, drafts, batch=setting.batch, passes=passes, seed=SEED)
    made = Round(
        exact_s=run.exact_s / passes,
        grouped_s=run.grouped_s / passes,
        verify_s=run.seconds / passes - stages.telling_s,
        telling_s=stages.telling_s,
        tokens=run.tokens / (passes * setting.batch),
        overlapped_s=(run.exact_s + run.grouped_s) / passes,
    )
    return _choice(setting, drafting, made, _apart_memory(setting, drafting))


def _choice(setting: Setting, drafting: Drafting, made: Round, memory: RankMemory) -> Choice:
    return Choice(
        drafting=drafting,
        round=made,
        memory=memory,
        tokens_per_s=setting.batch * made.tokens / made.total_s,
    )


def _apart_memory(setting: Setting, drafting: Drafting) -> RankMemory:
    """Of the rank with room for fewest tokens: one of the target's, or one of the drafter's."""
    assert setting.drafter is not None, "expected a drafter to draft with"
    parts = (
        held(setting.target, ranks=target_ranks(setting, drafting)),
        held(setting.drafter, ranks=drafting.draft_tensor_parallel_size),
    )
    ranks = [
        rank_memory(
            part, None, gpu_bytes=setting.machine.gpu.memory_bytes, utilization=setting.utilization
        )
        for part in parts
    ]
    return min(ranks, key=lambda memory: memory.kv_tokens)


def spans_of(setting: Setting, drafting: Drafting, *, rounds: int = 4) -> list[Span]:
    """What each rank does in the first rounds; ahead, in twice as many passes of the target."""
    stages, drafts = stages_of(setting, drafting), drafts_of(setting, drafting)
    first, mine = target_ranks(setting, drafting), range(drafting.draft_tensor_parallel_size)
    if drafting.schedule == "ahead":
        lanes = Lanes(target=range(first), drafter=[first + rank for rank in mine])
        ahead(stages, drafts, batch=setting.batch, passes=2 * rounds, seed=SEED, lanes=lanes)
        return lanes.spans
    lanes = Lanes(target=range(first), drafter=mine)
    if drafting.schedule == "lockstep":
        draw_lockstep(stages, drafts, rounds=rounds, lanes=lanes)
    else:
        beside_s = together_s(setting, drafting)
        draw_interleaved(stages, drafts, together_s=beside_s, rounds=rounds, lanes=lanes)
    return lanes.spans
