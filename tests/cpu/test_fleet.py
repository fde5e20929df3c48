"""Engines that serve as one: started, replaced, added and taken away. The engines are fakes but in the
last tests, which start the embedded pair."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import psutil
import pytest
from benchmarks.prompts import held_out
from tests.doors import Doors, eventually
from tests.engines import REPLY, FakeEngine, Reply, endless, fake_facts, ids_of, serving

from paceline.actors.engine_set import (
    EngineInfo,
    FleetError,
    UnknownEngineError,
    engine_config,
    first_roles,
    is_fleet,
)
from paceline.actors.fleet import Fleet
from paceline.actors.fleet import open_fleet as open_fleet_of
from paceline.actors.routing.dispatch import MOST_LOST
from paceline.proto import inference_pb2 as pb
from paceline.runtime.config import (
    EngineConfig,
    FleetConfig,
    KvTransferConfig,
    ServerConfig,
    SpeculativeConfig,
)
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import EngineError, PlacementError, UserError
from paceline.runtime.local import local_engine
from paceline.runtime.preflight import Facts, examine
from paceline.runtime.requests import RequestFactory, TokensPrompt
from paceline.runtime.types import Request, SamplingParams, TokenDelta

SOON_S = 10.0
TEXT = ids_of(REPLY * 9)
PAIR = FleetConfig(prefill_replicas=1, decode_replicas=1)


class Starts:
    """Starts fake engines, as a test has said."""

    def __init__(self) -> None:
        self.configs: dict[str, EngineConfig] = {}
        """By engine, of all that were started or should have been."""
        self.engines: dict[str, FakeEngine] = {}
        self.failing: list[Exception] = []
        """The next starts raise these."""
        self.hold = threading.Event()
        """While it is not set no start ends, but those that are told to stop."""
        self.hold.set()
        self.deaf = False
        """Whether starts do not hear that they shall stop."""
        self.num_stopped = 0
        self.reply: Reply = endless
        self._lock = threading.Lock()

    def __call__(self, config: EngineConfig, facts: Facts, *, stop: threading.Event) -> FakeEngine:
        with self._lock:
            transfer = config.kv_transfer_config
            name = f"engine {len(self.configs)}"
            if transfer is not None and transfer.engine_id is not None:
                name = transfer.engine_id
            self.configs[name] = config
            failure = self.failing.pop() if self.failing else None
        while not self.hold.wait(0.005):
            if stop.is_set() and not self.deaf:
                with self._lock:
                    self.num_stopped += 1
                raise EngineError("told to stop")
        if failure is not None:
            raise failure
        engine = self.engines[name] = FakeEngine(self.reply, step_s=0.002)
        return engine

    def alive(self) -> list[str]:
        return [name for name, engine in self.engines.items() if not engine.closed]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return fake_facts(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def starts() -> Starts:
    return Starts()


Open = Callable[..., Fleet]


@pytest.fixture
def open_fleet(starts: Starts, facts: Facts) -> Iterator[Open]:
    """`open_fleet(settings, config)`: a fleet of fakes, polled by a thread until the test ends."""
    fleets: list[Fleet] = []
    done = threading.Event()
    threads: list[threading.Thread] = []

    def call(
        settings: FleetConfig = PAIR, config: EngineConfig | None = None, *, polled: bool = True
    ) -> Fleet:
        fleet = Fleet(
            config or EngineConfig(), facts, settings, start=starts, backoff_s=(0.01, 0.05)
        )
        fleets.append(fleet)

        def poll() -> None:
            while not done.is_set():
                fleet.poll(0.02)

        if polled:
            threads.append(threading.Thread(target=poll, daemon=True))
            threads[-1].start()
        return fleet

    yield call
    done.set()
    for thread in threads:
        thread.join(SOON_S)
    for fleet in fleets:
        fleet.close()
    assert starts.alive() == []


def states(fleet: Fleet) -> dict[str, str]:
    return {each.engine_id: each.state for each in fleet.engines()}


def request(name: str, *, max_tokens: int = 6) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=(104, 105),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        max_tokens=max_tokens,
    )


def read(fleet: Fleet, *, until: int) -> list[TokenDelta]:
    """Deltas until so many requests have ended."""
    deltas: list[TokenDelta] = []
    deadline = time.monotonic() + SOON_S
    while sum(delta.finish_reason is not None for delta in deltas) < until:
        assert time.monotonic() < deadline
        deltas += fleet.poll(0.1)
    return deltas


# ------------------------------------------------------------------------------------ what each engine is


def test_each_engine_is_told_its_name_its_role_and_its_size(
    open_fleet: Open, starts: Starts
) -> None:
    settings = FleetConfig(
        prefill_replicas=1,
        decode_replicas=2,
        prefill_tensor_parallel_size=4,
        decode_tensor_parallel_size=2,
    )
    config = EngineConfig(kv_transfer_config=KvTransferConfig(lanes=3))
    fleet = open_fleet(settings, config)
    assert [each[:3] for each in fleet.engines()] == [
        ("prefill-0", "prefill", "serving"),
        ("decode-0", "decode", "serving"),
        ("decode-1", "decode", "serving"),
    ]
    found = {
        name: (each.tensor_parallel_size, each.kv_transfer_config)
        for name, each in starts.configs.items()
    }
    consumer = KvTransferConfig(lanes=3, kv_role="kv_consumer")
    assert found == {
        "prefill-0": (4, KvTransferConfig(lanes=3, kv_role="kv_producer", engine_id="prefill-0")),
        "decode-0": (2, _named(consumer, "decode-0")),
        "decode-1": (2, _named(consumer, "decode-1")),
    }


def _named(config: KvTransferConfig, name: str) -> KvTransferConfig:
    return KvTransferConfig(lanes=config.lanes, kv_role=config.kv_role, engine_id=name)


def test_one_engine_without_links_is_no_fleet_and_replicas_without_prefill_have_no_links(
    open_fleet: Open, starts: Starts
) -> None:
    linked = EngineConfig(kv_transfer_config=KvTransferConfig())
    assert not is_fleet(FleetConfig(), EngineConfig())
    assert is_fleet(FleetConfig(), linked)
    assert first_roles(FleetConfig(), linked) == ["both"]
    fleet = open_fleet(FleetConfig(decode_replicas=2))
    assert states(fleet) == {"engine-0": "serving", "engine-1": "serving"}
    assert [each.kv_transfer_config for each in starts.configs.values()] == [None, None]
    with pytest.raises(FleetError, match="no KV links"):
        fleet.add_engine("prefill")


@pytest.mark.parametrize(
    ("spec", "transfer", "expected"),
    [
        (None, {}, None),
        ({"method": "ngram"}, {}, None),
        ({}, {"draft_kv": "rebuild"}, None),
        ({}, {}, {}),
        ({"draft_tensor_parallel_size": 4}, {}, {"draft_tensor_parallel_size": 2}),
        ({"draft_tensor_parallel_size": 1}, {}, {"draft_tensor_parallel_size": 1}),
    ],
)
def test_a_prefill_engine_has_the_drafter_only_where_its_kv_travels_and_no_wider_than_itself(
    spec: dict[str, Any] | None, transfer: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    config = EngineConfig(
        tensor_parallel_size=4,
        speculative_config=None if spec is None else SpeculativeConfig(**spec),
        kv_transfer_config=KvTransferConfig(**transfer),
    )
    settings = FleetConfig(prefill_replicas=1, prefill_tensor_parallel_size=2)
    prefill, decode = (
        engine_config(config, settings, role=role, engine_id="x", linked=True)  # type: ignore[arg-type]
        for role in ("prefill", "decode")
    )
    wanted = None if expected is None else SpeculativeConfig(**expected)
    assert prefill.speculative_config == wanted
    assert decode.speculative_config == config.speculative_config
    assert (prefill.world_size, decode.world_size) == (2, 4)


# ---------------------------------------------------------------------------------------- begin and end


def test_engines_start_side_by_side(starts: Starts, facts: Facts) -> None:
    starts.hold.clear()
    threading.Thread(
        target=lambda: eventually(lambda: len(starts.configs) == 3) and starts.hold.set(),
        daemon=True,
    ).start()
    settings = FleetConfig(prefill_replicas=1, decode_replicas=2)
    fleet = Fleet(EngineConfig(placement_timeout_s=SOON_S), facts, settings, start=starts)
    assert len(starts.alive()) == 3
    fleet.close()
    fleet.close()
    assert starts.alive() == []


def test_one_that_cannot_start_takes_all_down_and_says_which_it_was(
    starts: Starts, facts: Facts
) -> None:
    closed: list[bool] = []
    starts.failing = [PlacementError("3 ranks need 3 CPU")]
    with pytest.raises(UserError, match=r"(prefill|decode)-0: 3 ranks need 3 CPU"):
        Fleet(EngineConfig(), facts, PAIR, start=starts, on_close=lambda: closed.append(True))
    assert starts.alive() == []
    assert closed == [True]


def test_closing_ends_starts_under_way(open_fleet: Open, starts: Starts) -> None:
    fleet = open_fleet(polled=False)
    starts.hold.clear()
    fleet.add_engine("decode")
    fleet.add_engine("prefill")
    assert eventually(lambda: len(starts.configs) == 4)
    fleet.close()
    assert starts.num_stopped == 2
    assert starts.alive() == []
    with pytest.raises(EngineError, match="closed"):
        fleet.add_engine("decode")


def test_an_engine_that_is_up_just_when_nobody_wants_it_is_closed(
    open_fleet: Open, starts: Starts
) -> None:
    fleet = open_fleet()
    starts.hold.clear()
    starts.deaf = True
    name = fleet.add_engine("decode")
    assert eventually(lambda: name in starts.configs)
    fleet.remove_engine(name)
    assert name not in states(fleet)
    starts.hold.set()
    assert eventually(lambda: name in starts.engines and starts.engines[name].closed)


# -------------------------------------------------------------------------------------------- changes


def test_an_engine_that_is_added_serves_and_one_that_is_removed_finishes_what_it_has(
    open_fleet: Open, starts: Starts
) -> None:
    fleet = open_fleet(polled=False)
    assert fleet.add_engine("decode") == "decode-1"
    assert eventually(lambda: len(fleet.status().members) == 3)
    fleet.submit([request(str(number), max_tokens=40) for number in range(8)])
    busy = starts.engines["decode-0"]
    assert busy.submitted
    assert starts.engines["decode-1"].submitted
    fleet.remove_engine("decode-0")
    fleet.remove_engine("decode-0")
    assert states(fleet)["decode-0"] == "draining"
    assert eventually(lambda: fleet._router._members["decode-0"].draining)
    fleet.submit([request("late")])
    deltas = read(fleet, until=9)
    assert not [delta for delta in deltas if delta.finish_reason not in (None, "length")]
    assert "late" not in [each.request_id for each in busy.submitted]
    assert eventually(lambda: fleet.poll(0.01) == [] and "decode-0" not in states(fleet))
    assert eventually(lambda: busy.closed)
    assert fleet.add_engine("decode") == "decode-2", "names are not used twice"


def test_one_that_is_lost_has_let_go_of_all_before_another_starts_in_its_place(
    open_fleet: Open, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_fleet()
    lost, closing = starts.engines["decode-0"], threading.Event()
    monkeypatch.setattr(lost, "close", lambda: closing.wait(SOON_S) and FakeEngine.close(lost))
    lost.fail()
    assert eventually(lambda: states(fleet).get("decode-1") == "starting")
    time.sleep(0.1)
    assert "decode-1" not in starts.configs
    closing.set()
    assert eventually(lambda: states(fleet).get("decode-1") == "serving")


def test_a_request_that_every_engine_is_lost_with_ends_before_it_has_ended_all(
    open_fleet: Open, starts: Starts
) -> None:
    def end_the_engine(asked: Request) -> list[int]:
        if asked.request_id.startswith("poison"):
            for engine in starts.engines.values():
                engine.fail("boom")
        return TEXT[: asked.max_tokens]

    starts.reply = end_the_engine
    fleet = open_fleet(FleetConfig(), polled=False)
    fleet.submit([request("poison")])
    (delta,) = read(fleet, until=1)
    assert (
        delta.error
        == f"{MOST_LOST} engines in a row were lost with this request: it is not tried again"
    )
    assert len(starts.engines) == MOST_LOST
    fleet.submit([request("other")])
    assert read(fleet, until=1)[-1].finish_reason == "length"


def test_one_that_cannot_be_watched_is_replaced_too(
    open_fleet: Open, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_fleet()

    def watch(wait_s: float) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(starts.engines["decode-0"], "watch", watch)
    assert eventually(lambda: states(fleet).get("decode-1") == "serving")


def test_the_last_that_serves_stays(open_fleet: Open) -> None:
    fleet = open_fleet()
    with pytest.raises(FleetError, match="decode-0 is the last engine that writes texts"):
        fleet.remove_engine("decode-0")
    fleet.remove_engine("prefill-0")
    assert eventually(lambda: "prefill-0" not in states(fleet))
    with pytest.raises(UnknownEngineError, match="no engine 'prefill-0'"):
        fleet.remove_engine("prefill-0")


def test_one_that_is_added_and_fails_is_told_of_until_it_is_removed(
    open_fleet: Open, starts: Starts
) -> None:
    fleet = open_fleet()
    starts.failing = [PlacementError("no room")]
    name = fleet.add_engine("prefill")
    assert eventually(lambda: states(fleet)[name] == "failed")
    assert fleet.engines()[-1] == EngineInfo(name, "prefill", "failed", "no room")
    fleet.remove_engine(name)
    assert name not in states(fleet)


# ----------------------------------------------------------------------------------------------- loss


def test_a_lost_engine_is_replaced_and_its_requests_go_on_without_a_token_lost_or_repeated(
    starts: Starts, facts: Facts
) -> None:
    starts.reply = lambda request: TEXT[len(request.output_token_ids) : request.max_tokens]
    fleet = Fleet(EngineConfig(), facts, PAIR, start=starts, backoff_s=(0.01, 0.05))
    tokens: list[int] = []

    def read_on() -> None:
        tokens.extend(i for delta in fleet.poll(0.01) for i in delta.token_ids)

    def serves(name: str) -> bool:
        read_on()
        return states(fleet).get(name) == "serving"

    try:
        fleet.submit([request("a", max_tokens=len(TEXT))])
        assert eventually(lambda: read_on() or len(tokens) >= 12)
        starts.failing = [EngineError("not yet"), EngineError("nor now")]
        starts.engines["decode-0"].fail("rank 0 died")
        assert eventually(lambda: serves("decode-1"))
        assert "decode-0" not in states(fleet)
        assert eventually(lambda: read_on() or len(tokens) >= len(TEXT))
        assert tokens == TEXT
        assert eventually(lambda: starts.alive() == ["prefill-0", "decode-1"])
    finally:
        fleet.close()


def test_engines_that_keep_dying_are_started_ever_more_rarely(starts: Starts, facts: Facts) -> None:
    fleet = Fleet(
        EngineConfig(), facts, FleetConfig(decode_replicas=2), start=starts, backoff_s=(0.05, 5.0)
    )
    try:
        began_s = time.monotonic()
        for num_started in range(2, 6):
            assert eventually(lambda count=num_started: len(starts.engines) == count)  # type: ignore[misc]
            list(starts.engines.values())[-1].fail()
            assert eventually(lambda: fleet.poll(0.001) == [] and len(starts.alive()) < 2)
        assert eventually(lambda: len(starts.alive()) == 2)
        assert time.monotonic() - began_s >= 0.05 + 0.1 + 0.2
    finally:
        fleet.close()


def test_without_restarts_the_last_loss_is_the_fleets_own(starts: Starts, facts: Facts) -> None:
    settings = FleetConfig(decode_replicas=2, restart_engines=False)
    fleet = Fleet(EngineConfig(), facts, settings, start=starts)
    try:
        first, second = starts.engines.values()
        first.fail("one")
        assert eventually(lambda: fleet.poll(0.01) == [] and len(fleet.engines()) == 1)
        second.fail("two")
        with pytest.raises(EngineError, match="two"):
            eventually(lambda: fleet.poll(0.01) != [])
        assert len(starts.configs) == 2
    finally:
        fleet.close()


# ----------------------------------------------------------------------------------------------- HTTP


def test_engines_are_listed_added_and_removed_over_http_by_those_with_the_key(
    starts: Starts, facts: Facts
) -> None:
    fleet = Fleet(EngineConfig(), facts, PAIR, start=starts)
    server = ServerConfig(api_key="secret")
    try:
        with (
            serving(fleet, facts, server=server, fleet=fleet) as served,
            httpx.Client(base_url=served.url, timeout=SOON_S) as anybody,
        ):
            for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/decode-0")):
                assert anybody.request(method, f"/engines{path}").status_code == 401
            headers = {"authorization": "Bearer secret"}
            with httpx.Client(base_url=served.url, timeout=SOON_S, headers=headers) as client:
                _change_over_http(client)
    finally:
        fleet.close()


def _change_over_http(client: httpx.Client) -> None:
    def listed() -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in client.get("/engines").json()["data"]}

    def written() -> str:
        answer = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 5})
        return str(answer.json()["choices"][0]["text"])

    assert written() == REPLY[:5]
    assert eventually(lambda: listed()["decode-0"].get("num_running") == 0)
    assert listed()["decode-0"] | {"num_blocks": 0, "num_free_blocks": 0, "transfers": {}} == {
        "object": "engine",
        "id": "decode-0",
        "role": "decode",
        "state": "serving",
        "error": None,
        "num_running": 0,
        "num_waiting": 0,
        "num_blocks": 0,
        "num_free_blocks": 0,
        "links": [],
        "transfers": {},
    }
    refused = client.delete("/engines/decode-0")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "engine_needed")
    unknown = client.delete("/engines/nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "engine_not_found")
    bad = client.post("/engines", json={"role": "both?"})
    assert bad.status_code == 400
    assert bad.json()["error"]["message"] == "role: invalid enum value 'both?'"
    added = client.post("/engines", json={"role": "decode"})
    assert added.status_code == 202
    assert added.json() == {"engine_id": "decode-1", "role": "decode", "state": "starting"}
    assert eventually(lambda: listed()["decode-1"]["state"] == "serving")
    assert client.delete("/engines/decode-0").status_code == 202
    assert eventually(lambda: "decode-0" not in listed())
    assert written() == REPLY[:5]


def test_one_engine_alone_has_no_engines_to_change(facts: Facts) -> None:
    with (
        serving(FakeEngine(), facts) as served,
        httpx.Client(base_url=served.url, timeout=SOON_S) as client,
    ):
        for answer in (
            client.get("/engines"),
            client.post("/engines", json={"role": "decode"}),
            client.delete("/engines/a"),
        ):
            assert answer.status_code == 404
            assert "one engine serves alone" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({}, {}, ""),
        ({"x-session-id": "h"}, {}, "h"),
        ({"x-session-id": "h"}, {"session_id": "b"}, "b"),
        ({}, {"prompt_cache_key": "k"}, "k"),
        ({"x-session-id": "h"}, {"prompt_cache_key": "k"}, "h"),
    ],
)
def test_a_session_may_be_named_in_three_ways(
    facts: Facts, headers: dict[str, str], body: dict[str, str], expected: str
) -> None:
    engine = FakeEngine()
    with serving(engine, facts) as served:
        answer = httpx.post(
            f"{served.url}/v1/completions",
            json={"prompt": "hi", "max_tokens": 1, **body},
            headers=headers,
            timeout=SOON_S,
        )
    assert answer.status_code == 200
    assert [each.session_id for each in engine.submitted] == [expected]


def test_a_session_may_be_named_in_grpc_metadata(tmp_path: Path) -> None:
    doors = Doors(tmp_path, FakeEngine(), EngineConfig(), http=False)
    try:
        body = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(max_tokens=1))
        with grpc.insecure_channel(doors.grpc_url.removeprefix("grpc://")) as channel:
            call = channel.unary_stream("/paceline.v1.Engine/Generate")
            for metadata in ((("x-session-id", "s"),), ()):
                list(call(body.SerializeToString(), metadata=metadata, timeout=SOON_S))
        assert [each.session_id for each in doors.engine.submitted] == ["s", ""]
    finally:
        doors.stop()


def test_a_session_with_an_endless_name_is_refused(facts: Facts) -> None:
    with serving(FakeEngine(), facts) as served:
        body = {"prompt": "hi", "session_id": "x" * 2000}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=SOON_S)
    assert answer.status_code == 400
    assert "session_id may have 1024 characters" in answer.json()["error"]["message"]


# ---------------------------------------------------------------------------------------- real engines

EMBEDDED = EngineConfig(
    dtype="float32",
    distributed_executor_backend="mp",
    max_num_batched_tokens=64,
    kv_cache_memory="64MiB",
    speculative_config=SpeculativeConfig(num_speculative_tokens=3, layer_parallel_size=4),
    kv_transfer_config=KvTransferConfig(timeout_s=30.0),
)


@pytest.fixture(scope="module")
def embedded() -> Iterator[tuple[Facts, Fleet]]:
    """A prefill engine and a decode engine of the embedded pair, each in processes of its own."""
    facts = examine(EMBEDDED)
    settings = FleetConfig(prefill_replicas=1, routing_policy="always")
    fleet = open_fleet_of(EMBEDDED, facts, settings)
    yield facts, fleet
    ours = psutil.Process().children(recursive=True)
    fleet.close()
    left = psutil.wait_procs(ours, timeout=SOON_S)[1]
    assert [each for each in left if "resource_tracker" not in " ".join(each.cmdline())] == []


def jobs(facts: Facts, *lengths: int, max_tokens: int) -> list[Request]:
    """A greedy and a sampled request for each length of prompt, whose KV nobody else's can be."""
    assert facts.tokenizer is not None
    factory = RequestFactory(facts, EMBEDDED)
    prompts = held_out(facts.tokenizer, count=len(lengths), length=max(lengths))
    made, salt = [], uuid.uuid4().hex
    for prompt, length in zip(prompts, lengths, strict=True):
        for temperature in (0.0, 0.8):
            params = SamplingParams(
                temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=7
            )
            name = f"{length} at {temperature}"
            tokens = TokensPrompt(prompt_token_ids=prompt[:length])
            job = factory.make(tokens, params, request_id=name, cache_salt=salt)
            made += job.requests
    return made


def texts(
    client: EngineClient, requests: list[Request], *, after: int = 0, then: Any = None
) -> Any:
    """Each request's tokens. Once `after` of them have come, `then` is called."""
    client.submit(requests)
    found: dict[str, list[int]] = {each.request_id: [] for each in requests}
    left, deadline = set(found), time.monotonic() + 120
    while left:
        assert time.monotonic() < deadline, f"{left} have not ended"
        for delta in client.poll(0.1):
            found[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.error is None
                left.remove(delta.request_id)
        if then is not None and sum(map(len, found.values())) >= after:
            then()
            then = None
    assert then is None, "the texts were over too soon"
    return found


def alone(facts: Facts, requests: list[Request]) -> Any:
    """The same texts from one engine in this process."""
    config = msgspec.structs.replace(
        EMBEDDED, distributed_executor_backend="uni", kv_transfer_config=None
    )
    engine = local_engine(config, facts)
    try:
        return texts(engine, requests)
    finally:
        engine.close()


def kill(fleet: Fleet, engine_id: str, *, whole: bool) -> None:
    """End an engine's rank, the process whose child has its KV link, or the whole engine, that one's
    parent, as if its machine had gone."""
    (member,) = (each for each in fleet.status().members if each.engine_id == engine_id)
    port = int(member.links.addresses[0].rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        if any(c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections()):
            rank = process.parent()
            assert rank is not None
            engine = rank.parent()
            assert engine is not None
            assert engine.pid != psutil.Process().pid
            (engine if whole else rank).kill()
            return
    pytest.fail(f"nobody listens on {port}")


def test_texts_whose_prompts_are_read_elsewhere_are_those_of_one_engine(
    embedded: tuple[Facts, Fleet],
) -> None:
    facts, fleet = embedded
    requests = jobs(facts, 33, 64, 150, max_tokens=20)
    before = fleet.status().transfers
    assert texts(fleet, requests) == alone(facts, requests)
    assert eventually(lambda: fleet.poll(0.01) == [] and _fetched(fleet) >= before.fetched + 6)
    now = fleet.status().transfers
    assert now.failed == before.failed
    assert now.num_bytes > before.num_bytes


def serves(fleet: Fleet) -> bool:
    """Whether all engines do, with all of their ranks."""
    restarting = [each.restarting for each in fleet.status().members]
    return list(states(fleet).values()) == ["serving"] * 2 and restarting == [False] * 2


def _fetched(fleet: Fleet) -> int:
    return fleet.status().transfers.fetched


@pytest.mark.parametrize("whole", [False, True], ids=["rank", "engine"])
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_texts_outlive_a_rank_of_their_engine_and_their_engine(
    embedded: tuple[Facts, Fleet], role: str, whole: bool
) -> None:
    facts, fleet = embedded
    requests = jobs(facts, 90, 200, max_tokens=24)
    (engine_id,) = (each.engine_id for each in fleet.engines() if each.role == role)
    restarts = fleet.status().num_restarts
    found = texts(fleet, requests, after=4, then=lambda: kill(fleet, engine_id, whole=whole))
    assert found == alone(facts, requests)
    assert eventually(
        lambda: (
            fleet.poll(0.1) == [] and serves(fleet) and (engine_id not in states(fleet)) == whole
        ),
        within_s=60,
    )
    if not whole:
        assert eventually(
            lambda: fleet.poll(0.1) == [] and fleet.status().num_restarts == restarts + 1,
            within_s=60,
        )
    before = _fetched(fleet)
    again = jobs(facts, 70, max_tokens=4)
    assert texts(fleet, again) == alone(facts, again)
    assert eventually(lambda: fleet.poll(0.1) == [] and _fetched(fleet) > before)
