"""Clients whose texts must come through, whatever happens to the server meanwhile.

    Wanted ──> Reader: an AsyncClient that asks again ──> Read: the tokens, and when they came
                                                            │
    what the same request gets when nothing is struck ──> verdict

A text is a function of its prompt, its parameters and its seed; where a client gives none, of the key
under which it asks. So faults may change when a token comes, and never which.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from benchmarks import prompts
from paceline import AsyncClient, SamplingParams
from paceline.runtime.client import ClientError
from paceline.runtime.client.calls import AsyncTransport, Wire
from paceline.runtime.client.grpc import AsyncGrpcTransport
from paceline.runtime.client.http import AsyncHttpTransport
from paceline.runtime.tokenizer import Tokenizer

PROMPT_TOKENS = (16, 400)
SHORTEST_TEXT = 16
"""Tokens."""
MAX_RETRIES = 12
WHOLE_SHARE, SALTED_SHARE = 0.2, 0.5
"""Of requests: those not streamed, those whose prompt nobody has asked for before."""
REOPEN_SHARE = 0.1
"""Of requests: those before which a client connects anew, so that it meets frontends that are new."""

Verdict = Literal["ok", "wrong", "lost", "repeated"]


class Text(NamedTuple):
    """All of a text that a client is told."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None


NOTHING = Text()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Wanted:
    """What is asked for."""

    prompt: tuple[int, ...]
    params: SamplingParams

    @property
    def text_is_its_own(self) -> bool:
        """Whether all who ask for it get one text, whatever key they ask under."""
        return self.params.temperature == 0 or self.params.seed is not None


@dataclass(slots=True, eq=False, kw_only=True)
class Read:
    """A request, and what its client saw."""

    wanted: Wanted
    scheme: str
    streamed: bool
    key: str
    salt: str = ""
    asked_s: float = 0.0
    told_s: list[float] = field(default_factory=list)
    """When something of the text came."""
    num_calls: int = 0
    """More than one where the client had to ask again."""
    text: Text = NOTHING
    error: str | None = None

    @property
    def longest_gap_s(self) -> float:
        """Seconds without a word, from the request on."""
        moments = [self.asked_s, *self.told_s]
        return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)


def verdict(found: Text, expected: Text) -> Verdict:
    """Tokens that lack some of the expected ones are `lost`, those with more than these `repeated`;
    all other differences are `wrong`."""
    if found == expected:
        return "ok"
    if len(found.token_ids) < len(expected.token_ids):
        return "lost" if _is_within(found.token_ids, expected.token_ids) else "wrong"
    if len(found.token_ids) > len(expected.token_ids):
        return "repeated" if _is_within(expected.token_ids, found.token_ids) else "wrong"
    return "wrong"


def _is_within(some: Sequence[int], all_: Sequence[int]) -> bool:
    """Whether leaving tokens out of the second gives the first."""
    rest = iter(all_)
    return all(token in rest for token in some)


def make_wanted(tokenizer: Tokenizer, *, count: int, longest_text: int, seed: int) -> list[Wanted]:
    """Requests of all lengths. Half are greedy, a quarter is sampled with a seed, a quarter without."""
    choices = random.Random(seed)
    shortest, longest = PROMPT_TOKENS
    made = []
    for number, token_ids in enumerate(
        prompts.held_out(tokenizer, count=count, length=longest, seed=seed)
    ):
        sampled = number % 2 == 1
        params = SamplingParams(
            max_tokens=choices.randint(SHORTEST_TEXT, longest_text),
            ignore_eos=True,
            temperature=0.9 if sampled else 0.0,
            top_p=0.95 if sampled else 1.0,
            seed=number if number % 4 == 1 else None,
        )
        prompt = tuple(token_ids[: choices.randint(shortest, longest)])
        made.append(Wanted(prompt=prompt, params=params))
    return made


# One client


class Keyed:
    """A transport whose calls all go under `key`, where a client by itself makes up one for each."""

    def __init__(self, transport: AsyncTransport) -> None:
        self.key = ""
        self.num_calls = 0
        self._transport = transport

    def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
        self.num_calls += 1
        headers = {
            name: self.key if name.lower() == "idempotency-key" else value
            for name, value in wire.headers.items()
        }
        return self._transport.open(replace(wire, headers=headers), timeout_s=timeout_s)

    async def close(self) -> None:
        await self._transport.close()


class Reader:
    """A client that reads one text at a time, and asks again until it has all of it."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """`timeout_s` is for each text as a whole."""
        self.scheme, _, self._address = url.partition("://")
        self._url, self._timeout_s = url, timeout_s
        self._client: AsyncClient | None = None

    async def read(self, read: Read) -> None:
        """Fill in what comes. What goes wrong is in its `error`: a failure is a result."""
        transport = self._connected()
        transport.key, transport.num_calls = read.key, 0
        read.asked_s = time.perf_counter()
        try:
            await (self._stream if read.streamed else self._whole)(read)
        except ClientError as error:
            read.error = f"{type(error).__name__}: {error}"
        read.num_calls = transport.num_calls

    async def close(self) -> None:
        """Let the connection go; the next text gets another."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _connected(self) -> Keyed:
        if self._client is None:
            self._transport = Keyed(
                AsyncGrpcTransport(self._address)
                if self.scheme == "grpc"
                else AsyncHttpTransport(self._url)
            )
            self._client = AsyncClient(
                self._url,
                transport=self._transport,
                timeout_s=self._timeout_s,
                max_retries=MAX_RETRIES,
            )
        return self._transport

    async def _stream(self, read: Read) -> None:
        assert self._client is not None, "connected before"
        pieces = self._client.stream(read.wanted.prompt, read.wanted.params, cache_salt=read.salt)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                read.told_s.append(time.perf_counter())
                token_ids, text, finish_reason = read.text
                read.text = Text(
                    token_ids + piece.token_ids,
                    text + piece.text,
                    piece.finish_reason or finish_reason,
                )

    async def _whole(self, read: Read) -> None:
        assert self._client is not None, "connected before"
        answer = await self._client.generate(
            read.wanted.prompt, read.wanted.params, cache_salt=read.salt
        )
        read.text = Text(answer.token_ids, answer.text, answer.finish_reason)


# All of them


class Load:
    """Readers that each ask again at once, and what came of all they asked for."""

    def __init__(self, readers: Sequence[Reader], wanted: Sequence[Wanted], *, seed: int) -> None:
        self.verdicts: dict[Read, Verdict] = {}
        """Of all that were asked for under load; complete once it is settled."""
        self._readers = readers
        self._wanted = wanted
        self._known: dict[Wanted, Text] = {}
        self._unknown: list[Read] = []
        """Read, and to be asked for once more to know their text."""
        self._choices = random.Random(seed)
        self._names = (f"{seed}-{number}" for number in itertools.count())
        self._in_flight: set[Read] = set()
        self._stopped = False

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    async def learn(self) -> None:
        """Ask for all texts that have one whoever asks. Raises ClientError where that fails."""
        own = [each for each in self._wanted if each.text_is_its_own]
        for read in await self._read_all(self._read_of(each, "http") for each in own):
            self._known[read.wanted] = _text_of(read)

    async def run(self) -> None:
        """Ask until it is stopped, and wait for all answers."""
        await asyncio.gather(*(self._keep_asking(reader) for reader in self._readers))

    def stop(self) -> None:
        self._stopped = True

    async def settle(self) -> None:
        """Ask again for those texts that depend on the key they were asked for under, and judge them.
        Raises ClientError where that fails."""
        reads, self._unknown = self._unknown, []
        again = (replace(each, told_s=[], text=NOTHING, error=None) for each in reads)
        for read, same in zip(reads, await self._read_all(again), strict=True):
            self._judge(read, _text_of(same))

    async def close(self) -> None:
        """Let all connections go."""
        for reader in self._readers:
            await reader.close()

    async def _keep_asking(self, reader: Reader) -> None:
        while not self._stopped:
            if self._choices.random() < REOPEN_SHARE:
                await reader.close()
            read = self._read_of(self._choices.choice(self._wanted), reader.scheme)
            read.streamed = self._choices.random() >= WHOLE_SHARE
            if self._choices.random() < SALTED_SHARE:
                read.salt = read.key
            self._in_flight.add(read)
            try:
                await reader.read(read)
            finally:
                self._in_flight.discard(read)
            if read.wanted.text_is_its_own:
                self._judge(read, self._known[read.wanted])
            else:
                self._unknown.append(read)

    def _read_of(self, wanted: Wanted, scheme: str) -> Read:
        return Read(wanted=wanted, scheme=scheme, streamed=True, key=next(self._names))

    def _judge(self, read: Read, expected: Text) -> None:
        found = verdict(read.text, expected)
        self.verdicts[read] = "lost" if found == "ok" and read.error is not None else found

    async def _read_all(self, reads: Iterable[Read]) -> list[Read]:
        """Each by a reader of its scheme, in the order given."""
        waiting: dict[str, list[Read]] = {"http": [], "grpc": []}
        given = list(reads)
        for each in reversed(given):
            waiting[each.scheme].append(each)

        async def work(reader: Reader) -> None:
            while waiting[reader.scheme]:
                await reader.read(waiting[reader.scheme].pop())

        await asyncio.gather(*(work(reader) for reader in self._readers))
        return given


def _text_of(read: Read) -> Text:
    if read.error is not None:
        raise ClientError(f"a request failed while nothing was struck: {read.error}")
    return read.text
