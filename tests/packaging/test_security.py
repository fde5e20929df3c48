"""What SECURITY.md promises is what there is."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.tls import check_tls

TEXT = (Path(__file__).parents[2] / "SECURITY.md").read_text()
ROWS = re.findall(
    r"^\| (.+?) \| ([0-9]+)( KiB| MiB| s)? \| `(paceline\..+?)` \|$", TEXT, re.MULTILINE
)
UNITS = {"": 1, " s": 1, " KiB": 2**10, " MiB": 2**20}


def test_there_is_a_table_of_limits() -> None:
    assert len(ROWS) >= 25


@pytest.mark.parametrize(("what", "number", "unit", "place"), ROWS)
def test_every_limit_is_the_one_that_is_told(what: str, number: str, unit: str, place: str) -> None:
    module, _, name = place.rpartition(".")
    assert getattr(importlib.import_module(module), name) == int(number) * UNITS[unit]


def test_every_path_that_is_open_is_told() -> None:
    http = importlib.import_module("paceline.actors.frontends.http")
    told = re.search(r"No key is needed for (.+?), gRPC's health service", TEXT, re.DOTALL)
    assert told is not None
    assert set(re.findall(r"`(/\w*)`", told[1])) == http.OPEN_PATHS


def test_the_commands_make_certificates_that_links_take(tmp_path: Path) -> None:
    commands = [line.strip() for line in TEXT.splitlines() if line.startswith("    openssl req")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(
            command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=60
        )
    config = EngineConfig(
        link_certfile=str(tmp_path / "link.pem"),
        link_keyfile=str(tmp_path / "link.key"),
        link_ca_certs=str(tmp_path / "link-ca.pem"),
    )
    check_tls(ServerConfig(), config)


def test_every_flag_that_is_named_is_one() -> None:
    fields = {*EngineConfig.__struct_fields__, *ServerConfig.__struct_fields__}
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<=`| )--([a-z-]+)", TEXT)}
    assert named - fields == set()
