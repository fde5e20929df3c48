"""Certificates for tests: authorities, and what they sign, as files in PEM."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate and its key."""

    cert: str
    key: str


class Authority:
    """Signs certificates and writes them into a folder; `path` is its own."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.path = str(folder / f"ca-{id(self):x}.pem")
        self._ca.cert_pem.write_to_path(self.path)

    def sign(self, name: str, *identities: str, **how: Any) -> Signed:
        """For DNS names and addresses; the same `name` means the same files."""
        leaf = self._ca.issue_cert(*(identities or ("127.0.0.1", "localhost")), **how)
        signed = Signed(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key"))
        Path(signed.cert).write_bytes(b"".join(each.bytes() for each in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(signed.key)
        return signed

    def expired(self, name: str, *identities: str) -> Signed:
        yesterday = datetime.now(UTC) - timedelta(days=1)
        return self.sign(
            name, *identities, not_before=yesterday - timedelta(1), not_after=yesterday
        )
