"""Every line is one JSON object where that is asked for, knows whose request it is about, and has no
prompt, text or key in it."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.engines import FakeEngine, fake_facts, saying, serving

from paceline.runtime import caller, logs
from paceline.runtime.async_llm import RequestRecord
from paceline.runtime.caller import Caller
from paceline.runtime.config import EngineConfig, KvTransferConfig, ServerConfig
from paceline.runtime.logs import JsonLines, RequestLog, TextLines

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


def line(message: str = "hello %s", *values: object, **extra: Any) -> logging.LogRecord:
    record = logging.LogRecord("paceline.x", logging.INFO, __file__, 1, message, values, None)
    vars(record).update(extra)
    return record


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that this process says, as JSON."""
    text, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonLines("frontend-0"))
    ours, before = logging.getLogger("paceline"), logging.getLogger("paceline").level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield text
    ours.setLevel(before)
    root.removeHandler(handler)


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    text = JsonLines("frontend-0").format(record)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_json_line_has_the_fields_that_collectors_look_for() -> None:
    record = line("hello %s", "world")
    record.created, record.process = 1_700_000_000.25, 7
    assert as_json(record) == {
        "time": "2023-11-14T22:13:20.250000Z",
        "level": "info",
        "logger": "paceline.x",
        "message": "hello world",
        "process": "frontend-0",
        "pid": 7,
    }


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        found = as_json(line(exc_info=sys.exc_info()))
    assert found["exception"].startswith("Traceback (most recent call last)")
    assert found["exception"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize("message", ["\ud800 lone", "control \x00\x1b[0m", "«ünï»"])
def test_any_message_is_a_line(message: str) -> None:
    assert as_json(line("%s", message))["message"] == message


def test_facts_are_keys_and_hide_none_of_the_lines_own() -> None:
    found = as_json(line(facts={"tokens": 3, "level": "x", "path": Path("p")}))
    assert (found["tokens"], found["level"], found["path"]) == (3, "info", "p")


def test_a_line_is_about_the_request_it_is_written_for() -> None:
    caller.enter("abc", TRACEPARENT)
    try:
        found = as_json(line())
        assert (found["request_id"], found["trace_id"]) == ("abc", TRACE_ID)
        assert as_json(line(request_id="other"))["request_id"] == "other"
        assert TextLines("p").format(line()).endswith("INFO p: hello %s [request abc]")
    finally:
        caller.enter("")
    assert "request_id" not in as_json(line())


def test_a_text_that_names_its_request_does_not_name_it_twice() -> None:
    text = TextLines("p").format(line("request abc ends", request_id="abc"))
    assert text.endswith("INFO p: request abc ends")


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        (TRACEPARENT, TRACE_ID),
        (f"01-{TRACE_ID}-00f067aa0ba902b7-01-more", TRACE_ID),
        (TRACEPARENT.upper(), ""),
        ("", ""),
        (TRACEPARENT + "\n", ""),
    ],
)
def test_the_trace_id_is_read_from_w3cs_header_alone(header: str, trace_id: str) -> None:
    assert Caller(traceparent=header).trace_id == trace_id


@pytest.mark.parametrize(
    ("config", "role"),
    [
        (EngineConfig(), "engine/rank 1"),
        (EngineConfig(kv_transfer_config=KvTransferConfig(engine_id="p-0")), "p-0/rank 1"),
    ],
)
def test_parts_of_engines_are_named_after_them(config: EngineConfig, role: str) -> None:
    assert logs.engine_role(config, "rank 1") == role


def test_the_line_of_a_request_that_ends_says_how_it_went(caplog: Any) -> None:
    record = RequestRecord(
        request_id="cmpl-abc-0",
        num_prompt_tokens=12,
        arrived_s=10.0,
        first_token_s=10.25,
        finished_s=11.5,
        num_tokens=34,
        num_cached_tokens=8,
        finish_reason="stop",
        caller=Caller(request_id="abc", traceparent=TRACEPARENT),
    )
    with caplog.at_level(logging.INFO, logger="paceline"):
        RequestLog().on_finished(record)
    (found,) = caplog.records
    assert found.getMessage() == (
        "stop: 34 tokens for 12 of prompt (8 cached), the first after 0.250 s, 1.500 s in all"
    )
    told = as_json(found)
    assert (told["request_id"], told["trace_id"]) == ("abc", TRACE_ID)
    assert (told["text_id"], told["first_token_s"], told["total_s"]) == ("cmpl-abc-0", 0.25, 1.5)


PROGRAM = """
import logging, os, subprocess, sys, threading, warnings
from paceline.runtime import logs
from paceline.runtime.config import EngineConfig

logs.configure(EngineConfig(log_level="warning"), role="old")
config = EngineConfig(log_format="json", log_level="debug")
logs.configure(config, role="frontend-0", log_requests=False)
logging.getLogger("paceline.a").debug("ours")
logging.getLogger("uvicorn.error").warning("theirs")
logging.getLogger("httpx").info("theirs, and nobody's business")
logs.requests.info("a request")
warnings.warn("be warned")
thread = threading.Thread(target=lambda: 1 / 0, name="t")
thread.start(); thread.join()
child = "from paceline.runtime import logs; import logging\\n" \\
    "logs.configure_child(role='link 0'); logging.getLogger('paceline.b').debug('a child')"
subprocess.run([sys.executable, "-c", child], check=True)
raise RuntimeError("the end")
"""


def test_all_that_a_process_and_its_children_say_has_one_form() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if not k.startswith("PACELINE_LOG")},
    )
    assert done.returncode == 1
    lines = [json.loads(each) for each in done.stderr.splitlines()]
    found = [(each["process"], each["logger"], each["level"]) for each in lines]
    assert found == [
        ("frontend-0", "paceline.a", "debug"),
        ("frontend-0", "uvicorn.error", "warning"),
        ("frontend-0", "py.warnings", "warning"),
        ("frontend-0", "paceline", "error"),
        ("link 0", "paceline.b", "debug"),
        ("frontend-0", "paceline", "critical"),
    ]
    assert "be warned" in lines[2]["message"]
    assert lines[3]["exception"].endswith("ZeroDivisionError: division by zero")
    assert lines[5]["exception"].endswith("RuntimeError: the end")


def test_requests_over_http_are_logged_with_their_ids_and_without_secrets(
    tmp_path: Path, log: io.StringIO
) -> None:
    server = ServerConfig(api_key="hidden-key")
    headers = {
        "authorization": "Bearer hidden-key",
        "x-request-id": "abc",
        "traceparent": TRACEPARENT,
    }
    engine = FakeEngine(saying("a hidden text"))
    with (
        serving(engine, fake_facts(tmp_path), server=server, observer=RequestLog()) as served,
        httpx.Client(base_url=served.url, timeout=20) as client,
    ):
        body = {"prompt": "a hidden prompt", "max_tokens": 8}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        bad = {"authorization": "Bearer hidden-guess", "x-request-id": "def"}
        assert client.post("/v1/completions", json=body, headers=bad).status_code == 401
        named = {**body, "request_id": "mine", "max_tokens": -1}
        assert client.post("/v1/completions", json=named, headers=headers).status_code == 400
    lines = [json.loads(each) for each in log.getvalue().splitlines()]
    told = [each for each in lines if each["logger"] == "paceline.requests"]
    assert [(each["request_id"], each.get("status")) for each in told] == [
        ("abc", None),
        ("def", 401),
        ("mine", 400),
    ]
    assert told[0]["trace_id"] == TRACE_ID
    assert told[0]["tokens"] == 8
    assert "hidden" not in log.getvalue()
