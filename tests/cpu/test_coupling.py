"""Tokens drawn by race follow their law, drafter and target agree often, and drafts change nothing.

Power: with 100,000 draws over 12 tokens a law that is off by 2 % (root mean square, relative) is
seen nine times in ten. Wrong draws must fail with a p-value below 1e-12.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paceline.runtime.sampling import batch
from paceline.runtime.sampling.batch import (
    SampleRequest,
    SampleState,
    draft_probs,
    draft_tokens,
    target_probs,
    target_tokens,
)
from paceline.runtime.sampling.filters import distribution
from paceline.runtime.sampling.sampler import (
    Purpose,
    RoundUniforms,
    draw,
    draw_coupled,
    gumbel_noise,
    uniform,
)
from paceline.runtime.spec.tree import DraftTree
from paceline.runtime.spec.verify import verify_greedy, verify_sampled
from paceline.runtime.types import Request, SamplingParams

torch.set_num_threads(1)

CPU = torch.device("cpu")
Noise = Callable[..., Tensor]


def chi2_p_value(observed: list[int], expected: list[float]) -> float:
    """Cells expected less than five times together make one."""
    large = [i for i, e in enumerate(expected) if e >= 5]
    cells = [(observed[i], expected[i]) for i in large]
    if len(large) < len(expected):
        cells.append(
            (sum(observed) - sum(o for o, _ in cells), sum(expected) - sum(e for _, e in cells))
        )
    chi2 = sum((o - e) ** 2 / e for o, e in cells if e > 0)
    half = torch.tensor([(len(cells) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def make_state(
    params: SamplingParams,
    *,
    seed: int,
    vocab_size: int,
    prompt: tuple[int, ...] = (0,),
    written: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
) -> SampleState:
    request = Request(
        request_id="r",
        prompt_token_ids=prompt,
        params=params,
        seed=seed,
        max_tokens=99,
        eos_token_ids=eos,
    )
    return SampleState(request, vocab_size=vocab_size, device=CPU, output_token_ids=written)


# ---------------------------------------------------------------------------------- the law, one row


def race_p_value(logits: Tensor, noise: Tensor) -> float:
    """Chi-square of the winners against softmax(logits)."""
    drawn = draw_coupled(logits.expand(len(noise), -1), noise)
    observed = torch.bincount(drawn, minlength=len(logits)).tolist()
    expected = (logits.double().softmax(-1) * len(noise)).tolist()
    return chi2_p_value(observed, expected)


def test_winners_follow_the_law_and_the_test_would_notice_if_not() -> None:
    count = 100_000
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -2.0, 0.5, 0.5, 1.5, -3.0, 0.1, 0.7])
    along_seeds = gumbel_noise(list(range(count)), [7] * count, vocab_size=12, device=CPU)
    along_text = gumbel_noise([7] * count, list(range(count)), vocab_size=12, device=CPU)
    assert race_p_value(logits, along_seeds) > 1e-4
    assert race_p_value(logits, along_text) > 1e-4
    assert race_p_value(logits, 0.95 * along_seeds) < 1e-12
    normal = torch.randn(along_seeds.shape, generator=torch.Generator().manual_seed(0))
    assert race_p_value(logits, 1.28 * normal) < 1e-12


def test_rare_tokens_of_a_large_vocabulary_come_as_often_as_they_should() -> None:
    vocab_size, count = 50_000, 4_000
    logits = torch.zeros(vocab_size)
    observed = [0] * 20
    for start in range(0, count, 200):
        seeds = list(range(start, start + 200))
        noise = gumbel_noise(seeds, [0] * 200, vocab_size=vocab_size, device=CPU)
        for token_id in draw_coupled(logits.expand(200, -1), noise).tolist():
            observed[token_id * 20 // vocab_size] += 1
    assert chi2_p_value(observed, [count / 20] * 20) > 1e-4


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.4, top_p=0.8),
        SamplingParams(min_p=0.1, top_k=7, top_p=0.95),
        SamplingParams(logit_bias={2: -1.0, 3: 2.0}, repetition_penalty=1.3),
    ],
    ids=["plain", "top_k", "top_p", "all filters", "processed"],
)
def test_target_tokens_follow_the_processed_law(params: SamplingParams) -> None:
    vocab_size, count = 300, 20_000
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(4))
    logits[20:] -= 12.0  # the window has to choose, few tokens matter
    requests = [
        SampleRequest(state=make_state(params, seed=seed, vocab_size=vocab_size))
        for seed in range(count)
    ]
    drawn = Counter(row[0] for row in target_tokens(logits.expand(count, -1), requests))
    probs = target_probs(logits.unsqueeze(0), requests[0])[0].double().tolist()
    assert all(probs[token_id] > 0.0 for token_id in drawn)
    observed = [drawn[i] for i in range(vocab_size)]
    assert chi2_p_value(observed, [p * count for p in probs]) > 1e-4


# -------------------------------------------------------------------------------- the law, whole texts


def write_many(count: int, *, target: Tensor, draft: Tensor, length: int, drafts: int) -> Counter:  # type: ignore[type-arg]
    """`count` texts of a Markov chain after token 0, by coupled rounds, all in one batch."""
    vocab_size = len(target)
    params = SamplingParams(max_tokens=None)
    states = [make_state(params, seed=seed, vocab_size=vocab_size) for seed in range(count)]
    texts: list[tuple[int, ...]] = [()] * count
    while live := [i for i in range(count) if len(texts[i]) < length]:
        last = [(0, *texts[i])[-1] for i in live]
        chains: list[tuple[int, ...]] = [()] * len(live)
        for _ in range(drafts):
            requests = [
                SampleRequest(state=states[i], drafts=chain)
                for i, chain in zip(live, chains, strict=True)
            ]
            fed = torch.tensor([(x, *chain)[-1] for x, chain in zip(last, chains, strict=True)])
            proposed = draft_tokens(draft[fed], requests).tolist()
            chains = [(*chain, new) for chain, new in zip(chains, proposed, strict=True)]
        requests = [
            SampleRequest(state=states[i], drafts=chain)
            for i, chain in zip(live, chains, strict=True)
        ]
        rows = [t for x, chain in zip(last, chains, strict=True) for t in (x, *chain)]
        found = target_tokens(target[torch.tensor(rows)], requests)
        for i, chain, tokens in zip(live, chains, found, strict=True):
            verdict = verify_greedy(DraftTree.chain(chain), tokens)
            emitted = (*chain[: verdict.num_accepted], verdict.token_id)
            states[i].commit(emitted)
            texts[i] += emitted
    return Counter(text[:length] for text in texts)


def joint_p_value(texts: Counter, target: Tensor) -> float:  # type: ignore[type-arg]
    law = target.double().softmax(-1).tolist()
    vocab_size = len(target)
    cells = list(itertools.product(range(vocab_size), repeat=3))
    expected = [law[0][x] * law[x][y] * law[y][z] * texts.total() for x, y, z in cells]
    return chi2_p_value([texts[cell] for cell in cells], expected)


def toys() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = 1.2 * torch.randn(5, 5, generator=generator)
    return target, 0.5 * target + 0.8 * torch.randn(5, 5, generator=generator)


def test_coupled_rounds_write_the_target_s_texts() -> None:
    target, draft = toys()
    alone = write_many(10_000, target=target, draft=draft, length=3, drafts=0)
    assert joint_p_value(alone, target) > 1e-4
    for drafts in (1, 3):
        assert write_many(10_000, target=target, draft=draft, length=3, drafts=drafts) == alone


def test_noise_without_positions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(seeds: list[int], positions: list[int], **rest: object) -> Tensor:
        return gumbel_noise(seeds, [0] * len(positions), **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "gumbel_noise", frozen)
    target, draft = toys()
    texts = write_many(4_000, target=target, draft=draft, length=3, drafts=2)
    assert joint_p_value(texts, target) < 1e-12


# ------------------------------------------------------------------------------------------- agreement


def test_drafter_and_target_agree_at_least_as_often_as_the_bound_says() -> None:
    count = 20_000
    generator = torch.Generator().manual_seed(1)
    noise = gumbel_noise(list(range(count)), [3] * count, vocab_size=20, device=CPU)
    other = gumbel_noise(list(range(count)), [4] * count, vocab_size=20, device=CPU)
    would_notice = 0
    for closeness in (0.1, 0.5, 1.0, 2.0):
        p = 2 * torch.randn(20, generator=generator)
        q = p + closeness * torch.randn(20, generator=generator)
        distance = float((p.softmax(-1) - q.softmax(-1)).abs().sum() / 2)
        bound = (1 - distance) / (1 + distance)
        slack = 4 * (bound * (1 - bound) / count) ** 0.5 + 1e-9
        mine = draw_coupled(p.expand(count, -1), noise)
        theirs = draw_coupled(q.expand(count, -1), noise)
        matches = float((mine == theirs).double().mean())
        assert bound - slack <= matches <= 1 - distance + slack  # no coupling beats 1 - TV
        apart = draw_coupled(q.expand(count, -1), other)
        would_notice += float((mine == apart).double().mean()) < bound - slack
    assert would_notice == 4


# --------------------------------------------------------------------------------------- the same text

VOCAB = 40

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 3, 10]),
    top_p=st.sampled_from([1.0, 1.0, 0.6, 0.95]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([None, {3: 2.0, 7: -100.0}]),
    min_tokens=st.integers(0, 6),
    max_tokens=st.none(),
)
TABLE = 2 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(9))


def toy_logits(tokens: tuple[int, ...]) -> Tensor:
    """A target that looks two tokens back."""
    return TABLE[tokens[-2], tokens[-1]]


def plain_text(params: SamplingParams, *, seed: int, length: int) -> tuple[int, ...]:
    """One token at a time, alone."""
    state = make_state(params, seed=seed, vocab_size=VOCAB, prompt=(1, 2), eos=(0,))
    text: tuple[int, ...] = ()
    while len(text) < length:
        logits = toy_logits((1, 2, *text)).unsqueeze(0)
        (tokens,) = target_tokens(logits, [SampleRequest(state=state)])
        state.commit(tokens)
        text += tuple(tokens)
    return text


@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 999), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_text_is_the_same_whatever_is_drafted_batched_or_preempted(
    all_params: list[SamplingParams], seed: int, random: object
) -> None:
    length = 9
    expected = [
        plain_text(params, seed=seed + i, length=length) for i, params in enumerate(all_params)
    ]
    pick = random.randrange  # type: ignore[attr-defined]
    texts: list[tuple[int, ...]] = [()] * len(all_params)
    states: dict[int, SampleState] = {}
    while waiting := [i for i, text in enumerate(texts) if len(text) < length]:
        # Some of those that wait, in any order; some lost their state and get it again.
        live = sorted(waiting, key=lambda _: pick(99))[: 1 + pick(len(waiting))]
        requests: list[SampleRequest] = []
        for i in live:
            if i not in states or pick(3) == 0:
                states[i] = make_state(
                    all_params[i],
                    seed=seed + i,
                    vocab_size=VOCAB,
                    prompt=(1, 2),
                    written=texts[i],
                    eos=(0,),
                )
            right = expected[i][len(texts[i]) :]
            chain = tuple(token_id if pick(3) else pick(VOCAB) for token_id in right[: pick(5)])
            requests.append(SampleRequest(state=states[i], drafts=chain))
        rows = [
            toy_logits((1, 2, *texts[i], *request.drafts[:row]))
            for i, request in zip(live, requests, strict=True)
            for row in range(request.num_rows)
        ]
        before = torch.stack(rows)
        logits = before.clone()
        found = target_tokens(logits, requests)
        assert torch.equal(logits, before)
        for i, request, tokens in zip(live, requests, found, strict=True):
            verdict = verify_greedy(DraftTree.chain(request.drafts), tokens)
            emitted = (*request.drafts[: verdict.num_accepted], verdict.token_id)
            states[i].commit(emitted)
            texts[i] += emitted
    assert [text[:length] for text in texts] == expected


@given(PARAMS, st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_drafter_that_is_the_target_is_always_right(params: SamplingParams, seed: int) -> None:
    expected = plain_text(params, seed=seed, length=8)
    state = make_state(
        params, seed=seed, vocab_size=VOCAB, prompt=(1, 2), written=expected[:2], eos=(0,)
    )
    drafts: tuple[int, ...] = ()
    for _ in range(6):
        logits = toy_logits((1, 2, *expected[:2], *drafts)).unsqueeze(0)
        (token_id,) = draft_tokens(logits, [SampleRequest(state=state, drafts=drafts)]).tolist()
        drafts += (token_id,)
    assert drafts == expected[2:8]


def test_a_drafter_of_another_width_draws_from_the_target_s_vocabulary() -> None:
    state = make_state(SamplingParams(), seed=3, vocab_size=10)
    narrow, wide = torch.zeros(1, 7), torch.zeros(1, 16)
    wide[:, 10:] = 99.0
    assert int(draft_tokens(wide, [SampleRequest(state=state)])) < 10
    for seed in range(50):
        request = SampleRequest(state=make_state(SamplingParams(), seed=seed, vocab_size=10))
        assert int(draft_tokens(narrow, [request])) < 7
        token_ids, probs = draft_probs(narrow, [request])
        assert probs.shape == (1, 10)
        assert token_ids[0] < 7


def test_plain_greedy_processed_and_sampled_rows_do_not_mix_up() -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.3),
        SamplingParams(temperature=0.0, logit_bias={4: 3.0}),
        SamplingParams(temperature=0.8, top_k=4),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, presence_penalty=1.0),
    ]
    generator = torch.Generator().manual_seed(5)
    for seed in range(30):
        requests = [
            SampleRequest(
                state=make_state(params, seed=seed, vocab_size=30, written=(3,)),
                drafts=tuple(range(i % 3)),
            )
            for i, params in enumerate(kinds)
        ]
        logits = torch.randn(sum(r.num_rows for r in requests), 30, generator=generator)
        parts = torch.split(logits, [request.num_rows for request in requests])
        alone = [
            target_tokens(part, [request])[0] for part, request in zip(parts, requests, strict=True)
        ]
        assert target_tokens(logits, requests) == alone
        assert alone[0] == parts[0].argmax(-1).tolist()
        assert alone[4] == parts[4].argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_ends_before_its_min_tokens(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(5,))
    logits = torch.zeros(4, 9)
    logits[:, 2], logits[:, 5] = 90.0, 80.0  # the end, then the stop token
    state = make_state(params, seed=1, vocab_size=9, eos=(2,))
    ((first, second, third, fourth),) = target_tokens(
        logits, [SampleRequest(state=state, drafts=(0, 0, 0))]
    )
    assert not {first, second, third} & {2, 5}
    assert fourth == 2
    (drafted,) = draft_tokens(logits[:1], [SampleRequest(state=state, drafts=(0, 0))]).tolist()
    assert drafted == third
    assert int(draft_tokens(logits[:1], [SampleRequest(state=state, drafts=(0, 0, 0))])) == 2


def test_drafts_for_the_rejection_rule_use_the_numbers_of_their_depth() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(6))
    for seed in range(20):
        state = make_state(SamplingParams(), seed=seed, vocab_size=50, written=(1, 2))
        for drafts in ((), (4,), (4, 4)):
            (token_id,), probs = draft_probs(logits, [SampleRequest(state=state, drafts=drafts)])
            u = uniform(seed, position=3 + len(drafts), purpose=Purpose.DRAFT, round_start=3)
            assert token_id == draw(probs[0], u)


def test_plain_greedy_batches_are_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "candidates", None)
    monkeypatch.setattr(batch, "select_rows", None)
    states = [
        make_state(SamplingParams(temperature=0.0, top_k=3), seed=i, vocab_size=9) for i in range(3)
    ]
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    requests = [SampleRequest(state=state, drafts=(1,)) for state in states]
    assert [x for row in target_tokens(logits, requests) for x in row] == logits.argmax(-1).tolist()


# ------------------------------------------------------------------------------------ rejection's rows


def test_rows_for_the_rejection_rule_write_the_processed_law() -> None:
    params = SamplingParams(temperature=0.9, top_k=4, frequency_penalty=0.8, logit_bias={1: 1.0})
    generator = torch.Generator().manual_seed(2)
    target, draft = 1.5 * torch.randn(2, 6, 6, generator=generator)
    count = 4_000
    texts: Counter[tuple[int, int]] = Counter()
    for seed in range(count):
        state = make_state(params, seed=seed, vocab_size=6)
        request = SampleRequest(state=state)
        (first,), probs = draft_probs(draft[:1], [request])
        rows = torch.stack([target[0], target[first]])
        chain = SampleRequest(state=state, drafts=(first,))
        verdict = verify_sampled(
            DraftTree.chain((first,)),
            target_probs(rows, chain),
            probs,
            uniforms=RoundUniforms(seed, 1),
        )
        text = [*([first] if verdict.num_accepted else []), verdict.token_id]
        if len(text) == 1:
            state.commit(text)
            (law,) = target_probs(target[text[0]].unsqueeze(0), SampleRequest(state=state))
            u = RoundUniforms(seed, 2)
            tree = DraftTree.chain(())
            text.append(
                verify_sampled(tree, law.unsqueeze(0), law.unsqueeze(0), uniforms=u).token_id
            )
        texts[text[0], text[1]] += 1
    observed, expected = [], []
    bias = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    law_0 = distribution((target[0] + bias).unsqueeze(0), params)[0].double()
    for x in range(6):
        used = torch.zeros(6).index_fill_(0, torch.tensor([x]), 0.8)
        law_1 = distribution((target[x] + bias - used).unsqueeze(0), params)[0].double()
        for y in range(6):
            chance = float(law_0[x] * law_1[y])
            assert chance > 0.0 or texts[x, y] == 0
            if chance > 0.0:
                observed.append(texts[x, y])
                expected.append(chance * count)
    assert chi2_p_value(observed, expected) > 1e-4
