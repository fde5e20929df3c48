"""What keeps tenants apart: each has names of its own inside, for requests, sessions and cached prefixes.

    tenant a   request "r1", salt "s"  ──>  "3f…/r1", "3f…/s"  ──┐
    tenant b   request "r1", salt "s"  ──>  "81…/r1", "81…/s"  ──┴──> AsyncLLM, engines

Neither can the prefix cache answer one tenant with what another has sent, nor one abort or take what
the other has asked for. Both doors come through here.
"""

from __future__ import annotations

import functools
from hashlib import blake2b

from paceline.runtime.async_llm import AsyncLLM, RequestStream
from paceline.runtime.errors import PromptError
from paceline.runtime.requests import MAX_ID_CHARS, MAX_SALT_CHARS, Prompt
from paceline.runtime.types import SamplingParams

NOBODY = ""
"""The tenant of everybody where no keys are asked for."""


class TenantLLM:
    """An `AsyncLLM` as one tenant sees it."""

    def __init__(self, llm: AsyncLLM, tenant: str) -> None:
        self._llm = llm
        self._prefix = _prefix(tenant)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        num_draft_tokens: int | None,
        priority: int,
        cache_salt: str,
        session_id: str,
        retry_key: str | None = None,
    ) -> RequestStream:
        """`AsyncLLM.submit`, under names that are the tenant's. The stream's job has those."""
        if self.knows(request_id):
            raise PromptError(f"request_id {request_id!r:.80} is in use")
        return await self._llm.submit(
            prompt,
            params,
            request_id=self._own(request_id, "request_id", MAX_ID_CHARS),
            num_draft_tokens=num_draft_tokens,
            priority=priority,
            cache_salt=self._own(cache_salt, "cache_salt", MAX_SALT_CHARS),
            session_id=session_id and self._own(session_id, "session_id", MAX_SALT_CHARS),
            retry_key=None if retry_key is None else self._prefix + retry_key,
        )

    def knows(self, request_id: str) -> bool:
        """Whether a request of this tenant's has that id."""
        return self._llm.knows(self._prefix + request_id)

    def abort(self, request_id: str) -> bool:
        """Stop a request of this tenant's. False if it has none of that id."""
        return self._llm.abort(self._prefix + request_id)

    def _own(self, name: str, what: str, most: int) -> str:
        room = most - len(self._prefix)
        if len(name) > room:
            raise PromptError(f"{what} may have {room} characters, found {len(name)}")
        return self._prefix + name


@functools.lru_cache(maxsize=1024)
def _prefix(tenant: str) -> str:
    """All of one length, so that no name of one tenant's can begin with another's."""
    if tenant == NOBODY:
        return ""
    return blake2b(tenant.encode(), digest_size=8).hexdigest() + "/"
