"""The page in a real browser, on the real HTTP server, in front of an engine without a model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from tests.engines import REPLY, FakeEngine, endless, fake_facts, saying

from paceline.actors.frontends import http
from paceline.runtime.async_llm import AsyncLLM
from paceline.runtime.config import EngineConfig, ServerConfig, SpeculativeConfig
from paceline.runtime.types import EngineRole, EngineStatus, KvLinks, TransferTotals

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
WAIT_S = 15.0
SPECULATION = SpeculativeConfig(num_speculative_tokens=2)

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no chromium on this machine")


class Served(NamedTuple):
    """A server on a port of this machine."""

    url: str
    engine: FakeEngine


Serve = Callable[..., Served]
OpenPage = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve(engine, config=..., server=...)`: the real application, on an event loop of its own."""
    ends: list[Callable[[], None]] = []

    def start(
        engine: FakeEngine | None = None,
        *,
        config: EngineConfig | None = None,
        server: ServerConfig | None = None,
    ) -> Served:
        engine = engine or FakeEngine(step_s=0.03)
        config = config or EngineConfig(speculative_config=SPECULATION)
        facts = fake_facts(tmp_path)

        async def begin() -> tuple[AsyncLLM, http.HttpServer]:
            llm = AsyncLLM(engine, facts, config)
            llm.start()
            app = http.make_app(llm, facts, config, server or ServerConfig())
            return llm, await http.start(app, http.bind("127.0.0.1", 0))

        async def end() -> None:
            await running.stop(0.1)
            await llm.close()

        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        llm, running = asyncio.run_coroutine_threadsafe(begin(), loop).result(WAIT_S)

        def stop() -> None:
            asyncio.run_coroutine_threadsafe(end(), loop).result(WAIT_S)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(WAIT_S)
            loop.close()

        ends.append(stop)
        return Served(f"http://127.0.0.1:{running.port}/", engine)

    yield start
    for stop in ends:
        stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """`open_page(url)`: a page in a context of its own. Whatever it complains about in its console
    fails the test, but for answers with a status in `refused`."""
    contexts, complaints = [], []

    def start(
        url: str, *, width: int = 1200, height: int = 900, refused: tuple[int, ...] = (), **how: Any
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **how)
        context.set_default_timeout(WAIT_S * 1e3)
        contexts.append(context)
        page = context.new_page()

        def on_console(message: Any) -> None:
            expected = any(
                f"the server responded with a status of {s}" in message.text for s in refused
            )
            if message.type in ("error", "warning") and not expected:
                complaints.append(message.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".state.live, #key-field:visible")
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []


def generate(page: Any, prompt: str, *, max_tokens: int) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Most tokens").fill(str(max_tokens))
    page.get_by_role("button", name="Generate").click()


def wait_until_done(page: Any) -> None:
    page.wait_for_selector("#run:enabled")


def pieces(page: Any) -> list[tuple[str, str]]:
    """What the output holds, in order: the prompt, then plain and marked text."""
    read = "nodes => [...nodes].map(node => [node.nodeName, node.textContent])"
    return [tuple(piece) for piece in page.eval_on_selector_all("#output > *", read)]


def wait_for(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.02)


def test_tokens_appear_as_they_arrive_and_drafted_ones_are_marked(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url)
    generate(page, "say: ", max_tokens=61)
    page.wait_for_selector("#output.running mark")
    some = page.inner_text("#output")
    page.wait_for_function("length => by('output').textContent.length > length", arg=len(some))
    assert page.is_visible("#output.running"), "the text came only when it was whole"
    wait_until_done(page)

    text = (REPLY * 2)[:61]
    expected = [("SPAN", "say: ")]
    for i in range(0, 60, 3):
        expected += [("MARK", text[i : i + 2]), ("SPAN", text[i + 2])]
    expected[-1] = ("SPAN", text[59:])  # the last step has one token, which nobody drafted
    assert pieces(page) == expected
    looks = "node => [getComputedStyle(node).backgroundColor, getComputedStyle(node).textDecorationLine]"
    marked = page.eval_on_selector("#output mark", looks)
    plain = page.eval_on_selector("#output span:not([class])", looks)
    assert marked[0] != plain[0]
    assert (marked[1], plain[1]) == ("underline", "none")


def test_nothing_is_marked_where_the_server_cannot_say_what_a_token_reads_as(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url, refused=(500,))
    page.route("**/detokenize", lambda route: route.fulfill(status=500, body="{}"))
    generate(page, "say: ", max_tokens=9)
    wait_until_done(page)
    assert pieces(page) == [("SPAN", "say: "), ("SPAN", REPLY[:9])]


def test_a_finished_text_says_how_it_went(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url)
    generate(page, "say: ", max_tokens=30)
    wait_until_done(page)
    assert page.inner_text("#out-tokens") == "30"
    assert page.inner_text("#out-accepted") == "67\u202f%"
    assert page.inner_text("#out-round") == "3.0"
    assert float(page.inner_text("#out-rate")) > 0
    assert page.inner_text("#out-first").endswith("\u202fms")
    assert page.inner_text("#said") == "Done: 30 tokens."


@pytest.mark.parametrize("how", ["the button", "the key"])
def test_a_stopped_text_stops_in_the_engine_too(
    serve: Serve, open_page: OpenPage, how: str
) -> None:
    url, engine = serve()
    page = open_page(url)
    generate(page, "say: ", max_tokens=400)
    page.wait_for_selector("#output mark")
    if how == "the button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    wait_until_done(page)
    wait_for(lambda: engine.idle, "the engine still writes")
    assert len(engine.aborted) == 1
    assert page.is_disabled("#stop")
    assert page.is_hidden("#error")
    assert page.inner_text("#said").startswith("Stopped: ")
    assert 0 < int(page.inner_text("#out-tokens")) < 400


def test_a_full_engine_is_said_in_words_and_a_later_try_works(
    serve: Serve, open_page: OpenPage
) -> None:
    config = EngineConfig(max_num_seqs=1, max_queued_requests=0, speculative_config=SPECULATION)
    url, engine = serve(config=config)
    first, second = open_page(url), open_page(url, refused=(429,))
    generate(first, "say: ", max_tokens=400)
    first.wait_for_selector("#output mark")
    generate(second, "say: ", max_tokens=5)
    alert = second.get_by_role("alert")
    alert.wait_for()
    assert "as many requests as it can take" in alert.inner_text()
    assert "Try again in 1 s" in alert.inner_text()
    first.get_by_role("button", name="Stop").click()
    wait_for(lambda: engine.idle, "the engine still writes")
    second.get_by_role("button", name="Generate").click()
    wait_until_done(second)
    assert alert.is_hidden()
    assert second.inner_text("#out-tokens") == "5"


def test_a_request_that_cannot_be_served_is_said_in_the_servers_words(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url, refused=(400,))
    generate(page, "x" * 600, max_tokens=5)
    page.get_by_role("alert").wait_for()
    assert "600 tokens" in page.inner_text("#error")
    assert page.is_enabled("#run")


def test_an_engine_that_dies_midway_is_said_in_words(serve: Serve, open_page: OpenPage) -> None:
    url, engine = serve()
    page = open_page(url)
    generate(page, "say: ", max_tokens=400)
    page.wait_for_selector("#output mark")
    engine.fail("rank 0 died")
    page.get_by_role("alert").wait_for()
    assert page.inner_text("#error") not in ("", ".")
    assert page.is_enabled("#run")


def test_a_server_with_a_key_asks_for_it(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(server=ServerConfig(api_key="secret")).url, refused=(401,))
    generate(page, "say: ", max_tokens=5)
    page.get_by_role("alert").wait_for()
    assert "API key" in page.inner_text("#error")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#outcome:visible")
    page.wait_for_selector(".state.live")
    assert page.inner_text("#out-tokens") == "5"


def test_the_live_engine_is_shown_while_it_works(serve: Serve, open_page: OpenPage) -> None:
    url, _ = serve()
    page = open_page(url)
    generate(page, "say: ", max_tokens=400)
    page.wait_for_function("() => by('running').textContent === '1'")
    page.wait_for_function("() => Number(by('rate').textContent) > 20")
    page.wait_for_function("() => by('acceptance').textContent.startsWith('100')")
    page.wait_for_function("() => (by('spark-edge').getAttribute('d') || '').includes('L')")
    assert page.inner_text("#model") == "embedded"
    assert page.inner_text("#state").startswith("up ")
    assert "1,024 blocks" in page.inner_text("#kv-note")
    assert page.inner_text("#ranks") == "rank 0 of 1: a fake on the cpu"
    assert page.locator("#positions li").count() == 2
    assert page.get_attribute("#positions li", "aria-label") == "draft 1: 100\u202f% of rounds"
    assert page.inner_text("#lengths-note") == "mean 2.0"
    stages = page.get_attribute("#stages", "aria-label")
    assert stages.startswith(
        "calibrate 0.2\u202fms, draft 0.3\u202fms, verify 0.5\u202fms, other 29.0"
    )
    widths = page.eval_on_selector_all("#stages i", "all => all.map(one => one.offsetWidth)")
    assert widths == sorted(widths), "calibrate < draft < verify < the rest"
    page.get_by_text("Settings").click()
    assert "speculative_config.num_speculative_tokens\n2" in page.inner_text("#settings")


def test_without_speculation_nothing_of_it_is_shown(serve: Serve, open_page: OpenPage) -> None:
    url, _ = serve(FakeEngine(tokens_per_step=1), config=EngineConfig())
    page = open_page(url)
    generate(page, "say: ", max_tokens=9)
    wait_until_done(page)
    assert page.is_hidden("#speculation")
    assert page.is_hidden("#legend")
    assert page.inner_text("#acceptance") == "off"
    assert pieces(page) == [("SPAN", "say: "), ("SPAN", REPLY[:9])]
    assert page.is_hidden("#out-accepted-part")


def test_a_server_that_goes_away_is_noticed(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url, refused=(500,))
    page.route("**/live/status", lambda route: route.fulfill(status=500, body="{}"))
    page.wait_for_selector(".state.lost")
    assert page.inner_text("#state") == "answers 500"
    page.unroute("**/live/status")
    page.wait_for_selector(".state.live")


def test_an_engine_started_anew_is_shown_from_its_own_beginning(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url)
    answers = [status_of(99.0 + i, num_steps=900 + i, tokens=9000) for i in range(2)]
    answers += [status_of(1.0 + i, num_steps=1 + i, tokens=10 * i) for i in range(99)]
    page.route("**/live/status", lambda route: route.fulfill(json=answers.pop(0)))
    page.wait_for_function("() => by('rate').textContent === '10'")
    assert "lost" not in page.get_attribute("#state", "class")
    assert page.inner_text("#rate-note") == "peak 10"


def status_of(uptime_s: float, *, num_steps: int, tokens: int) -> dict[str, Any]:
    status = EngineStatus(num_steps=num_steps, generation_tokens=tokens, num_blocks=8)
    return {
        "model": "m",
        "config": {},
        "uptime_s": uptime_s,
        "status": msgspec.to_builtins(status),
    }


def live_fleet(uptime_s: float, *, fetched: int) -> dict[str, Any]:
    """Two engines that write, one that reads, one that starts and one that did not."""
    links = KvLinks(addresses=("10.0.0.1:1",))

    def member(name: str, role: EngineRole, **numbers: int) -> EngineStatus:
        return EngineStatus(
            engine_id=name, role=role, links=links, num_blocks=1000, num_steps=1, **numbers
        )

    tokens = int(100 * uptime_s)
    transfers = TransferTotals(
        producing=2,
        fetching=3,
        fetched=fetched,
        failed=1,
        num_bytes=2_500_000_000,
        unoverlapped_s=0.5,
    )
    members = (
        member(
            "prefill-0", "prefill", num_running=2, prompt_tokens=40 * tokens, num_free_blocks=250
        ),
        member("decode-0", "decode", num_running=5, generation_tokens=tokens, num_free_blocks=900),
        member("decode-1", "decode", num_waiting=4, num_free_blocks=1000),
    )
    status = EngineStatus(num_running=7, num_steps=3, members=members, transfers=transfers)
    engines = [
        {"id": each.engine_id, "role": each.role, "state": "serving", "error": None}
        for each in members
    ]
    engines += [
        {"id": "decode-2", "role": "decode", "state": "starting", "error": None},
        {"id": "prefill-1", "role": "prefill", "state": "failed", "error": "no room: " + "x" * 90},
    ]
    live = status_of(uptime_s, num_steps=3, tokens=tokens)
    return live | {"status": msgspec.to_builtins(status), "engines": engines}


def show_fleet(page: Any) -> None:
    answers = [live_fleet(float(second), fetched=100) for second in range(1, 99)]
    page.route("**/live/status", lambda route: route.fulfill(json=answers.pop(0)))
    page.wait_for_function("() => by('writers').textContent.includes('100 tokens/s')")


def test_engines_that_serve_together_and_what_moves_between_them_are_shown(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url)
    assert page.is_hidden("#fleet"), "one engine alone is no fleet"
    show_fleet(page)
    readers = page.locator("#readers li").all_inner_texts()
    writers = page.locator("#writers li").all_inner_texts()
    assert "prefill-0" in readers[0]
    assert "2 running, 0 waiting, 4,000 tokens/s" in readers[0]
    assert "KV 75\u202f% of 1,000 blocks" in readers[0]
    assert "failed" in readers[1]
    assert "no room" in readers[1]
    assert "5 running, 0 waiting, 100 tokens/s" in writers[0]
    assert "0 running, 4 waiting, 0 tokens/s" in writers[1]
    assert "starting" in writers[2]
    assert page.inner_text(".moved").split("\n") == [
        "3 under way",
        "100 prompts done",
        "2.5\u202fGB received",
        "5.0\u202fms each not overlapped",
        "1 failed, read again",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_engines_fit_narrow_and_wide_screens(
    serve: Serve, open_page: OpenPage, scheme: str
) -> None:
    page = open_page(serve().url, color_scheme=scheme)
    show_fleet(page)
    cut = "all => all.filter(one => one.getBoundingClientRect().right > innerWidth).length"
    for width in (360, 768, 1200, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.eval_on_selector_all("#fleet, #fleet li, #fleet p, #fleet b", cut) == 0


def test_text_of_a_model_is_never_markup(serve: Serve, open_page: OpenPage) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    page = open_page(serve(FakeEngine(saying(evil))).url)
    generate(page, "<b>bold</b>", max_tokens=200)
    wait_until_done(page)
    assert "".join(text for _, text in pieces(page)) == "<b>bold</b>" + evil
    assert page.locator("#output b, #output img, #output script").count() == 0


def test_it_can_be_used_by_keyboard_and_every_control_has_a_name(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve(FakeEngine(endless)).url)
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("hello ")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "temperature"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#outcome:visible")
    wait_until_done(page)
    assert pieces(page)[0] == ("SPAN", "hello ")
    assert page.inner_text("#out-tokens") == "7"
    nameless = "all => all.filter(one => !one.labels?.length && !one.textContent.trim()).length"
    assert page.eval_on_selector_all("input, textarea, button", nameless) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_wide_screens_in_light_and_dark(
    serve: Serve, open_page: OpenPage, scheme: str
) -> None:
    page = open_page(serve().url, color_scheme=scheme)
    generate(page, "a_rather_long_name" * 9, max_tokens=30)
    wait_until_done(page)
    page.get_by_text("Settings").click()
    cut = "all => all.filter(one => one.getBoundingClientRect().right > innerWidth).length"
    for width in (360, 768, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.eval_on_selector_all(".card, button, input, textarea", cut) == 0
    paper = page.evaluate(
        "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (sum(paper) < 200) == (scheme == "dark")


def test_nothing_comes_from_elsewhere_and_only_its_own_script_may_run(
    serve: Serve, open_page: OpenPage
) -> None:
    url, _ = serve()
    page = open_page(url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer = page.reload()
    page.wait_for_selector(".state.live")
    generate(page, "say: ", max_tokens=9)
    wait_until_done(page)
    assert asked
    assert all(one.startswith((url, "data:")) for one in asked)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
