"""Continue prompts, and say where the time went."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from paceline.actors.status_line import StatusLine
from paceline.runtime.errors import ConfigError, PromptError
from paceline.runtime.llm import LLM
from paceline.runtime.lossless import NEAR_TIE, first_difference
from paceline.runtime.outputs import RequestOutput, empty_output
from paceline.runtime.requests import Prompt, TextPrompt, TokensPrompt
from paceline.runtime.types import Event, RequestMetrics, SamplingParams

NAME = "generate"
POSITIONAL: tuple[str, ...] = ()
PROGRESS_EVERY_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="Text to continue.")
    parser.add_argument(
        "--prompts-file",
        metavar="F.jsonl",
        help='One prompt a line: {"prompt": "..."} or {"prompt_token_ids": [...]}.',
    )
    parser.add_argument("--output", metavar="F.jsonl", help="Write one result a line there.")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="Also run without speculation and compare the tokens.",
    )


def run(args: argparse.Namespace) -> int:
    from paceline.actors.cli import engine_settings, open_llm, sampling_params

    started_s = time.perf_counter()
    prompts = read_prompts(args.prompt, args.prompts_file)
    params = sampling_params(args)
    settings = engine_settings(args)
    if args.output is not None and not Path(args.output).parent.is_dir():
        raise ConfigError(f"--output: no folder {Path(args.output).parent}")
    if args.compare and not settings.get("speculative_config"):
        raise ConfigError("--compare needs a --speculative-config to compare with")
    with open_llm(settings) as llm:
        screen = Screen(sys.stdout, num_prompts=len(prompts), started_s=started_s)
        outputs = _generate(llm, prompts, params, screen)
        screen.table(outputs)
        if args.output is not None:
            with open(args.output, "w") as file:
                file.writelines(json.dumps(_record(output)) + "\n" for output in outputs)
        if args.compare:
            reporting = msgspec.structs.replace(params, logprobs=2)
            plain = llm.generate(prompts, reporting, num_draft_tokens=0, use_tqdm=False)
            return 0 if screen.comparison(plain, outputs, greedy=params.greedy) else 1
    return 0


def read_prompts(prompt: str | None, path: str | None) -> list[Prompt]:
    """The prompts asked for. Raises PromptError, naming the line, for one that is none."""
    if (prompt is None) == (path is None):
        raise PromptError("give either PROMPT or --prompts-file")
    if prompt is not None:
        return [TextPrompt(prompt=prompt)]
    assert path is not None
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8: {error}") from None
    prompts = [
        _read_prompt(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise PromptError(f"{path} has no prompts")
    return prompts


def _read_prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or len(value) != 1:
        raise PromptError(f'{where}: expected {{"prompt": ...}} or {{"prompt_token_ids": [...]}}')
    if isinstance(value.get("prompt"), str):
        return TextPrompt(prompt=value["prompt"])
    ids = value.get("prompt_token_ids")
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return TokensPrompt(prompt_token_ids=ids)
    raise PromptError(f'{where}: expected {{"prompt": ...}} or {{"prompt_token_ids": [...]}}')


def _generate(
    llm: LLM, prompts: list[Prompt], params: SamplingParams, screen: Screen
) -> list[RequestOutput]:
    jobs = llm.jobs(prompts, params)
    outputs = [empty_output(job) for job in jobs]
    with StatusLine(sys.stderr) as status:
        for number, part in llm.stream(jobs):
            outputs[number].add(part)
            screen.show(number, outputs[number])
            new = part.outputs[0]
            screen.progress(status, len(new.token_ids), new.num_accepted)
    return outputs


def _record(output: RequestOutput) -> dict[str, Any]:
    """One line of the output file."""
    completion, metrics = output.outputs[0], output.metrics
    record: dict[str, Any] = {
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if metrics is not None:
        record |= {
            "tokens_per_second": round(metrics.tokens_per_second, 2),
            "rounds": metrics.rounds,
            "drafted": metrics.drafted,
            "accepted": metrics.accepted,
            "draft_ms": round(metrics.times.draft_ms, 3),
            "verify_ms": round(metrics.times.verify_ms, 3),
            "calibrate_ms": round(metrics.times.calibrate_ms, 3),
        }
    return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Several requests' metrics, added up."""

    tokens: int
    decode_s: float
    rounds: int
    drafted: int
    accepted: int
    stages: tuple[tuple[str, float], ...]
    """Name and milliseconds."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.decode_s if self.decode_s else 0.0


def add_up(outputs: list[RequestOutput]) -> Totals:
    """Decoding only: tokens after each request's first. Where requests ran side by side, each stage
    gets its share of the time they took together."""
    each: list[RequestMetrics] = [
        completion.metrics
        for output in outputs
        for completion in output.outputs
        if completion.metrics
    ]
    begun = [at for m in each if (at := m.at(Event.FIRST_TOKEN)) is not None]
    ended = [at for m in each if (at := m.at(Event.FINISHED)) is not None]
    summed_s = sum(m.decode_s for m in each)
    decode_s = min(summed_s, max(ended) - min(begun)) if begun and ended else 0.0
    overlap = decode_s / summed_s if summed_s else 0.0
    stages = {
        "calibrate (exact drafting pass)": overlap * sum(m.times.calibrate_ms for m in each),
        "draft (other drafting passes)": overlap * sum(m.times.draft_ms for m in each),
        "verify (target pass)": overlap * sum(m.times.verify_ms for m in each),
    }
    rest = max(0.0, decode_s * 1e3 - sum(stages.values()))
    return Totals(
        tokens=sum(m.num_tokens - 1 for m in each),
        decode_s=decode_s,
        rounds=sum(m.rounds for m in each),
        drafted=sum(m.drafted for m in each),
        accepted=sum(m.accepted for m in each),
        stages=(*stages.items(), ("coordinate (plan, channel, bookkeeping)", rest)),
    )


class Screen:
    """What a person sees: text on standard output, everything else on standard error."""

    def __init__(self, out: IO[str], *, num_prompts: int, started_s: float) -> None:
        from rich.console import Console

        self._out = out
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = out.isatty()
        self._num_prompts = num_prompts
        self._done = 0
        self._outputs: dict[int, RequestOutput] = {}
        """Those that have text."""
        self._head = 0
        """The prompt whose text is shown as it comes; later ones wait until it has ended."""
        self._shown: dict[int, int] = {}
        """Characters of each that are out."""
        self._started_s = started_s
        self._first_token_at: float | None = None
        self._last_progress_s = 0.0
        self._tokens = self._accepted = 0

    def show(self, number: int, output: RequestOutput) -> None:
        """Text of one prompt so far. Prompts run side by side, but their texts come out one after
        another."""
        if self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        self._outputs[number] = output
        self._done += output.finished
        while (head := self._outputs.get(self._head)) is not None:
            self._write(self._head, head)
            if not head.finished:
                break
            self._out.write("\n")
            self._head += 1
        self._out.flush()

    def _write(self, number: int, output: RequestOutput) -> None:
        text, shown = output.outputs[0].text, self._shown.get(number)
        if shown is None:
            if self._num_prompts > 1:
                self._out.write(f"--- {number + 1}/{self._num_prompts}\n")
            if self._live and output.prompt is not None:
                self._out.write(output.prompt)
        self._out.write(text[shown or 0 :])
        self._shown[number] = len(text)

    def progress(self, status: StatusLine, num_tokens: int, num_accepted: int) -> None:
        """Keep the line at the foot up to date, a few times a second."""
        self._tokens, self._accepted = self._tokens + num_tokens, self._accepted + num_accepted
        now = time.perf_counter()
        if now - self._last_progress_s < PROGRESS_EVERY_S or self._first_token_at is None:
            return
        self._last_progress_s = now
        rate = self._tokens / max(1e-9, now - self._first_token_at)
        status.show(
            f"{self._done}/{self._num_prompts} prompts, {self._tokens} tokens, {rate:.0f} tokens/s, "
            f"{100 * self._accepted / max(1, self._tokens):.0f} % of them drafted"
        )

    def table(self, outputs: list[RequestOutput]) -> None:
        """Where the time went."""
        from rich.table import Table

        totals = add_up(outputs)
        table = Table(title="Where the time went", title_justify="left")
        for column in ("stage", "ms", "ms per round", "share"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        whole = totals.decode_s * 1e3
        for name, ms in totals.stages:
            if ms == 0.0 and not totals.drafted:
                continue
            per_round = ms / totals.rounds if totals.rounds else 0.0
            share = 100 * ms / whole if whole else 0.0
            table.add_row(name, f"{ms:.1f}", f"{per_round:.2f}", f"{share:.0f} %")
        self._console.print(table)
        line = f"{totals.tokens} tokens in {totals.decode_s:.2f} s: {totals.tokens_per_second:.0f} tokens/s"
        if totals.drafted:
            line += (
                f"; {totals.accepted} of {totals.drafted} drafted tokens accepted, "
                f"{totals.tokens / totals.rounds:.2f} tokens per round"
            )
        if self._first_token_at is not None:
            waited_s = self._first_token_at - self._started_s
            line += f"; first token {waited_s:.1f} s after the command"
        self._console.print(line)

    def comparison(
        self, plain: list[RequestOutput], outputs: list[RequestOutput], *, greedy: bool
    ) -> bool:
        """Whether speculation changed a token beyond rounding, and what it gained. True where all is well."""
        before, after = add_up(plain), add_up(outputs)
        gain = after.tokens_per_second / before.tokens_per_second if before.tokens else 0.0
        self._console.print(
            f"without speculation: {before.tokens_per_second:.0f} tokens/s; "
            f"speculation makes it {gain:.2f} times as fast"
        )
        if not greedy:
            self._console.print(
                "sampling: texts with and without drafts differ, their distributions do not "
                "(paceline check-lossless tests that)"
            )
            return True
        pairs = [(a, first_difference(a, b)) for a, b in zip(plain, outputs, strict=True)]
        differing = [(a, found) for a, found in pairs if found is not None]
        if not differing:
            self._console.print(
                f"tokens identical with and without speculation ({len(plain)} prompts)"
            )
        for output, found in differing:
            self._console.print(
                f"{output.request_id}: tokens differ from position {found.position} on, where the target preferred "
                f"its token by a logit margin of {found.margin:.4f}"
                + (": a near-tie, which rounding decides" if found.margin <= NEAR_TIE else "")
            )
        return all(found.margin <= NEAR_TIE for _, found in differing)
