"""A server that runs: whether it is well, and where the time of a request goes on its way.

    here ── HTTP ──> frontend ── router, link ──> queue ──> prefill ──> decode ──> back
         wall clock  e2e_request_latency          request_queue_time, _prefill_time, _decode_time

A hop's time is what one figure has more than those inside it: means over the requests that the server
finished meanwhile, which are ours alone where nobody else uses it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

import paceline
from paceline.actors.checks.check import Check, Finding, failed, ok, skipped, warning
from paceline.actors.commands.top_sample import Live
from paceline.runtime.client import Client
from paceline.runtime.client.trust import Trust

REQUESTS, TOKENS = 3, 16
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 16, 512
ANSWER_S = 60.0
STATUS_S = 3.0
"""How long the totals of engines may take to reach a frontend."""
STAGES = {
    "total": "paceline:e2e_request_latency_seconds",
    "queue": "paceline:request_queue_time_seconds",
    "prefill": "paceline:request_prefill_time_seconds",
    "decode": "paceline:request_decode_time_seconds",
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where it is, and what to show it."""

    client: httpx.Client
    grpc_url: str | None = None
    api_key: str | None = None
    trust: Trust = field(default_factory=Trust)

    def checks(self) -> list[Check]:
        """All of a server that runs, in their order."""
        return [
            Check("health", self.health),
            Check("version", self.version),
            Check("engines", self.engines),
            Check("HTTP round trip", self.http, timeout_s=2 * ANSWER_S),
            Check("gRPC round trip", self.grpc, timeout_s=2 * ANSWER_S),
            Check("KV transfer", self.transfer, timeout_s=2 * ANSWER_S),
        ]

    def health(self) -> Finding:
        """Whether tokens can be generated."""
        began_s = time.monotonic()
        answer = self.client.get("/health")
        if answer.status_code != 200:
            return failed(f"/health answers {answer.status_code}: {_words(answer)}")
        return ok(f"{self.client.base_url} decodes, in {_ms(time.monotonic() - began_s)}")

    def version(self) -> Finding:
        """Whether the server is of this version."""
        theirs, ours = str(self._json("/version").get("version")), paceline.__version__
        if theirs != ours:
            return warning(
                f"the server is {theirs}, this is {ours}",
                "they speak one protocol only as far as both know it: install the same version on both",
                server=theirs,
                client=ours,
            )
        return ok(f"{theirs} on both sides", server=theirs, client=ours)

    def engines(self) -> Finding:
        """What each engine is doing."""
        live = self._live()
        states = {each.id: each.state for each in live.engines} or {"engine": "serving"}
        text = ", ".join(f"{name} {state}" for name, state in states.items())
        errors = [f"{each.id}: {each.error}" for each in live.engines if each.error]
        if errors:
            return warning(f"{text}; {'; '.join(errors)}", "the server's log says more", **states)
        return ok(text, **states)

    def http(self) -> Finding:
        """A few requests over HTTP, and where their time went."""
        self._complete(PROMPT_TOKENS)  # the first one pays for what is made on first use
        before = self._sums()
        began_s = time.monotonic()
        for _ in range(REQUESTS):
            self._complete(PROMPT_TOKENS)
        wall_s = (time.monotonic() - began_s) / REQUESTS
        hops = hop_times(before, self._sums(), wall_s=wall_s)
        told = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in hops.items())
        facts = {f"{name}_s": round(seconds, 6) for name, seconds in hops.items()}
        return ok(f"{TOKENS} tokens in {_ms(wall_s)}: {told}", wall_s=round(wall_s, 6), **facts)

    def grpc(self) -> Finding:
        """The same over gRPC."""
        if self.grpc_url is None:
            return skipped("no gRPC address is known (--grpc-url grpc://HOST:PORT)")
        with Client(
            self.grpc_url,
            api_key=self.api_key,
            ca_certs=self.trust.ca_certs,
            client_cert=self.trust.client_cert,
            timeout_s=ANSWER_S,
        ) as client:
            client.generate(_prompt(PROMPT_TOKENS), max_tokens=1)  # it connects
            began_s = time.monotonic()
            answer = client.generate(
                _prompt(PROMPT_TOKENS), max_tokens=TOKENS, temperature=0.0, ignore_eos=True
            )
            wall_s = time.monotonic() - began_s
        num_tokens = answer.usage.completion_tokens
        if num_tokens != TOKENS:
            return failed(f"{TOKENS} tokens were asked for, {num_tokens} came")
        return ok(f"{TOKENS} tokens in {_ms(wall_s)} from {self.grpc_url}", wall_s=wall_s)

    def transfer(self) -> Finding:
        """A prompt that is read on one engine and continued on another."""
        before = self._live()
        if not any(each.role == "prefill" for each in before.status.members):
            return skipped("no engine reads prompts for others")
        size = min(LONG_PROMPT_TOKENS, self._max_model_len() // 2)
        seconds = self._complete(size)
        deadline_s = time.monotonic() + STATUS_S
        now = before.status.transfers
        while time.monotonic() < deadline_s:
            now = self._live().status.transfers
            if now.fetched > before.status.transfers.fetched:
                late_s = now.unoverlapped_s - before.status.transfers.unoverlapped_s
                num_bytes = now.num_bytes - before.status.transfers.num_bytes
                return ok(
                    f"{size} tokens of KV, {num_bytes / 1e6:.1f} MB: {_ms(max(0.0, late_s))} after the "
                    f"prompt was read; {_ms(seconds)} in all",
                    tokens=size,
                    bytes=num_bytes,
                    unoverlapped_s=late_s,
                )
            time.sleep(0.1)
        if now.failed > before.status.transfers.failed:
            return failed(
                "the KV of a prompt could not be fetched: it was read again where the text is written",
                "the engines' logs say why; is the KV links' address reached from other nodes?",
            )
        return skipped("the router had the prompt read where its text is written: that was cheaper")

    def _complete(self, num_prompt_tokens: int) -> float:
        """Seconds for a text of `TOKENS` tokens."""
        body = {
            "prompt": _prompt(num_prompt_tokens),
            "max_tokens": TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        began_s = time.monotonic()
        answer = self.client.post("/v1/completions", json=body, timeout=ANSWER_S)
        seconds = time.monotonic() - began_s
        if answer.status_code != 200:
            raise AnswerError(
                f"a completion is answered with {answer.status_code}: {_words(answer)}"
            )
        num_tokens = answer.json()["usage"]["completion_tokens"]
        if num_tokens != TOKENS:
            raise AnswerError(f"{TOKENS} tokens were asked for, {num_tokens} came")
        return seconds

    def _live(self) -> Live:
        answer = self.client.get("/live/status")
        if answer.status_code in (401, 403):
            raise AnswerError("the server wants a key: give --api-key, or set PACELINE_API_KEY")
        if answer.status_code != 200:
            raise AnswerError(f"/live/status answers {answer.status_code}: {_words(answer)}")
        return msgspec.json.decode(answer.content, type=Live)

    def _max_model_len(self) -> int:
        return int(self._json("/v1/models")["data"][0]["max_model_len"])

    def _sums(self) -> dict[str, tuple[float, float]]:
        return sums(self.client.get("/metrics").text)

    def _json(self, path: str) -> dict[str, Any]:
        answer = self.client.get(path)
        if answer.status_code != 200:
            raise AnswerError(f"{path} answers {answer.status_code}: {_words(answer)}")
        found: dict[str, Any] = answer.json()
        return found


class AnswerError(Exception):
    """The server answers, and not as it should."""


def sums(exposition: str) -> dict[str, tuple[float, float]]:
    """Sum and count of each stage's histogram."""
    names = {name: stage for stage, name in STAGES.items()}
    found = dict.fromkeys(STAGES, (0.0, 0.0))
    for family in text_string_to_metric_families(exposition):
        if family.name in names:
            values = {sample.name: sample.value for sample in family.samples}
            found[names[family.name]] = (
                values.get(f"{family.name}_sum", 0.0),
                values.get(f"{family.name}_count", 0.0),
            )
    return found


def hop_times(
    before: Mapping[str, tuple[float, float]],
    now: Mapping[str, tuple[float, float]],
    *,
    wall_s: float,
) -> dict[str, float]:
    """Mean seconds of each hop; nothing where no request ended in between."""
    mean = {}
    for stage in STAGES:
        seconds, count = (n - b for n, b in zip(now[stage], before[stage], strict=True))
        if count <= 0:
            return {}
        mean[stage] = seconds / count
    inside = mean["queue"] + mean["prefill"] + mean["decode"]
    return {
        "HTTP": max(0.0, wall_s - mean["total"]),
        "frontend and link": max(0.0, mean["total"] - inside),
        "queue": mean["queue"],
        "prefill": mean["prefill"],
        "decode": mean["decode"],
    }


def _prompt(num_tokens: int) -> list[int]:
    """Of its own, so that nothing of it is cached. The lowest ids are often special."""
    return [random.randrange(10, 90) for _ in range(num_tokens)]


def _words(answer: httpx.Response) -> str:
    """The server's own, in a line."""
    try:
        return str(answer.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return answer.text[:100].replace("\n", " ")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"
