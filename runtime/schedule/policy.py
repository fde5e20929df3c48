"""What each KV policy asks of the scheduler: how many blocks, which of them are done with.

    full           | every token |
    sink_window    | sinks |    freed while it runs    | window | next tokens |
                           ^ whole blocks only         ^ of the first token still to be read

A policy here only counts. What attention does with the blocks that are left is its namesake's
business in `runtime/kv/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paceline.runtime.types import KvPolicyName


class KvPolicy(Protocol):
    """Three answers, none of which mutates anything."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether a block's KV depends on nothing but the tokens up to its end."""

    @property
    def bounded_by_context(self) -> bool:
        """Whether prompt and text together must fit the model's context."""

    def most_blocks(self, num_tokens: int, *, span: int) -> int:
        """The most blocks held at once until `num_tokens` are in the KV, where at most `span`
        tokens lie between the first that is still to be read by some model and the end."""

    def done_with(self, first_unread: int) -> range:
        """Entries of the block table that no token from position `first_unread` on looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """Every token sees every earlier one. Exact."""

    block_size: int
    shares_prefixes: bool = True
    bounded_by_context: bool = True

    def most_blocks(self, num_tokens: int, *, span: int) -> int:  # noqa: ARG002
        return -(-num_tokens // self.block_size)

    def done_with(self, first_unread: int) -> range:  # noqa: ARG002
        return range(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkWindow:
    """A token sees the first `sink_tokens` and the `window` latest, itself among them (StreamingLLM).

    Lossy, in constant memory. The KV of a token depends on the window it was read in, so prefixes
    are not shared. Positions are those within what is kept, so the model's context bounds neither
    prompt nor text: a long prompt is read in chunks and its middle is freed on the way.
    """

    block_size: int
    sink_tokens: int
    window: int
    shares_prefixes: bool = False
    bounded_by_context: bool = False

    @property
    def _num_sink_blocks(self) -> int:
        return -(-self.sink_tokens // self.block_size)

    def most_blocks(self, num_tokens: int, *, span: int) -> int:
        every = -(-num_tokens // self.block_size)
        # the window of the first unread token and what follows it begin anywhere within a block
        window = -(-(self.window - 1 + span) // self.block_size) + 1
        return min(every, self._num_sink_blocks + window)

    def done_with(self, first_unread: int) -> range:
        end = max(0, first_unread - self.window + 1) // self.block_size
        return range(self._num_sink_blocks, max(self._num_sink_blocks, end))


def make_policies(
    *, block_size: int, sink_tokens: int, window: int
) -> dict[KvPolicyName, KvPolicy]:
    """Every policy, by the name that requests ask for."""
    return {
        "full": Full(block_size=block_size),
        "sink_window": SinkWindow(block_size=block_size, sink_tokens=sink_tokens, window=window),
    }
