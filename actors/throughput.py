"""One log line on what happened between two statuses of the engines."""

from __future__ import annotations

from paceline.runtime.types import EngineStatus, TransferTotals


def throughput(before: EngineStatus, now: EngineStatus, seconds: float) -> str:
    """One line on what happened between two statuses."""
    drafted = now.drafted - before.drafted
    line = (
        f"{(now.generation_tokens - before.generation_tokens) / seconds:.0f} tokens/s written, "
        f"{(now.prompt_tokens - before.prompt_tokens) / seconds:.0f} tokens/s read; "
        f"{now.num_running} running, {now.num_waiting} waiting; "
        f"KV {1 - now.num_free_blocks / max(1, now.num_blocks):.0%} used"
    )
    if drafted > 0:
        line += f"; {(now.accepted - before.accepted) / drafted:.0%} of drafts accepted"
    return line + _transfer_stats(before.transfers, now.transfers)


def _transfer_stats(before: TransferTotals, now: TransferTotals) -> str:
    """What moved between engines; nothing if nothing did."""
    fetched, failed = now.fetched - before.fetched, now.failed - before.failed
    text = ""
    if fetched > 0:
        late_ms = 1e3 * (now.unoverlapped_s - before.unoverlapped_s) / fetched
        text = (
            f"; {fetched} prompts fetched, {(now.num_bytes - before.num_bytes) / 1e6:.1f} MB, "
            f"{late_ms:.0f} ms of each not overlapped"
        )
    return f"{text}; {failed} fetches failed" if failed > 0 else text
