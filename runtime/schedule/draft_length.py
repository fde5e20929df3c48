"""How many tokens each request drafts, and by whom.

`FixedDrafts` drafts as many as it is told. `AdaptiveDrafts` looks for the greatest goodput, tokens
per millisecond of the whole batch:

                  sum over requests r of 1 + E_r(n_r)
    maximise  ------------------------------------------------------------------
              rest + verify(rows + sum n_r) + first(rows) + (n_max - 1) later(rows)

    E_r(n)   drafts expected to be kept: sum over i <= n of the chance that drafts 1 .. i all are
    verify   the target's pass, by its rows: as it is without drafts, and with them
    first    the drafter's pass over what it has not read, which gives the first draft
    later    each pass after it

Where one step drafts while another is verified, the shorter of the two is partly hidden behind the
longer, and the denominator is less by that part of it.

All these costs are learnt from the steps themselves, and E from what became of each request's drafts
(SmartSpec, arXiv 2406.14066; decoding.md 10.4). Nothing is drafted where it would not pay. So that
this can change, a step without drafts is run now and then while there are some, and while there are
none a few requests draft.

Estimates err, so there is an account as well. Into it goes a small part of the time, and what each
step with drafts saved against one without, or cost beyond it. While it is overdrawn nothing is
drafted: over time drafting costs no more than that part, whatever was believed.

The text of a request does not depend on any of this where verification is coupled.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from paceline.runtime.schedule.tails import TailBuffer
from paceline.runtime.spec.ngram import NgramIndex
from paceline.runtime.types import AS_CONFIGURED, DrafterName, DraftForm, DraftShape, StageTimes

TREE_ROWS = 128
"""Most nodes of trees in a step. A pass costs a GPU what reading its weights costs up to about 150 to
300 rows (decoding.md 10.2); beyond, a branch is paid for, and a chain's next token is worth more."""

MOST_PLANS = 2
"""In flight; more would only wait."""

_HALF_OCTAVE = math.sqrt(2.0)

_LEVELS = 20
"""Steps between never and always accepted. Requests of one level are decided for together."""


@dataclass(slots=True)
class Acceptance:
    """How often one request's drafts of one drafter were kept lately, counted with decay."""

    accepted: float = 0.0
    tested: float = 0.0
    """Drafts whose fate was decided: those accepted, and the first that was not."""
    level: int = -1
    """In twentieths; -1 before the first decision."""
    seen: bool = False
    """Whether it drafted since the last decision."""


@dataclass(slots=True, kw_only=True)
class DraftState:
    """What drafting knows of one request. The scheduler sets `room` and `lag`, `choose` the
    rest."""

    most: int
    """Never more than so many."""
    asked: bool = False
    """Whether the request itself says how many: then just those."""
    uses_model: bool = True
    index: NgramIndex | None = None
    tail: TailBuffer | None = None
    """Drafts that were made ahead, while there is somebody who makes them."""
    room: int = 0
    """Drafts that could still be used in this round."""
    lag: int = 1
    """Tokens that the draft model would have to read first."""
    num_tokens: int = 0
    """The choice."""
    tree: DraftShape | None = None
    """How these branch: chosen as well."""
    drafter: DrafterName = "draft_model"
    model: Acceptance = field(default_factory=Acceptance)
    ngram: Acceptance = field(default_factory=Acceptance)

    @property
    def num_rows(self) -> int:
        """Rows that the choice adds to the target's pass, at most."""
        return self.num_tokens if self.tree is None else self.tree.nodes


class Drafting(NamedTuple):
    """Whom a choice was for. Its step's cost brings it back, perhaps after the next choice."""

    num_requests: int = 0
    is_counted: bool = False
    """Whether none of them said itself how many."""
    form: DraftForm = AS_CONFIGURED
    way: int = 0
    """Of a `Controller`, as is the next: its class of batches."""
    size: int = 0


class StepCost(NamedTuple):
    """What a step was and what it took."""

    seconds: float
    """Of nothing but this step, if another was under way as well."""
    times: StageTimes
    rows: int
    """Of the target's pass, drafts included."""
    draft_rows: int
    """Drafts among them."""
    num_accepted: int
    """Of these drafts."""
    first_rows: int
    """Rows of the draft model's first pass, prompts it read included."""
    num_passes: int
    """Drafting passes: the greatest number of drafts that the model made for a request."""
    later_rows: int
    """Rows of all passes after the first together."""
    drafting: Drafting = Drafting()


def trees_fit(tree: DraftShape, num_requests: int) -> bool:
    """Whether so many requests may draft such a tree in one step."""
    return num_requests * tree.nodes <= TREE_ROWS


class DraftPolicy(Protocol):
    """Chooses before a step, learns after it."""

    @property
    def reads_prompts(self) -> bool:
        """Whether the draft model should read prompts along with the target."""

    @property
    def plans_in_flight(self) -> int:
        """No more of them, though there might be."""

    def choose(
        self, states: Sequence[DraftState], *, rows: int, num_running: int | None = None
    ) -> Drafting:
        """Set `num_tokens` and `drafter` of every state. `rows`: those of the target's pass without
        any drafts. `num_running` counts the requests of all steps in flight, if others may be."""

    def verified(
        self, state: DraftState, *, num_drafted: int, num_accepted: int, way: int = 0
    ) -> None:
        """A request's drafts were verified; `way` is that of the `Drafting` which they were chosen in."""

    def observe(self, cost: StepCost) -> None:
        """A step is over."""


def _chosen_drafter(state: DraftState) -> DrafterName | None:
    if state.index is not None and state.index.has_match:
        return "ngram"
    return "draft_model" if state.uses_model else None


def _draft_most(state: DraftState) -> None:
    drafter = _chosen_drafter(state)
    state.num_tokens = 0 if drafter is None else min(state.most, state.room)
    state.drafter = drafter or "draft_model"


class FixedDrafts:
    """Always as many as may be; from the request's own tokens where they match, else by the model.

    The model's drafts are trees of one shape while all of these together have no more than
    `TREE_ROWS` nodes, and chains when more requests run.
    """

    reads_prompts = True
    plans_in_flight = MOST_PLANS

    def __init__(self, tree: DraftShape | None = None) -> None:
        self._tree = tree

    def choose(
        self,
        states: Sequence[DraftState],
        *,
        rows: int,  # noqa: ARG002
        num_running: int | None = None,  # noqa: ARG002
    ) -> Drafting:
        for state in states:
            _draft_most(state)
            state.tree = None
        if self._tree is not None:
            modelled = [s for s in states if s.drafter == "draft_model" and s.num_tokens]
            if trees_fit(self._tree, len(modelled)):
                for state in modelled:
                    state.tree = self._tree
        return Drafting()

    def verified(
        self, state: DraftState, *, num_drafted: int, num_accepted: int, way: int = 0
    ) -> None:
        """Learns nothing."""

    def observe(self, cost: StepCost) -> None:
        """Learns nothing."""


class CostCurve:
    """Milliseconds by rows, learnt: a decayed mean for each half octave, straight lines between.

    An octave half that was never seen is hoped to cost no more than what is known of fewer rows, or its
    share of what is known of more; so it will be tried, and then is known.
    """

    _OWN = 0.1  # weight of a new observation in its own bin
    _YOUNG = 8  # observations of a bin, of which the first may have met cold caches:
    _COLD = 0.7  # one that is so much less takes their place
    _ALL = 0.1  # and in all: a machine that slows down does so for every number of rows
    _KEPT = 2048  # observations after which a bin that was not seen again is given up

    def __init__(self) -> None:
        self._bins: dict[int, list[float]] = {}  # bin -> [rows, ms / scale, last seen, how often]
        self._scale = 1.0
        self._count = 0
        self._line: tuple[list[float], list[float]] | None = None

    def observe(self, rows: float, ms: float) -> bool:
        """Learn; whether it was news: a bin never seen, or a cost off by a third."""
        if rows <= 0:
            return False
        self._count += 1
        self._line = None
        entry = self._bins.get(_bin(rows))
        if entry is None:
            self._bins[_bin(rows)] = [rows, ms / self._scale, self._count, 1]
            return True
        expected = entry[1] * self._scale
        entry[3] += 1
        if entry[3] <= self._YOUNG and ms < self._COLD * expected:
            entry[:3] = [rows, ms / self._scale, self._count]
            return True
        # one pause of the machine must not be learnt as the price of so many rows
        ratio = min(2.0, max(0.5, ms / expected)) if expected > 0 else 1.0
        entry[0] += self._OWN * (rows - entry[0])
        entry[1] *= 1.0 + self._OWN * (ratio - 1.0)
        entry[2] = self._count
        self._scale *= 1.0 + self._ALL * (ratio - 1.0)
        return not 0.75 < ratio < 1.34

    def seen(self, rows: float) -> bool:
        """Whether anything is known of about so many rows."""
        return _bin(rows) in self._bins

    @property
    def reach(self) -> float:
        """Rows up to which hope is sound: an octave beyond what was seen."""
        return 2.0 * max((entry[0] for entry in self._bins.values()), default=math.inf)

    def at(self, rows: float) -> float:
        """Milliseconds expected; 0 before anything is known. More rows never cost less."""
        if self._line is None:
            self._line = self._draw()
        xs, ys = self._line
        if not xs:
            return 0.0
        right = bisect_left(xs, rows)
        if right == 0:
            return ys[0] * min(1.0, _HALF_OCTAVE * rows / xs[0])
        if right == len(xs):
            return ys[-1]
        part = (rows - xs[right - 1]) / max(1e-9, xs[right] - xs[right - 1])
        return ys[right - 1] + part * (ys[right] - ys[right - 1])

    def _draw(self) -> tuple[list[float], list[float]]:
        oldest = self._count - self._KEPT
        self._bins = {key: entry for key, entry in self._bins.items() if entry[2] > oldest}
        xs: list[float] = []
        ys: list[float] = []
        last = None
        for key in sorted(self._bins):
            rows, ms, _, _ = self._bins[key]
            if last is not None and key - last > 1:  # as cheap as the bin before, up to this one
                xs.append(min(rows, max(xs[-1], 2 ** ((key - 0.5) / 2))))
                ys.append(ys[-1])
            xs.append(rows)
            ys.append(max(ys[-1] if ys else 0.0, ms * self._scale))
            last = key
        return xs, ys


def _bin(rows: float) -> int:
    return int(2 * math.log2(rows) + 0.5) if rows > 0 else 0


class _History:
    """What became of all requests' drafts of one drafter, by position, counted with decay."""

    _DECAY = 0.99
    _PRIOR = 0.8  # hopeful, so that drafting is tried
    _PRIOR_WEIGHT = 4.0

    def __init__(self, most: int) -> None:
        self._tested = [0.0] * most
        self._accepted = [0.0] * most

    def add(self, *, num_drafted: int, num_accepted: int) -> None:
        for position in range(num_accepted):
            self._tested[position] += 1.0
            self._accepted[position] += 1.0
        if num_accepted < num_drafted:
            self._tested[num_accepted] += 1.0

    def decay(self) -> None:
        # the last few are kept whole, else a long time without drafts would forget what they gave
        if sum(self._tested) > 32.0:
            self._tested = [count * self._DECAY for count in self._tested]
            self._accepted = [count * self._DECAY for count in self._accepted]

    @property
    def rate(self) -> float:
        """The chance of a draft whose predecessors were all kept."""
        tested, accepted = sum(self._tested), sum(self._accepted)
        return (accepted + self._PRIOR_WEIGHT * self._PRIOR) / (tested + self._PRIOR_WEIGHT)

    def level(self, own: Acceptance) -> int:
        """A request's level: its own record, leaning on everybody's while it is short."""
        weight = self._PRIOR_WEIGHT
        rate = (own.accepted + weight * self.rate) / (own.tested + weight)
        return round(rate * _LEVELS)

    def chances(self, level: int) -> list[float]:
        """Entry i: the chance that drafts 0 .. i of a request of this level are all kept."""
        rate, chance, made = self.rate, 1.0, []
        for tested, accepted in zip(self._tested, self._accepted, strict=True):
            weight = self._PRIOR_WEIGHT
            shape = (accepted + weight * rate) / (tested + weight) / rate
            chance *= min(0.99, max(0.01, level / _LEVELS * shape))
            made.append(chance)
        return made


@dataclass(frozen=True, slots=True)
class _Setting:
    """A decision: drafts that are kept with a chance of at least `least`, by the model no more than
    `depth`."""

    depth: int
    least: float
    num_drafts: int = 0
    goodput: float = 0.0
    """Tokens per millisecond expected."""


class AdaptiveDrafts:
    """As many as pay. Costs constant time per request and step, and a decision every few steps."""

    _DECIDE_EVERY = 8
    _BETTER = 1.02  # another setting must promise so much more
    _WORTHWHILE = 1.07  # and drafting at all: prompts are read twice for it, which no step shows
    _OFF_EVERY = 64  # steps between those without drafts, which say what drafting is compared with
    _OFF_EVERY_UNKNOWN = 8  # where that is not known for so many rows
    _EXPLORE_EVERY = 48
    _EXPLORE_STEPS = 3  # the first of them reads up what was written without drafts
    _ALLOWANCE = 0.015  # part of the time that drafting may cost
    _MOST_STEPS_SAVED = (
        64  # bounds of the account, in steps: gains pay for stalls that come in a row,
    )
    _MOST_STEPS_OWED = 2  # and a pause of the machine does not stop drafting for long
    _FIRST_STEPS = 4  # what there is to begin with
    _LONGEST_STEP = 2.0  # no more of one step is charged, in what such took lately
    _MOST_SURPRISE = 8.0
    _EXPLORE_TOKENS = 3
    _HORIZON = 64  # rounds over which a request's reading up is written off
    _MOST_READING = 16.0  # tokens read up per such round; a request further behind is left alone
    _OWN_DECAY = 0.95

    plans_in_flight = MOST_PLANS

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._verify, self._first, self._later = CostCurve(), CostCurve(), CostCurve()
        self._rest_ms: float | None = None
        self._histories = {"draft_model": _History(most), "ngram": _History(most)}
        self._row_price = 0.0  # tokens that the time of a row of verification would have given
        self._set(_Setting(depth=most, least=0.0))
        self._step = 0
        self._next_decision = 1
        self._decided_for = 0
        self._last_off = -self._OFF_EVERY  # the very first step
        self._last_explored = 0
        self._num_explored = 0
        self._explore_steps = self._EXPLORE_STEPS
        """Left of an exploration that has begun, as it has at the start."""
        self._account_ms: float | None = None
        self._surprise = 1.0  # what steps with drafts took lately, in what they were expected to
        self._hidden = 0.0  # part of the shorter stage that ran beside another step's longer one

    @property
    def reads_prompts(self) -> bool:
        return self._setting.depth > 0

    def choose(
        self,
        states: Sequence[DraftState],
        *,
        rows: int,
        num_running: int | None = None,  # noqa: ARG002
    ) -> Drafting:
        self._step += 1
        drafting = Drafting(len(states), not any(state.asked for state in states))
        overdrawn = self._account_ms is not None and self._account_ms < 0.0
        if overdrawn or self._is_off_due(rows):
            self._last_off = self._step  # it may be observed after the next choice
            for state in states:
                if state.asked:
                    _draft_most(state)
                else:
                    state.num_tokens = 0
            return drafting
        changed = abs(len(states) - self._decided_for) * 4 > self._decided_for
        if self._step >= self._next_decision or changed:
            self._decide(states, rows=rows)
        drafted = 0
        for state in states:
            self._assign(state)
            drafted += state.num_tokens
        if drafted == 0 and self._step - self._last_explored >= self._EXPLORE_EVERY:
            self._explore_steps = self._EXPLORE_STEPS
        if drafted == 0 and self._explore_steps > 0:
            self._explore(states, rows=rows)
        return drafting

    def verified(
        self,
        state: DraftState,
        *,
        num_drafted: int,
        num_accepted: int,
        way: int = 0,  # noqa: ARG002
    ) -> None:
        own = state.model if state.drafter == "draft_model" else state.ngram
        decay = self._OWN_DECAY
        own.accepted = own.accepted * decay + num_accepted
        own.tested = own.tested * decay + num_accepted + (num_accepted < num_drafted)
        own.seen = True
        history = self._histories[state.drafter]
        history.add(num_drafted=num_drafted, num_accepted=num_accepted)
        own.level = history.level(own)

    def observe(self, cost: StepCost) -> None:
        times = cost.times
        news = self._verify.observe(cost.rows, times.verify_ms)
        passes = cost.num_passes
        if times.calibrate_ms > 0.0:
            news |= self._first.observe(cost.first_rows, times.calibrate_ms)
            passes -= 1
        if passes > 0 and times.draft_ms > 0.0:
            # without a first pass of its own the first is among these
            rows = cost.later_rows + (cost.first_rows if passes == cost.num_passes else 0)
            news |= self._later.observe(max(1.0, rows / passes), times.draft_ms / passes)
        whole_ms = cost.seconds * 1e3
        drafting_ms = times.calibrate_ms + times.draft_ms
        rest_ms = whole_ms - drafting_ms - times.verify_ms
        shorter_ms = min(drafting_ms, times.verify_ms)
        if shorter_ms > 0.0:
            hidden = min(1.0, max(0.0, -rest_ms / shorter_ms))
            self._hidden += 0.1 * (hidden - self._hidden)
        rest_ms = max(0.0, rest_ms + self._hidden * shorter_ms)
        if self._rest_ms is None:
            self._rest_ms = rest_ms
        # the time of one pause is not the time of a step
        self._rest_ms += 0.1 * (min(rest_ms, 2 * self._rest_ms + 0.1) - self._rest_ms)
        if cost.draft_rows == 0:
            self._last_off = self._step
        self._settle(cost)
        for history in self._histories.values():
            history.decay()
        if news:
            self._next_decision = self._step + 1

    def _settle(self, cost: StepCost) -> None:
        """Enter what a step saved or cost into the account."""
        undrafted_ms = self._cost(rows=cost.rows - cost.draft_rows)
        if self._account_ms is None:
            self._account_ms = self._FIRST_STEPS * undrafted_ms
        self._account_ms += self._ALLOWANCE * undrafted_ms
        drafting = cost.drafting
        if cost.draft_rows and drafting.is_counted:
            worth = 1.0 + cost.num_accepted / drafting.num_requests  # in steps without drafts
            # a step that took far longer was held up by something else, as those without drafts are
            expected_ms = self._cost(
                rows=cost.rows,
                passes=cost.num_passes,
                first=cost.first_rows,
                later=cost.later_rows,
            )
            whole_ms = cost.seconds * 1e3
            step_ms = min(whole_ms, self._LONGEST_STEP * self._surprise * expected_ms)
            ratio = min(whole_ms / expected_ms, self._MOST_SURPRISE)
            self._surprise += 0.1 * (ratio - self._surprise)
            self._account_ms += worth * undrafted_ms - step_ms
        least, most = -self._MOST_STEPS_OWED, self._MOST_STEPS_SAVED
        self._account_ms = min(max(self._account_ms, least * undrafted_ms), most * undrafted_ms)

    # ---------------------------------------------------------------------------------- the choice

    def _set(self, setting: _Setting) -> None:
        """Tabulate a setting by level: drafts, and what they are worth in tokens beyond their
        cost."""
        self._setting = setting
        self._lengths: dict[str, list[int]] = {}
        self._values: dict[str, list[float]] = {}
        for name, depth in (("draft_model", setting.depth), ("ngram", self._most)):
            lengths, values = [], []
            for level in range(_LEVELS + 1):
                chances = self._histories[name].chances(level)[:depth]
                worth = [chance - self._row_price for chance in chances if chance >= setting.least]
                lengths.append(len(worth))
                values.append(sum(worth))
            self._lengths[name], self._values[name] = lengths, values

    def _assign(self, state: DraftState) -> None:
        if state.asked:
            _draft_most(state)
            return
        num_tokens, value = 0, 0.0
        if state.uses_model and self._reading_per_round(state) <= self._MOST_READING:
            level = self._level(state, "draft_model")
            num_tokens = self._lengths["draft_model"][level]
            value = self._values["draft_model"][level]
        state.drafter = "draft_model"
        if state.index is not None and state.index.has_match:
            level = self._level(state, "ngram")
            if self._values["ngram"][level] >= value or num_tokens == 0:
                num_tokens = self._lengths["ngram"][level]
                state.drafter = "ngram"
        state.num_tokens = min(num_tokens, state.room, state.most)

    def _reading_per_round(self, state: DraftState) -> float:
        """What the draft model must read up, written off over the rounds that are left."""
        return (state.lag - 1) / min(state.room + 1, self._HORIZON)

    def _level(self, state: DraftState, name: str) -> int:
        own = state.model if name == "draft_model" else state.ngram
        if own.level < 0:
            own.level = self._histories[name].level(own)
        return own.level

    # -------------------------------------------------------------------------------- the decision

    def _decide(self, states: Sequence[DraftState], *, rows: int) -> None:
        self._next_decision = self._step + self._DECIDE_EVERY
        self._decided_for = len(states)
        classes: Counter[tuple[int, int]] = Counter()
        reading = 0.0
        for state in states:
            if state.asked:
                continue
            for name, own in (("draft_model", state.model), ("ngram", state.ngram)):
                if not own.seen:  # old news count less and less, until the request is as any other
                    own.accepted *= self._OWN_DECAY
                    own.tested *= self._OWN_DECAY
                    own.level = self._histories[name].level(own)
                own.seen = False
            matches = state.index is not None and state.index.has_match
            behind = self._reading_per_round(state) if state.uses_model else 0.0
            reads = state.uses_model and behind <= self._MOST_READING
            reading += behind if reads else 0.0
            classes[state.model.level if reads else -1, state.ngram.level if matches else -1] += 1
        if not classes:
            return
        readers = sum(count for (model, _), count in classes.items() if model >= 0)
        first_rows = 1.0 + reading / max(1, readers)
        off = _Setting(0, 2.0, goodput=classes.total() / self._cost(rows=rows))
        current, best = off, off
        for depth in self._depths(any_model=readers > 0):
            for setting in self._settings(classes, depth=depth, rows=rows, first_rows=first_rows):
                if setting.goodput > best.goodput:
                    best = setting
                if depth == self._setting.depth and setting.least >= self._setting.least:
                    current = setting
        if best.goodput < self._BETTER * current.goodput:
            best = current
        if best.goodput < self._WORTHWHILE * off.goodput:
            best = off
        if best.depth > self._setting.depth:  # a new attempt is looked at again at once
            self._next_decision = self._step + 1
        num_drafts = max(1, best.num_drafts)
        verifying_ms = self._verify.at(rows + num_drafts) - self._verify.at(rows)
        self._row_price = best.goodput * verifying_ms / num_drafts
        self._set(best)

    def _depths(self, *, any_model: bool) -> list[int]:
        """How deep the model may draft: every number that is small, some of those that are not."""
        if not any_model:
            return [0]
        known = (*range(9), 10, 12, 16, 24, 32, 48, 64)
        return sorted({depth for depth in known if depth < self._most} | {self._most})

    def _settings(
        self, classes: Counter[tuple[int, int]], *, depth: int, rows: int, first_rows: float
    ) -> list[_Setting]:
        """What each number of drafts would give, the likeliest first, at one depth. `first_rows`:
        what the draft model reads per request that it drafts for."""
        candidates: list[tuple[float, int, int]] = []  # chance, requests, position or 0 for n-gram
        for (model_level, ngram_level), count in classes.items():
            model = self._chances("draft_model", model_level)[:depth]
            ngram = self._chances("ngram", ngram_level)
            if sum(ngram) >= sum(model):
                candidates += [(chance, count, 0) for chance in ngram]
            else:
                candidates += [
                    (chance, count, 1 + position) for position, chance in enumerate(model)
                ]
        candidates.sort(key=lambda each: -each[0])
        made = []
        num_requests, most_rows = classes.total(), self._verify.reach
        tokens, num_drafts, users, later_rows, passes = float(num_requests), 0, 0, 0, 0
        for index, (chance, count, position) in enumerate(candidates):
            tokens += chance * count
            num_drafts += count
            passes = max(passes, position)
            users += count if position == 1 else 0
            later_rows += count if position > 1 else 0
            if rows + num_drafts > most_rows:
                break
            if index + 1 < len(candidates) and candidates[index + 1][0] == chance:
                continue
            cost_ms = self._cost(
                rows=rows + num_drafts, passes=passes, first=users * first_rows, later=later_rows
            )
            made.append(_Setting(depth, chance, num_drafts, goodput=tokens / cost_ms))
        return made

    def _chances(self, name: str, level: int) -> list[float]:
        return [] if level < 0 else self._histories[name].chances(level)

    def _cost(self, *, rows: int, passes: int = 0, first: float = 0, later: int = 0) -> float:
        """Milliseconds of a step."""
        drafting_ms, verify_ms = 0.0, self._verify.at(rows)
        if passes > 0:
            drafting_ms += self._first.at(first) or self._later.at(first)
        if passes > 1:
            drafting_ms += (passes - 1) * self._later.at(max(1.0, later / (passes - 1)))
        cost_ms = (self._rest_ms or 0.0) + verify_ms + drafting_ms
        return max(cost_ms - self._hidden * min(drafting_ms, verify_ms), 1e-6)

    # --------------------------------------------------------------------------------- exploration

    def _is_off_due(self, rows: int) -> bool:
        known = self._verify.seen(rows)
        every = self._OFF_EVERY if known else self._OFF_EVERY_UNKNOWN
        return self._step - self._last_off >= every

    def _explore(self, states: Sequence[DraftState], *, rows: int) -> None:
        """Let a few requests draft although it does not seem to pay: in turn those that have least
        to read, and any; and for some steps those that did."""
        able = [s for s in states if _chosen_drafter(s) is not None and s.room > 0 and s.most > 0]
        few = max(1, len(states) // 8)
        goes_on = self._explore_steps < self._EXPLORE_STEPS
        self._num_explored += not goes_on
        self._explore_steps -= 1
        if goes_on or self._num_explored % 2:
            chosen = heapq.nsmallest(few, able, key=lambda state: state.lag)
        else:
            first = self._num_explored // 2 * few % max(1, len(able))
            chosen = able[first : first + few]
        while chosen:
            first = sum(state.lag for state in chosen)
            drafts = self._EXPLORE_TOKENS * len(chosen)
            more_ms = self._cost(
                rows=rows + drafts,
                passes=self._EXPLORE_TOKENS,
                first=first,
                later=drafts - len(chosen),
            ) - self._cost(rows=rows)
            if more_ms <= (self._account_ms or 0.0):
                break
            chosen = chosen[: len(chosen) // 2]
        for state in chosen:
            state.num_tokens = min(self._EXPLORE_TOKENS, state.room, state.most)
            state.drafter = _chosen_drafter(state) or "draft_model"
        if chosen:
            self._last_explored = self._step
        else:
            self._explore_steps = 0
