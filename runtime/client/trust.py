"""Whom a client trusts, and how it shows who it is itself: TLS from files in PEM."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.runtime.client.errors import ClientError

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Both are needed only where they differ from what every client has: the authorities that the
    system or its libraries trust, and no certificate."""

    ca_certs: str | None = None
    """Authorities to trust instead."""
    client_cert: str | tuple[str, str] | None = None
    """A certificate and its key, in one file or in two."""

    @property
    def is_default(self) -> bool:
        return self.ca_certs is None and self.client_cert is None

    def context(self) -> ssl.SSLContext | bool:
        """For httpx. Raises ClientError for files that are of no use."""
        if self.is_default:
            return True
        import httpx

        try:
            if self.ca_certs is None:
                context = httpx.create_ssl_context()
            else:
                context = ssl.create_default_context(cafile=self.ca_certs)
            if self.client_cert is not None:
                context.load_cert_chain(*self._pair(self.client_cert))
        except OSError as error:  # an SSLError is one
            raise self._unusable(error) from None
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """For gRPC. Raises ClientError for files that cannot be read."""
        import grpc

        try:
            authorities = None if self.ca_certs is None else Path(self.ca_certs).read_bytes()
            if self.client_cert is None:
                return grpc.ssl_channel_credentials(authorities)
            cert, key = (Path(path).read_bytes() for path in self._pair(self.client_cert))
        except OSError as error:
            raise self._unusable(error) from None
        return grpc.ssl_channel_credentials(authorities, key, cert)

    @staticmethod
    def _pair(given: str | tuple[str, str]) -> tuple[str, str]:
        return (given, given) if isinstance(given, str) else given

    def _unusable(self, error: OSError) -> ClientError:
        files = f"ca_certs {self.ca_certs!r}, client_cert {self.client_cert!r}"
        return ClientError(f"TLS cannot be set up with {files}: {error.strerror or error}")
