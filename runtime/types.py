"""The types that cross a process boundary.

Frozen, keyword-only, and made of ints, floats, strings and lists alone, so that each can be sent as
MessagePack and none can carry a tensor or a live object. A prompt crosses to the workers once;
later plans carry only what changed.

    frontend ──Request──> coordinator ──StepPlan──> every rank
        ^                     │  ^                     │
        └──TokenDelta, EngineStatus  └───StepResult────┘ (rank 0 only)
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

WIRE_VERSION = 6
"""Raised by one whenever a type below changes its meaning; both ends of a channel compare it."""


class WireType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is sent: immutable, keyword-only, strict about unknown fields."""


class StructuredOutputs(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """What shape the text must have: exactly one of these."""

    json: str | None = None
    """A JSON schema, as JSON text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A context-free grammar in Lark's notation."""


KvPolicyName = Literal["full", "sink_window"]


class SamplingParams(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen. Names and meanings are those of vLLM and the OpenAI
    API."""

    n: Annotated[int, Meta(description="How many texts to write for the prompt.")] = 1
    max_tokens: Annotated[
        int | None, Meta(description="Most tokens to generate; null: as many as the context holds.")
    ] = 16
    min_tokens: Annotated[
        int, Meta(description="No end-of-text token, stop token or stop string before so many.")
    ] = 0
    temperature: Annotated[
        float, Meta(description="0 is greedy; logits are divided by it otherwise.")
    ] = 1.0
    top_k: Annotated[
        int, Meta(description="Keep the k most probable tokens; 0 or -1 keeps all.")
    ] = 0
    top_p: Annotated[
        float, Meta(description="Keep the most probable tokens whose mass reaches top_p.")
    ] = 1.0
    min_p: Annotated[
        float, Meta(description="Drop tokens less probable than min_p times the most probable one.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Meta(description="Above 1 discourages every token of prompt and text.")
    ] = 1.0
    presence_penalty: Annotated[
        float, Meta(description="Subtracted from the logit of every token the text has.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(description="Subtracted as often as the text has the token.")
    ] = 0.0
    logit_bias: Annotated[
        dict[int, float] | None, Meta(description="Added to the logits of these token ids.")
    ] = None
    stop: Annotated[
        str | tuple[str, ...], Meta(description="End the text before any of these strings.")
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], Meta(description="Stop after any of these, besides the model's own.")
    ] = ()
    include_stop_str_in_output: Annotated[
        bool, Meta(description="Keep the stop string at the end of the text.")
    ] = False
    ignore_eos: Annotated[bool, Meta(description="Go on past the end-of-text token.")] = False
    seed: Annotated[
        int | None, Meta(description="The text is a function of prompt, parameters and seed.")
    ] = None
    logprobs: Annotated[
        int | None,
        Meta(description="Report each token's log-probability, and those of so many best ones."),
    ] = None
    prompt_logprobs: Annotated[
        int | None, Meta(description="The same for the tokens of the prompt.")
    ] = None
    skip_special_tokens: Annotated[
        bool, Meta(description="Leave special tokens out of the text.")
    ] = True
    structured_outputs: Annotated[
        StructuredOutputs | None, Meta(description="What shape the text must have.")
    ] = None
    kv_policy: Annotated[
        KvPolicyName,
        Meta(
            description="full is exact; sink_window keeps the first tokens and a window (lossy, unbounded)."
        ),
    ] = "full"

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TokenLogprobs(WireType, frozen=True, kw_only=True):
    """One position's log-probabilities under the target, before any sampling parameter, as in
    vLLM."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, best first, as many as were asked for."""


class KvProduce(WireType, frozen=True, kw_only=True):
    """Read the prompt, draw one token, and hold the KV for another engine to fetch."""

    transfer_id: str
    lease_s: float
    """How long to hold it for a consumer that is not heard of."""
    read_draft: bool = True
    """Whether the drafter reads the prompt too, so that its KV can be fetched."""
    consumer_id: str = ""
    """The engine that may fetch it; empty for whichever knows the transfer's id."""


class KvFetch(WireType, frozen=True, kw_only=True):
    """Fetch the prompt's KV and the first token instead of computing them."""

    transfer_id: str
    addresses: tuple[str, ...]
    """`host:port` of the KV links of the engine that reads the prompt, by rank."""
    lease_s: float
    timeout_s: float
    """A fetch that takes longer has failed."""
    fetch_draft: bool = True
    """Whether the drafter's KV is fetched too, where it is there, or rebuilt here by an exact pass."""
    recompute: bool = True
    """Whether a prompt whose KV cannot be had is read here; else its request ends in an error."""


class Request(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt to continue once: `n` texts are as many requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    """Resolved: never None, so that a restarted engine draws the same numbers."""
    max_tokens: int
    """Resolved: within the context."""
    num_draft_tokens: int | None = None
    """Draft tokens per round for this request; None leaves it to the engine, 0 turns speculation
    off."""
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    """Lower is served first, as in vLLM."""
    cache_salt: str = ""
    """Requests share cached prefixes only with those of the same salt."""
    session_id: str = ""
    """Requests of one session go to one engine while it can take them."""
    output_token_ids: tuple[int, ...] = ()
    """What it had written on an engine that is gone. It goes on from there: deltas have what follows."""
    produce: KvProduce | None = None
    fetch: KvFetch | None = None


class Handover(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """What goes with the KV of a prompt that was read elsewhere: all that choosing the next token
    needs.

    The state of sampling follows from the request and its tokens (`sampling/batch.py`): noise is
    hashed from seed and position, penalties count tokens, a grammar is walked along them. So seed and
    position are the exact state, and the consumer compares both with its own.
    """

    token_ids: tuple[int, ...]
    """Drawn from the prompt's last row: one token."""
    seed: int
    position: int
    """Of the next token to be drawn: the length of prompt and text so far."""
    draft_exact: int = 0
    """Leading tokens whose drafter KV is exact and can be fetched."""
    num_cached_tokens: int = 0
    """Prompt tokens that the producer had read before."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


DrafterName = Literal["draft_model", "ngram"]

TreeKind = Literal["beam", "dynamic", "dynamic_threshold"]


class DraftShape(WireType, frozen=True, kw_only=True):
    """How a request's drafts branch: a tree as deep as its number of draft tokens says.

    beam                 the `width` likeliest nodes of each level (EasySpec, arXiv 2502.02493),
                         of all of them the `nodes` likeliest (EAGLE-2, arXiv 2406.16858)
    dynamic              node after node where it promises most (DySpec, arXiv 2410.11744)
    dynamic_threshold    level after level, all nodes that promise more than 1 / `nodes`
    """

    kind: TreeKind
    width: Annotated[int, Meta(ge=1, le=64)]
    """Most nodes of a level of `beam`, most children of a node of the others."""
    nodes: Annotated[int, Meta(ge=1, le=64)]
    """Most nodes of the tree: rows of the target's pass."""

    def num_slots(self, depth: int) -> int:
        """KV slots behind the committed tokens: for the target's rows, and for as many nodes as the
        drafter may read, some of which it may then leave out."""
        if self.kind == "beam":
            return max(self.nodes, self.width * (depth - 1))
        return min(64, 2 * self.nodes) if self.kind == "dynamic" else self.nodes


CalibrationName = Literal["every_round", "on_mismatch", "never"]


class DraftForm(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """How the draft model's layers run in a step."""

    exact: bool = False
    """One after another, where some could run side by side."""
    calibration: CalibrationName | None = None
    """After which rounds its KV is made exact again; None for what is configured."""


AS_CONFIGURED = DraftForm()


class ScheduledRequest(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """One request's share of a step: how many tokens it feeds, and how many it drafts on top.

        committed tokens   0 ..... seen ............ seen + num_tokens ...... len
                           |-- in KV --|-- fed in this step --|-- later steps --|

    Where the fed tokens reach the last committed one, the request drafts, verifies and emits at
    least one token; else it only fills KV: a chunk of a prompt, or of a text that is recomputed.
    """

    request_id: str
    num_tokens: Annotated[int, Meta(ge=1)]
    num_draft_tokens: Annotated[int, Meta(ge=0)] = 0
    """Most drafts that can be kept: the length of a chain, the depth of a tree."""
    tree: DraftShape | None = None
    """How the draft model's drafts branch; None for a chain."""
    drafter: DrafterName = "draft_model"
    """Who drafts, if anybody does."""
    draft_token_ids: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    """The drafts themselves, where they were made ahead; `num_draft_tokens` is 0 then."""
    read_draft: bool = False
    """Whether the draft model reads the fed tokens too, so that its KV keeps up with the target's.
    What it has not read by the time it drafts it reads then."""
    new_blocks: tuple[int, ...] = ()
    """KV blocks appended to the request's table before the step. The target's and the drafter's
    pools share block ids."""
    request: Request | None = None
    """The request itself, the first time and again after a preemption."""
    output_token_ids: tuple[int, ...] = ()
    """What it had written before it was preempted; with `request` only."""
    num_cached: int = 0
    """Tokens whose target KV is in the first blocks already; with `request` only."""
    num_draft_cached: int = 0
    """Tokens whose drafter KV is there, exact, already; with `request` only."""
    slot: int | None = None
    """Where on the board ranks say how far its KV is, if another engine waits for it; with
    `request` only."""
    generation: int = 0
    """What to write there once the slot's marks are this request's."""


class StepPlan(WireType, frozen=True, kw_only=True):
    """What every rank does next."""

    step: int
    scheduled: tuple[ScheduledRequest, ...]
    form: DraftForm = AS_CONFIGURED
    finished: tuple[str, ...] = ()
    """Requests to forget before the step, ended or preempted: their KV blocks may be in
    `scheduled` again."""
    alone: bool = False
    """Whether it is carried out after all before it, and before all that come: then its stages need no
    threads of their own."""
    shutdown: bool = False
    version: int = WIRE_VERSION


class StageTimes(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """Milliseconds on rank 0, of one step or summed over several."""

    calibrate_ms: float = 0.0
    """The exact drafting pass that makes the drafter's KV exact and gives the first draft."""
    draft_ms: float = 0.0
    """All other drafting passes, and drawing the drafts."""
    verify_ms: float = 0.0
    """The target's pass and the verification of its result."""

    def plus(self, other: StageTimes) -> StageTimes:
        return StageTimes(
            calibrate_ms=self.calibrate_ms + other.calibrate_ms,
            draft_ms=self.draft_ms + other.draft_ms,
            verify_ms=self.verify_ms + other.verify_ms,
        )


Span = tuple[float, float]
"""When something began and ended: milliseconds of the monotonic clock, which all processes of a host
share."""


class RequestResult(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """What a step did for one request. `token_ids` is empty while its tokens are still being
    read."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    num_drafted: int = 0
    """Tokens of its chain, or nodes of its tree."""
    num_accepted: int = 0
    """Those of them on the path that was kept."""
    draft_exact: int = 0
    """How many leading tokens of the request have exact drafter KV after the step."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of `token_ids`, where asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt tokens that follow those fed in this step, where asked for."""
    error: str | None = None
    """Why this request cannot go on; the others can."""


class StepResult(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """Rank 0's answer to a plan, or why there is none. One result per scheduled request, in the
    plan's order."""

    step: int
    results: tuple[RequestResult, ...] = ()
    times: StageTimes = StageTimes()
    draft_span: Span | None = None
    """When rank 0 drafted, what it waited for other ranks included; None where nothing was done."""
    verify_span: Span | None = None
    num_rows: int = 0
    """Rows of the target's pass."""
    error: str | None = None
    out_of_memory: bool = False
    """Whether that was for want of memory."""
    version: int = WIRE_VERSION


class Event(enum.StrEnum):
    """What happens to a request, in order. Every latency is a subtraction of two of them
    (`runtime/events.py`)."""

    QUEUED = "queued"
    """The engine has it."""
    SCHEDULED = "scheduled"
    """Its first tokens are in a step. Again after every preemption."""
    FETCHED = "fetched"
    """Its KV has come from another engine, or could not be had: `RequestMetrics.fetch` says which."""
    FIRST_TOKEN = "first_token"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FetchAccount(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """How the KV of a prompt came from the engine that read it."""

    num_tokens: int
    num_bytes: int = 0
    """Received, over all ranks."""
    seconds: float = 0.0
    """On the slowest rank, as is the next."""
    unoverlapped_s: float = 0.0
    """After the prompt had been read."""
    error: str | None = None
    """Why it could not be had, if so."""


class RequestMetrics(WireType, frozen=True, kw_only=True):
    """How one request went."""

    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV was there already."""
    rounds: int
    """Verification passes, each of which emitted at least one token."""
    drafted: int
    """Nodes of trees included, of which no more than a path can be kept."""
    accepted: int
    accepted_at: tuple[int, ...]
    """Entry i counts the rounds that accepted exactly i drafts."""
    times: StageTimes
    """Of all steps the request took part in after its first token, whoever else did."""
    events: tuple[tuple[Event, float], ...]
    """With seconds of the coordinator's monotonic clock."""
    fetch: FetchAccount | None = None
    """Where its prompt was read on another engine."""

    def at(self, event: Event) -> float | None:
        """When it happened first; None if it did not."""
        return next((at_s for kind, at_s in self.events if kind is event), None)

    def between(self, start: Event, end: Event) -> float | None:
        """Seconds from the first `start` to the first `end`; None if one of them did not happen."""
        start_s, end_s = self.at(start), self.at(end)
        return None if start_s is None or end_s is None else end_s - start_s

    @property
    def decode_s(self) -> float:
        """From the first token to the end; 0 without either."""
        return self.between(Event.FIRST_TOKEN, Event.FINISHED) or 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first over the time they took."""
        return (self.num_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


FinishReason = Literal["stop", "length", "abort", "error"]

EngineRole = Literal["both", "prefill", "decode"]


class Hop(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """One stay of a request on an engine, as the router saw it: moments are seconds of the router's
    monotonic clock."""

    engine_id: str
    """Who writes the text."""
    reader_id: str = ""
    """Who reads the prompt, where that is another."""
    policy: str = ""
    """What chose them."""
    asked_s: float
    """When the request came, or its last engine was lost."""
    chosen_s: float
    first_token_s: float | None = None
    """When the first token from here came."""
    ended_s: float | None = None
    """When it ended here, or the engine was lost."""
    num_cached_tokens: int = 0
    """Expected to be in the writer's prefix cache."""
    num_moved_tokens: int = 0
    """That travel from the reader to the writer."""
    read_s: float | None = None
    """When the reader said that it was done."""
    read: RequestMetrics | None = None
    """The reader's account."""
    metrics: RequestMetrics | None = None
    """The writer's; None if it was lost."""


class TokenDelta(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request. Exactly one delta of a request has a `finish_reason`, and it is
    the last."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    num_accepted: int = 0
    """How many of them, from the front, had been drafted."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first token."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was there already; with the first token."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended it, if one of `stop_token_ids` did."""
    error: str | None = None
    metrics: RequestMetrics | None = None
    """With the finish reason."""
    hops: tuple[Hop, ...] = ()
    """Likewise, where a router passed it on: the request's stays on engines, in order."""


class DraftPass(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """One pass of a drafter that is ahead, for time lines and costs."""

    span: Span
    num_rows: int
    num_drafts: int
    """Requests that got a draft by it."""


class StepStats(WireType, frozen=True, kw_only=True):
    """One step, for histograms."""

    seconds: float
    """From its plan to its result; where that was made while another step ran, from the other's
    result."""
    times: StageTimes
    num_requests: int
    num_rows: int
    draft_lengths: tuple[int, ...] = ()
    """Drafts chosen for each request that drafted: the length of its chain, the depth of its
    tree."""
    draft_span: Span | None = None
    """When rank 0 drafted, and when it verified: the time line of the stages."""
    verify_span: Span | None = None
    draft_passes: tuple[DraftPass, ...] = ()
    """Those of a drafter that is ahead that were heard of since the last step."""


class KvLinks(WireType, frozen=True, kw_only=True):
    """Where an engine's KV can be fetched. Empty until every rank's link serves."""

    addresses: tuple[str, ...] = ()
    """`host:port` by rank."""
    fingerprint: dict[str, str] = {}
    """What must be equal on both sides of a transfer, by name."""


class TransferTotals(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """KV transfers since the engine started, and those under way."""

    producing: int = 0
    """Requests whose blocks are being filled or held for another engine."""
    fetching: int = 0
    """Requests whose blocks are reserved and being filled from another engine."""
    produced: int = 0
    """Prompts read here for another engine, and let go of since."""
    fetched: int = 0
    failed: int = 0
    """Fetches that had to be computed here instead."""
    expired: int = 0
    """Leases that ended without a consumer."""
    fetched_tokens: int = 0
    num_bytes: int = 0
    """Received."""
    seconds: float = 0.0
    unoverlapped_s: float = 0.0
    stall_s: float = 0.0
    num_resumed: int = 0
    num_corrupt: int = 0


class WayStatus(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """A way to draft that the engine may choose, and what it gave lately for batches like the latest."""

    name: str
    tokens_per_second: float = 0.0
    """0 before it was tried."""
    chosen: bool = False
    reason: str = ""
    """Why it is chosen."""


class EngineStatus(WireType, frozen=True, kw_only=True):
    """How the engine is. Counts are totals since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that can be handed out, those that still hold a reusable prefix included."""
    block_size: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    num_drafts: int = 0
    """Rounds that drafted."""
    drafted: int = 0
    accepted: int = 0
    accepted_at_position: tuple[int, ...] = ()
    """Entry i counts the rounds in which a draft at that place was accepted: of a tree, at that
    depth."""
    steps: tuple[StepStats, ...] = ()
    """Those since the last status, the latest thousand at most."""
    ways: tuple[WayStatus, ...] = ()
    """To draft, where there are several to choose from."""
    ranks: tuple[str, ...] = ()
    """What each rank said of itself when it had loaded."""
    waiting_tokens: int = 0
    """Prompt tokens of waiting and running requests that are still to be read here."""
    stored_blocks: tuple[bytes, ...] = ()
    """Hashes of blocks that can be found since the last status; see `schedule/prefix.py`."""
    removed_blocks: tuple[bytes, ...] = ()
    """Those that no longer can."""
    links: KvLinks = KvLinks()
    transfers: TransferTotals = TransferTotals()
    num_restarts: int = 0
    """How often ranks were started anew because one had ended or hung."""
    restarting: bool = False
    """Whether they are just now: requests wait."""
    engine_id: str = ""
    role: EngineRole = "both"
    members: tuple[EngineStatus, ...] = ()
    """Where several engines serve together: each; the numbers above are then sums."""
