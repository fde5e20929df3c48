"""How commands find a server that runs, and say who asks."""

from __future__ import annotations

import argparse
import os

import httpx

from paceline.runtime.client.trust import Trust
from paceline.runtime.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


def add_arguments(parser: argparse.ArgumentParser, *, api_key: bool = True) -> None:
    """Without `api_key` where the command has a flag of that name already."""
    if api_key:
        parser.add_argument(
            "--api-key", metavar="X", help="The server's key; PACELINE_API_KEY if not given."
        )
    parser.add_argument(
        "--ca-certs", metavar="FILE", help="Authorities to trust for https, in PEM."
    )
    parser.add_argument(
        "--client-cert", metavar="FILE", help="A certificate and its key to show it, in PEM."
    )


def api_key(args: argparse.Namespace) -> str | None:
    """The first, where the environment has several, as a server's may."""
    given = args.api_key or os.environ.get("PACELINE_API_KEY", "").partition(",")[0].strip()
    return given or None


def trust(args: argparse.Namespace) -> Trust:
    return Trust(ca_certs=args.ca_certs, client_cert=args.client_cert)


def client(args: argparse.Namespace, *, timeout_s: float) -> httpx.Client:
    """For the server at `--url`. Raises ConfigError for what is no URL."""
    try:
        url = httpx.URL(args.url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--url must be like {DEFAULT_URL}, found {args.url!r:.200}")
    key = api_key(args)
    return httpx.Client(
        base_url=url,
        headers={} if key is None else {"authorization": f"Bearer {key}"},
        verify=trust(args).context(),
        timeout=timeout_s,
    )


def reason(error: httpx.HTTPError) -> str:
    """Why a server could not be asked, in a few words."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
