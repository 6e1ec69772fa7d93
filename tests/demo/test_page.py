"""The demo as its command serves it: in a real browser, for thirty visitors at once, and for those who forge requests.

One server and one browser for all of it. Without a Chromium the browser's tests say so; the others don't need one.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.demo.test_runs import SECOND
from tests.demo.visitor import Visitor
from visalign import cli
from visalign.demo import inputs
from visalign.demo.workshop import OFFERED
from visalign.toybox.scenes import COLOURS, SHAPES, Object, render

VISITORS = 30
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCRIPT = "<script>alert(1)</script> ${alert(2)} {{3}} <img src=x onerror=alert(4)>"
PATH = "../../../../etc/passwd"
expect.set_options(timeout=30_000)
WEIGHTS = [1.0] * len(OFFERED)
FETCHED = re.compile(r"(data|blob):|http://127\.0\.0\.1:")


@dataclass(frozen=True)
class Server:
    """Where the demo is, and what it has said."""

    address: str
    log: Path


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("demo") / "log.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "visalign.cli", "demo", "--runs", str(root), "--device", "cpu", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, log.read_text()
    yield Server(found[0], log)
    process.terminate()
    assert process.wait(60) == 0, "it ends by itself"
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip("no Chromium on this machine, so the page was not driven: `apt-get install chromium` and run this again")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])  # as root there is no sandbox
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A new visitor's page; nothing it does may fail in the browser, run a script of the visitor's, or ask another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, faults = context.new_page(), list[str]()
    opened.on("request", lambda request: None if FETCHED.match(request.url) else faults.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    opened.goto(server.address)
    opened.wait_for_selector("#generate")
    yield opened
    text = opened.inner_text("body")
    context.close()
    assert not faults
    assert "Traceback" not in text


def message(page: Page) -> str:
    """The one message on the page, which is then closed."""
    toast = page.locator(".toast-body")
    expect(toast).to_have_count(1)
    text = toast.inner_text()
    page.locator(".toast-close").click()
    expect(toast).to_have_count(0)
    return text


def set_budget(page: Page, evaluations: int) -> None:
    page.locator("#budget input[type=number]").fill(str(evaluations))


def choose(page: Page, name: str, option: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=option, exact=True).click()


# --- in a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["best_of_n", "zero_order"])
def test_a_search_is_watched_until_it_is_done(page: Page, method: str) -> None:
    choose(page, "method", method)
    set_budget(page, 200)
    page.click("#generate")
    points = page.locator("#curve circle.a")
    page.wait_for_function("document.querySelectorAll('#curve circle.a').length >= 2")
    few = points.count()
    expect(page.locator("#state")).to_contain_text(f"{method}: done, 200 network evaluations a picture")
    assert points.count() > few, "the curve has grown while it was watched"
    expect(page.locator("#stage img")).to_have_count(4)
    expect(page.locator("#stage .two").first).to_contain_text("plain")
    expect(page.locator("#stage .two").first).to_contain_text("guided")
    expect(page.locator("#stage table")).to_contain_text("held out")


def test_a_search_is_cancelled_and_keeps_what_it_has(page: Page) -> None:
    set_budget(page, 2000)
    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('#stage .two').length == 2")
    page.click("#cancel")
    expect(page.locator("#state")).to_contain_text("Cancelled; this is how far it came.")
    drawn = page.inner_html("#stage")
    page.wait_for_timeout(700)
    assert page.inner_html("#stage") == drawn, "nothing goes on"
    expect(page.locator("#stage img")).to_have_count(4)
    set_budget(page, 50)
    page.click("#generate")
    expect(page.locator("#state")).to_contain_text("best_of_n: done, 50 network evaluations")


def test_three_uploads_are_ranked(page: Page, scenes: Path) -> None:
    page.get_by_role("tab", name="Score").click()
    page.set_input_files("#uploads input[type=file]", [scenes / name for name in ("one.png", "blue.png", "right.png")])
    expect(page.locator("#uploads")).to_contain_text("right")  # the list sets the ending apart
    page.click("#score")
    expect(page.locator("#ranking figure")).to_have_count(3)
    order = page.locator("#ranking header span").all_inner_texts()
    assert order == ["right.png", "blue.png", "one.png"]
    expect(page.locator("#ranking .meter")).to_have_count(9)
    expect(page.locator("#ranking img")).to_have_count(6)  # with dino's map
    page.locator("#uploads").get_by_label("Clear").click()
    page.click("#examples")
    expect(page.locator("#uploads")).to_contain_text("red and blue")
    page.click("#score")
    expect(page.locator("#ranking header span").first).to_have_text("two red.png")


def test_a_run_is_opened_and_compared(page: Page) -> None:
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#run input")).to_have_value("first")
    page.click("#open")
    expect(page.locator("#report h1")).to_have_text("first")
    expect(page.locator("#report [aria-label='credit/size']")).to_be_visible()
    expect(page.locator("#report .alarms")).to_contain_text("Diversity")
    choose(page, "other", SECOND)
    page.click("#open")
    expect(page.locator("#report table")).to_contain_text("optimizer.lr")
    expect(page.locator("#report h2 .key-b")).to_have_text(SECOND)


def test_what_a_visitor_gets_wrong_is_one_message_each(page: Page, scenes: Path) -> None:
    for text, said in (("", "the prompt is empty"), (PATH, "it can't read this prompt"), (SCRIPT, "it can't read this prompt")):
        page.locator("#prompt textarea").fill(text)
        page.click("#generate")
        assert said in message(page)
    page.get_by_role("tab", name="Score").click()
    said = {"broken.png": "broken.png can't be read", "text.png": "text.png can't be read", "huge.png": "is too large: 5000 × 5000"}
    for name, expected in said.items():
        page.set_input_files("#uploads input[type=file]", scenes / name)
        expect(page.locator("#uploads")).to_contain_text(name.partition(".")[0])
        page.click("#score")
        assert expected in message(page)
        page.locator("#uploads").get_by_label("Clear").click()
    page.set_input_files("#uploads input[type=file]", scenes / "heavy.png")
    assert "exceed the maximum allowed size" in message(page)
    page.click("#score")
    assert "no pictures yet" in message(page)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, and of files that are none."""
    folder = tmp_path_factory.mktemp("scenes")
    right = [Object("circle", "red", 20, 20), Object("circle", "red", 44, 44)]
    render(right).save(folder / "right.png")
    render(right[:1]).save(folder / "one.png")
    render([right[0], Object("circle", "blue", 44, 44)]).save(folder / "blue.png")
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:150])
    (folder / "text.png").write_text("not a picture")
    Image.new("1", (5000, 5000)).save(folder / "huge.png")
    with (folder / "heavy.png").open("wb") as file:
        file.truncate(inputs.MEGABYTES * 2**20 + 1)
    return folder


# --- over HTTP ---------------------------------------------------------------------------------------------------------


def test_thirty_visitors_wait_their_turn_and_see_their_own_pictures(server: Server) -> None:
    prompts = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS][:VISITORS]

    def visit(number: int) -> list[dict[str, Any]]:
        wish = (prompts[number], "toybox", "best_of_n", 10, 1, 2, 1.0, number, ["toybox"], *WEIGHTS)
        return Visitor(server.address).press("generate", *wish)

    with ThreadPoolExecutor(VISITORS) as pool:
        together = list(pool.map(visit, range(VISITORS)))
    assert any((said.get("rank") or 0) > 0 for messages in together for said in messages), "some had to wait, and were told"
    pictures: list[list[str]] = []
    for number, messages in enumerate(together):
        assert messages[-1]["success"], messages[-1]
        seen = set(re.findall(r'alt="(?:plain|guided): ([^"]*)"', str(messages).replace("\\", "")))
        assert seen == {prompts[number]}, "nobody is shown another's prompt"
        pictures.append(re.findall(r"base64,([^\"]*)", messages[-1]["output"]["data"][1]))
        assert len(pictures[-1]) == 2
    assert len({found[1] for found in pictures}) == VISITORS
    for number in (0, VISITORS // 2, VISITORS - 1):
        alone = visit(number)[-1]["output"]["data"][1]
        assert re.findall(r"base64,([^\"]*)", alone) == pictures[number], "the same as without the others"


FORGED: list[tuple[str, tuple[Any, ...]]] = [
    ("generate", ("x", PATH, "best_of_n", 50, 1, 5, 1, 3, ["toybox"], *WEIGHTS)),
    ("generate", ("x", "toybox", "os:system", 50, 1, 5, 1, 3, ["toybox"], *WEIGHTS)),
    ("generate", ("x", "toybox", "best_of_n", 50, 1, 5, 1, 3, ["os:system"], *WEIGHTS)),
    ("generate", ("x", "toybox", "best_of_n", "__import__('os')", 1, 5, 1, 3, ["toybox"], *WEIGHTS)),
    ("generate", ("x",)),
    ("score", ([{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "x", ["jpeg"], *WEIGHTS)),
    ("score", ([{"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}], "x", ["jpeg"], *WEIGHTS)),
    ("score", (["/etc/passwd"], "x", ["jpeg"], *WEIGHTS)),
    ("open", (PATH, "")),
    ("open", ("first", "../outside/secret")),
    ("open", ({"path": "/etc/passwd"}, "")),
]


@pytest.mark.parametrize(("button", "values"), FORGED)
def test_forged_requests_are_refused_in_one_message(server: Server, button: str, values: tuple[Any, ...]) -> None:
    last = Visitor(server.address).press(button, *values)[-1]
    assert last["msg"] == "process_completed"
    assert not last["success"]
    assert re.search("not in the list of choices|can&#x27;t be read|expected a number", last["output"]["error"])
    assert "root:" not in str(last)


def test_files_of_the_server_are_not_served(server: Server, root: Path) -> None:
    http = Visitor(server.address).http
    for path in ("/etc/passwd", root / "first" / "metrics.jsonl", "../../etc/passwd", Path(cli.__file__)):
        assert http.get(f"gradio_api/file={path}").status_code in (403, 404)


def test_other_machines_are_not_let_in(server: Server) -> None:
    port = int(server.address.split(":")[2].strip("/"))
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # free: the demo holds 127.0.0.1 alone, not every address


def test_nothing_of_all_this_left_a_traceback(server: Server) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "Error" not in log


def test_a_port_that_is_taken_is_one_line(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from visalign.demo.workshop import Workshop

    warm: Callable[[Workshop], None] = lambda _: None  # noqa: E731
    monkeypatch.setattr(Workshop, "warm", warm)
    port = server.address.split(":")[2].strip("/")
    assert cli.main(["demo", "--model", "toy:gaussian", "--reward", "jpeg", "--device", "cpu", "--port", port]) == 2
    assert f"can't listen to 127.0.0.1, port {port}" in capsys.readouterr().err
