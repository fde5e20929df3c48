"""Who may ask: API keys, and the tenant that each belongs to.

    api_key, PACELINE_API_KEY ──────┐
    api_key_file ──when it changes──┴──> Keys ──bearer token──> tenant, or nobody's: refused

Only digests of keys are kept, and every one of them is compared with every token, in a time that
tells nothing of either.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from paceline.runtime.config import ServerConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.watched import WatchedFiles

logger = logging.getLogger(__name__)

KEY_VARIABLE = "PACELINE_API_KEY"
ADMIN = "admin"
"""Where a tenant has this name, nobody else changes which engines there are."""
MAX_KEYS = 1024
MAX_FILE_BYTES = 1 << 20
LOOK_EVERY_S = 1.0
"""At most so often the file's time is looked at."""
_ENTRY = re.compile(r"(?:(?P<tenant>[A-Za-z0-9._-]{1,64}):)?(?P<key>[A-Za-z0-9._~+/-]+=*)")
"""A key is what RFC 6750 lets a bearer token be: neither colons nor commas are part of one."""


class _Key(NamedTuple):
    digest: bytes
    tenant: str


class Keys:
    """All keys of a server. Made by `load_keys`."""

    def __init__(
        self,
        given: Iterable[_Key],
        *,
        file: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for a file that has no keys."""
        self._given = tuple(given)
        self._file = file
        self._clock = clock
        self._keys = self._given
        if file is not None:
            self._watched = WatchedFiles([file])
            self._keys = _merged(self._given, _read_file(file))
        self._look_s = clock() + LOOK_EVERY_S

    def tenant_of(self, authorization: bytes) -> str | None:
        """The tenant whose key an Authorization header has; None for anything else."""
        self._follow_file()
        scheme, _, token = authorization.partition(b" ")
        asked = _digest(token.strip())
        found = None
        for digest, tenant in self._keys:  # all of them: when it ends must not tell which it was
            if hmac.compare_digest(digest, asked):
                found = tenant
        return found if scheme.lower() == b"bearer" else None

    def is_admin(self, tenant: str) -> bool:
        """Whether a tenant may change which engines there are."""
        return tenant == ADMIN or all(each.tenant != ADMIN for each in self._keys)

    def _follow_file(self) -> None:
        """Take the file as it is now. One that cannot be used changes nothing: it may be half written."""
        if self._file is None or self._clock() < self._look_s:
            return
        self._look_s = self._clock() + LOOK_EVERY_S
        if not self._watched.changed():
            return
        try:
            self._keys = _merged(self._given, _read_file(self._file))
            logger.info("api_key_file %s is read again: %d keys", self._file, len(self._keys))
        except ConfigError as error:
            logger.error("the API keys from before are kept: %s", error)


def load_keys(server: ServerConfig, *, environ: Mapping[str, str] = os.environ) -> Keys | None:
    """The keys of flags, environment and file together; None where there are none of these. Raises
    ConfigError, which never has a key in its text."""
    given: list[_Key] = []
    for name, text in (("api_key", server.api_key), (KEY_VARIABLE, environ.get(KEY_VARIABLE))):
        if text is not None:
            given += [_parse(part, f"{name}, key {i}") for i, part in enumerate(text.split(","), 1)]
    if not given and server.api_key_file is None:
        return None
    return Keys(_merged(given), file=server.api_key_file)


def check_access(server: ServerConfig) -> None:
    """Raise ConfigError for keys that cannot be used, and warn of a server that lies open: to be called
    once, before any engine starts."""
    keys = load_keys(server)
    if server.api_key_file is not None:
        mode = Path(server.api_key_file).stat().st_mode
        if mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
            logger.warning(
                "api_key_file %s can be read by everybody or changed by others on this host: chmod 600, or "
                "defaultMode 0400 for a Kubernetes Secret",
                server.api_key_file,
            )
    if server.host in ("127.0.0.1", "::1", "localhost"):
        return
    if keys is None:
        logger.warning("no API key is asked for: whoever reaches %s may ask", server.host)
    elif server.ssl_certfile is None:
        logger.warning("API keys and texts cross the network as they are: see ssl_certfile")


def _read_file(path: str) -> list[_Key]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read api_key_file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file {path} is no text") from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"api_key_file {path} is larger than {MAX_FILE_BYTES} bytes")
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if entry:
            keys.append(_parse(entry, f"api_key_file {path}, line {number}"))
    if not keys:
        raise ConfigError(f"api_key_file {path} has no key")
    return keys


def _parse(entry: str, where: str) -> _Key:
    match = _ENTRY.fullmatch(entry.strip())
    if match is None:
        raise ConfigError(
            f"{where}: expected KEY or TENANT:KEY, a key being of letters, digits and -._~+/ with = at its end"
        )
    digest = _digest(match["key"].encode())
    return _Key(digest, match["tenant"] or f"key:{digest.hex()[:32]}")


def _merged(*sources: Iterable[_Key]) -> tuple[_Key, ...]:
    """Each key once. Raises ConfigError for one of two tenants."""
    tenants: dict[bytes, str] = {}
    for source in sources:
        for digest, tenant in source:
            if tenants.setdefault(digest, tenant) != tenant:
                raise ConfigError(f"one API key is given to two tenants, one of them {tenant}")
    if len(tenants) > MAX_KEYS:
        raise ConfigError(f"there may be {MAX_KEYS} API keys, found {len(tenants)}")
    return tuple(_Key(digest, tenant) for digest, tenant in tenants.items())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
