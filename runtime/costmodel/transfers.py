"""Reading a prompt on one engine and writing its text on another: what that costs, and when it pays.

    together    the chunks of a prompt ride in the steps of all texts: each step takes longer while it is read
    apart       its KV follows layer by layer while it is read; what is left of it at the end is waited for

It pays where there are engines enough for one to be kept busy by reading, and where the texts together would be held up
for longer than the one prompt waits for its KV.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.runtime.costmodel.passes import Load, split_pass
from paceline.runtime.costmodel.rounds import Choice, Setting

BUSY = 0.5
"""A reading engine that has less to do is better one that writes too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """Of one prompt."""

    prefill_s: float
    """Reading it, by target and drafter, alone on an engine."""
    kv_bytes: float
    """Of both models, all ranks."""
    transfer_s: float
    """Moving its KV from engine to engine, every rank on a link of its own."""
    waited_s: float
    """What is left of that when the prompt has been read."""
    held_up_s: float
    """By how much reading it here delays each text that is written here."""
    stretched: float
    """A step with a chunk of it, over one without."""
    hiding_rate: float
    """Network of each GPU, bytes per second, from which on only the last layer's KV is waited for."""
    read_share: float
    """Of a request's GPU time, what reading its prompt takes."""
    num_texts: int
    num_engines: int
    """That the GPUs hold."""

    @property
    def reading_engines(self) -> float:
        """How many of them the load would keep busy with reading alone."""
        return self.read_share * self.num_engines

    @property
    def keeps_busy(self) -> bool:
        """Whether one of several engines would have enough to read."""
        return self.num_engines > 1 and self.reading_engines >= BUSY

    @property
    def pays(self) -> bool:
        return self.keeps_busy and self.num_texts * self.held_up_s > self.waited_s


def prefill_s(setting: Setting, num_tokens: int, *, chunk: int, draft_ranks: int) -> float:
    """Seconds until a prompt is read, chunk after chunk, by both models; `draft_ranks` 0 without a drafter."""
    total_s, done = 0.0, 0
    while done < num_tokens:
        rows = min(chunk, num_tokens - done)
        load = Load(rows=rows, sequences=1, context=done + rows / 2, outputs=1)
        total_s += (
            _both_s(setting, load, draft_ranks=draft_ranks) + setting.machine.execution.step_s
        )
        done += rows
    return total_s


def apart(
    setting: Setting, choice: Choice, *, prompt: int, output: int, chunk: int, num_engines: int
) -> Apart:
    """What reading prompts of so many tokens elsewhere would change, in chunks as an engine reads them."""
    drafting = choice.drafting
    draft_ranks = 0 if drafting is None else drafting.draft_tensor_parallel_size
    read_s = prefill_s(setting, prompt, chunk=chunk, draft_ranks=draft_ranks)
    num_chunks = -(-prompt // chunk)
    models = [setting.target] + ([] if setting.drafter is None else [setting.drafter])
    kv_bytes = prompt * sum(model.kv_bytes_per_token for model in models)
    transfer_s = kv_bytes / (setting.ranks * setting.machine.network)
    layers = setting.target.num_layers
    last_s = transfer_s / (layers * num_chunks)  # the last layer of the last chunk
    hidden_s = read_s * (1 - 1 / (layers * num_chunks))
    rows = min(chunk, prompt)
    beside = Load(rows=rows, sequences=1, context=prompt / 2, outputs=1)
    # chunks share passes with what is written: their rows cost, reading the weights does not
    more_s = max(0.0, _both_s(setting, beside, draft_ranks=draft_ranks) - _weights_s(setting))
    round_s = choice.round.total_s
    writing_s = output / choice.tokens_per_s
    return Apart(
        prefill_s=read_s,
        kv_bytes=kv_bytes,
        transfer_s=transfer_s,
        waited_s=max(last_s, transfer_s - hidden_s),
        held_up_s=num_chunks * more_s,
        stretched=(round_s + more_s) / round_s,
        hiding_rate=kv_bytes / setting.ranks / hidden_s,
        read_share=read_s / (read_s + writing_s),
        num_texts=setting.batch,
        num_engines=num_engines,
    )


def _both_s(setting: Setting, load: Load, *, draft_ranks: int) -> float:
    machine = setting.machine
    seconds = split_pass(setting.target, load, machine=machine, ranks=setting.ranks).total_s
    if draft_ranks and setting.drafter is not None:
        seconds += split_pass(setting.drafter, load, machine=machine, ranks=draft_ranks).total_s
    return seconds


def _weights_s(setting: Setting) -> float:
    """A pass over next to nothing, which every step has anyway."""
    load = Load(rows=1, sequences=1, context=0, outputs=1)
    return split_pass(setting.target, load, machine=setting.machine, ranks=setting.ranks).total_s
