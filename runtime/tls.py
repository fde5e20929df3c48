"""TLS out of files: whether they are good for it, and what servers and channels make of them.

    ServerConfig.ssl_*    the HTTP and the gRPC door: a certificate, maybe clients' too
    EngineConfig.link_*   KV links: each brings a certificate of one authority, named `paceline-link`

Files are checked by a handshake with themselves, in memory: what it refuses the wire would refuse, but
only once engines run and somebody calls. Certificates that are replaced meanwhile are read again.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.types import WireType
from paceline.runtime.watched import WatchedFiles

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)

LINK_NAME = "paceline-link"
"""The DNS name in every link's certificate. Links are found by addresses that change with every pod, so that no
certificate could have them; who belongs to the links is what the name says."""
NEEDED = int(ssl.CERT_REQUIRED)


class TlsFiles(WireType, frozen=True, kw_only=True):
    """Where a side of TLS has its own from, in PEM."""

    prefix: str
    """Of the settings' names, for errors."""
    certfile: str
    """The certificate, followed by those between it and its authority."""
    keyfile: str
    """Maybe the same file."""
    ca_certs: str | None = None
    """Authorities of the other side's certificates."""
    client_certs: int = 0
    """As `ssl_cert_reqs`: whether a server asks for its clients' certificates."""

    def check(self) -> None:
        """Raise ConfigError for files that no client could accept, whichever authorities it trusts."""
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname = False
        trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate vouches for itself
        server = self._loaded(ssl.PROTOCOL_TLS_SERVER)
        self._trust("certfile", self.certfile, trusting)
        if self.ca_certs is not None:
            self._trust("ca_certs", self.ca_certs, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self._shake_hands(server, trusting, name=None)

    def check_mutual(self, name: str) -> None:
        """Raise ConfigError unless two sides with these files would accept each other under `name`."""
        assert self.ca_certs is not None, "expected authorities"
        server = self._loaded(ssl.PROTOCOL_TLS_SERVER)
        client = self._loaded(ssl.PROTOCOL_TLS_CLIENT)
        for side in (server, client):
            self._trust("ca_certs", self.ca_certs, side)
            side.verify_mode = ssl.CERT_REQUIRED
        self._shake_hands(server, client, name=name)

    def watched(self) -> WatchedFiles:
        """The files, to be read again when they change."""
        return WatchedFiles(
            path for path in (self.certfile, self.keyfile, self.ca_certs) if path is not None
        )

    def reload(self, context: ssl.SSLContext) -> None:
        """Serve new connections with the certificate that is there now. Where that is of no use, with
        the one from before, and a line in the log."""
        try:
            self.check()
            context.load_cert_chain(self.certfile, self.keyfile)
        except (ConfigError, OSError) as error:
            logger.error("TLS goes on with the certificate from before: %s", error)

    def read(self) -> TlsBytes:
        """The files' contents. Raises ConfigError."""
        return TlsBytes(
            cert=self._read("certfile", self.certfile),
            key=self._read("keyfile", self.keyfile),
            ca=None if self.ca_certs is None else self._read("ca_certs", self.ca_certs),
        )

    def _read(self, what: str, path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read {self.prefix}_{what} {path}: {error.strerror}"
            ) from None

    def _loaded(self, protocol: int) -> ssl.SSLContext:
        """A context with certificate and key."""
        self.read()  # what cannot be read is named better here
        context = ssl.SSLContext(protocol)

        def ask_nobody() -> NoReturn:
            raise ConfigError(
                f"{self.prefix}_keyfile {self.keyfile} is encrypted: give one without a passphrase"
            )

        try:
            context.load_cert_chain(self.certfile, self.keyfile, password=ask_nobody)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"{self.keyfile} is not the key of {self.certfile}") from None
            raise ConfigError(
                f"{self.prefix}: {self.certfile} and {self.keyfile} are no certificate and key in PEM"
            ) from None
        return context

    def _trust(self, what: str, path: str, context: ssl.SSLContext) -> None:
        self._read(what, path)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError:
            raise ConfigError(f"{self.prefix}_{what} {path} has no certificate in PEM") from None

    def _shake_hands(
        self, server: ssl.SSLContext, client: ssl.SSLContext, *, name: str | None
    ) -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = [
            client.wrap_bio(down, up, server_hostname=name),
            server.wrap_bio(up, down, server_side=True),
        ]
        try:
            for side in (*sides, *sides):  # two turns each: all there are
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(
                f"{self.prefix}_certfile {self.certfile}: {error.verify_message}"
            ) from None
        except ssl.SSLError as error:
            raise ConfigError(f"{self.prefix}_certfile {self.certfile}: {error.reason}") from None


class TlsBytes(NamedTuple):
    """What `TlsFiles` name."""

    cert: bytes
    key: bytes
    ca: bytes | None


def server_tls(server: ServerConfig) -> TlsFiles | None:
    """The doors' TLS; None without. Raises ConfigError for settings that do not go together."""
    if server.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
            if getattr(server, name):
                raise ConfigError(f"{name} needs ssl_certfile")
        return None
    if server.ssl_cert_reqs and server.ssl_ca_certs is None:
        raise ConfigError(f"ssl_cert_reqs {server.ssl_cert_reqs} needs ssl_ca_certs")
    if server.ssl_ca_certs is not None and not server.ssl_cert_reqs:
        raise ConfigError("ssl_ca_certs without ssl_cert_reqs asks nobody: set ssl_cert_reqs to 2")
    return TlsFiles(
        prefix="ssl",
        certfile=server.ssl_certfile,
        keyfile=server.ssl_keyfile or server.ssl_certfile,
        ca_certs=server.ssl_ca_certs,
        client_certs=server.ssl_cert_reqs,
    )


def link_tls(config: EngineConfig) -> TlsFiles | None:
    """The KV links' TLS; None without. Raises ConfigError unless all of its settings are there."""
    certfile, keyfile, ca_certs = config.link_certfile, config.link_keyfile, config.link_ca_certs
    if certfile is None and keyfile is None and ca_certs is None:
        return None
    if certfile is None or keyfile is None or ca_certs is None:
        raise ConfigError("link_certfile, link_keyfile and link_ca_certs: all three or none")
    return TlsFiles(
        prefix="link",
        certfile=certfile,
        keyfile=keyfile,
        ca_certs=ca_certs,
        client_certs=NEEDED,
    )


def check_tls(server: ServerConfig, config: EngineConfig) -> None:
    """Raise ConfigError, in one line, for TLS that cannot work: to be called before any engine starts."""
    doors, links = server_tls(server), link_tls(config)
    if doors is not None:
        doors.check()
    if links is not None:
        links.check_mutual(LINK_NAME)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For a gRPC server; a certificate that is replaced is served from the next connection on. gRPC
    cannot ask for certificates that need not come, so they are asked for only where they must."""
    import grpc  # here, so that HTTP alone needs none of it

    watched = files.watched()

    def configuration() -> grpc.ServerCertificateConfiguration:
        found = files.read()
        return grpc.ssl_server_certificate_configuration([(found.key, found.cert)], found.ca)

    def if_changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, before each handshake."""
        if not watched.changed():
            return None
        try:
            files.check()
            return configuration()
        except ConfigError as error:
            logger.error("TLS goes on with the certificate from before: %s", error)
            return None

    needed = files.client_certs == NEEDED
    return grpc.dynamic_ssl_server_credentials(
        configuration(), if_changed, require_client_authentication=needed
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """For a gRPC channel, with the files as they are now. Raises ConfigError."""
    import grpc

    found = files.read()
    return grpc.ssl_channel_credentials(found.ca, found.key, found.cert)
