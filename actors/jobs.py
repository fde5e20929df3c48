"""Jobs of a Ray cluster, by its job server: HTTP, so that one outside the cluster can submit.

What Ray and the network raise becomes one of our errors, in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray.exceptions
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from paceline.runtime.errors import DeadlineError, UserError

CONNECT_S = 10.0
POLL_S = 0.5
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""What Ray reads in a job's environment: seconds from SIGTERM to SIGKILL when it is stopped."""
DEFAULT_STOP_WAIT_S = 3
"""Ray's own."""
STOP_GRACE_S = 20.0
"""What Ray may take to begin stopping a job, and to note that it has ended."""


class Jobs:
    """One cluster's job server."""

    def __init__(self, address: str) -> None:
        """`address` is like `http://head:8265`. Raises UserError where no job server answers, or it asks
        for another token than ours."""
        self.address = address
        self._knock()
        with self._readable():
            self._client = JobSubmissionClient(address)

    def submit(self, entrypoint: str, *, runtime_env: Mapping[str, Any], job_id: str | None) -> str:
        """The new job's id. Raises UserError where there is already one of that id."""
        with self._readable():
            new: str = self._client.submit_job(
                entrypoint=entrypoint, runtime_env=dict(runtime_env), submission_id=job_id
            )
        return new

    def status(self, job_id: str) -> str:
        """`PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`. Raises UserError for no such job."""
        return str(self._info(job_id).status.value)

    def logs(self, job_id: str) -> str:
        """What it has written so far."""
        with self._readable():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> int:
        """Write its log to stdout until it ends; its exit code, 1 if it was stopped or never began."""
        self._info(job_id)  # so that a wrong id is told as such
        with self._readable():
            asyncio.run(self._copy_log(job_id))
        while not (
            info := self._info(job_id)
        ).status.is_terminal():  # the log may end before the job
            time.sleep(POLL_S)
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.status == JobStatus.STOPPED:
            print(f"paceline: job {job_id} was stopped", file=sys.stderr)
        elif info.driver_exit_code is None:
            print(f"paceline: job {job_id} did not run: {info.message}", file=sys.stderr)
        return info.driver_exit_code or 1

    def stop(self, job_id: str) -> str:
        """Tell it to end, and return its last status when it has. Raises DeadlineError where Ray does
        not end it in the time that was set when it was submitted."""
        info = self._info(job_id)
        env = (info.runtime_env or {}).get("env_vars", {})
        patience_s = int(env.get(STOP_WAIT, DEFAULT_STOP_WAIT_S)) + STOP_GRACE_S
        with self._readable():
            self._client.stop_job(job_id)
        deadline_s = time.monotonic() + patience_s
        while not (status := self._info(job_id).status).is_terminal():
            if time.monotonic() >= deadline_s:
                raise DeadlineError(
                    f"waited {patience_s:.0f} s for job {job_id} to end; it is {status.value}"
                )
            time.sleep(POLL_S)
        return str(status.value)

    async def _copy_log(self, job_id: str) -> None:
        async for piece in self._client.tail_job_logs(job_id):
            print(piece, end="", flush=True)

    def _info(self, job_id: str) -> JobDetails:
        with self._readable():
            return self._client.get_job_info(job_id)

    def _knock(self) -> None:
        """Ray's client has no deadline of its own."""
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"the address of a job server is like http://head:8265, found {self.address!r}"
            )
        if urllib.request.getproxies():  # then it is the proxy that is to be reached
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from None

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            why = str(error).splitlines()[0].split(". ")[0]
            raise UserError(
                f"{self.address}: {why}: set RAY_AUTH_MODE here as where the cluster was started, to "
                "`disabled`, or to `token` with its token in RAY_AUTH_TOKEN or ~/.ray/auth_token "
                "(there `ray get-auth-token` prints it)"
            ) from None
        except (OSError, aiohttp.ClientError) as error:
            raise self._unreachable(str(error)) from None
        except (RuntimeError, ValueError) as error:  # whatever the job server answers but 200
            raise UserError(f"{self.address}: {_brief(error)}") from None

    def _unreachable(self, why: str) -> UserError:
        return UserError(f"cannot reach the job server of Ray at {self.address}: {why}")


def _brief(error: Exception) -> str:
    """What the job server says, in one sentence, without the stacks of its own that may come before."""
    lines = [line for line in str(error).splitlines() if re.search(r"\w", line)]
    sentence = re.sub(r"^.*(status code \d+|\w+Error): ", "", lines[-1] if lines else "")
    return sentence.rstrip(".") or type(error).__name__
