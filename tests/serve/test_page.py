"""The page in a real browser, its HTTP API with gradio's own client, strangers who ask for files, and twenty clients at a time."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2 import recipes, stages
from dmd2.io.artifact import read_manifest
from dmd2.model import load_network
from dmd2.serve.drawing import Student, Teacher
from dmd2.serve.request import Limits
from dmd2.serve.students import load_students
from tests.tiny_sdxl import SMALL

pytestmark = pytest.mark.slow
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed (apt-get install chromium)"
)
PICTURES = os.environ.get("DMD2_SCREENSHOTS", "")
"""Folder to write screenshots to."""
RUN, EMOJI_RUN = os.environ.get("DMD2_PAGE_RUN", ""), os.environ.get("DMD2_PAGE_EMOJI_RUN", "")
"""Folders of `make demo` and `make demo-sdxl` to draw with. The README's pictures:
`DMD2_SCREENSHOTS=.github DMD2_PAGE_RUN=runs/demo .venv/bin/pytest -m slow tests/serve/test_page.py -k digits` and
`DMD2_SCREENSHOTS=.github DMD2_PAGE_EMOJI_RUN=runs/demo-sdxl .venv/bin/pytest -m slow tests/serve/test_page.py -k prompts`."""
QUEUE = 24


@contextmanager
def served(students: dict[str, Student]) -> Iterator[str]:
    """The address of a server in this process."""
    import uvicorn  # slow to import, as gradio is

    from dmd2.serve.page import make_app

    server = uvicorn.Server(uvicorn.Config(make_app(students, Limits(8, 100), QUEUE), log_level="critical"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.force_exit = server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def digits(made: Path) -> dict[str, Student]:
    return students_of(Path(RUN) if RUN else made)


def students_of(root: Path) -> dict[str, Student]:
    """The student of a run of the pipeline, with its teacher."""
    run, teacher = str(root / "run"), str(root / "teacher")
    return load_students(
        [(run, read_manifest(run, "run"))], [(teacher, read_manifest(teacher, "teacher"))], "", torch.float32
    )


@pytest.fixture(scope="module")
def emoji(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A tiny untrained SDXL, as a student of four steps and as its own teacher, with its own VAE as the tiny one; or that of a run."""
    if EMOJI_RUN:
        (found,) = students_of(Path(EMOJI_RUN)).values()
        return replace(found, name="emoji", tiny_vae=found.model.family.vae)  # type: ignore[attr-defined]
    config, out = recipes.resolve("sdxl-4step-emoji", SMALL), tmp_path_factory.mktemp("emoji") / "teacher"
    stages.resolve(config, str(pipeline), str(out))
    model = load_network(out)
    digest = read_manifest(out, "teacher").digest
    student = replace(model, timesteps=(999, 749, 499, 249))
    return Student("emoji", digest, student, config.evaluate, Teacher(digest, model), model.family.vae)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def address(digits: dict[str, Student], emoji: Student) -> Iterator[str]:
    with served(digits | {"emoji": emoji}) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; at its end nothing was asked of another server, and the browser has found no error."""
    opened = browser.new_page(viewport={"width": 1100, "height": 900})
    asked: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    opened.set_default_timeout(60_000)
    opened.goto(address)
    opened.get_by_role("button", name="Draw").wait_for()
    yield opened
    opened.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def drawn(page: Any, action: Callable[[], object]) -> list[str]:
    """The images that are there when the action was answered by others than were there before."""
    before = images(page)
    action()
    page.wait_for_function("before => { const now = [...document.querySelectorAll('.drawing img')].map(i => i.src);"
                           " return now.length && JSON.stringify(now) != JSON.stringify(before) }", arg=before)  # fmt: skip
    return images(page)


def images(page: Any) -> list[str]:
    return [image.get_attribute("src") for image in page.locator(".drawing img").all()]


def draw_button(page: Any) -> Any:
    return page.get_by_role("button", name="Draw")


def open_link(browser: Any, page: Any, width: int = 1100) -> list[str]:
    """The images of the repeating link, in a window of its own that is no wider than its page."""
    href = page.get_by_role("link", name="Link that repeats this picture").get_attribute("href")
    other = browser.new_page(viewport={"width": width, "height": 800})
    repeated = drawn(other, lambda: other.goto(page.url.split("?")[0] + href))
    assert other.evaluate("document.documentElement.scrollWidth") <= width
    other.close()
    return repeated


def save(page: Any, name: str) -> None:
    if PICTURES:
        page.wait_for_timeout(1000)  # what is drawn fades in
        page.screenshot(path=f"{PICTURES}/page-{name}.png", full_page=True)


@needs_browser
def test_digits_are_drawn_compared_and_repeated_bit_for_bit(page: Any, browser: Any) -> None:
    page.get_by_label("Class").fill("2")
    page.get_by_label("Images").fill("4")
    first = drawn(page, draw_button(page).click)
    assert len(first) == 4
    page.get_by_label("Seed").fill("7")
    second = drawn(page, lambda: page.get_by_label("Seed").press("Enter"))
    assert not set(first) & set(second)
    third = drawn(page, page.get_by_role("button", name="New seed").click)
    assert not set(second) & set(third)
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Compare with the teacher").check()
    both = drawn(page, draw_button(page).click)
    assert both[:4] == second
    assert len(set(both)) == 8
    said = page.get_by_role("status").filter(has_text="Student").inner_text()
    assert "Teacher: 4 images in" in said
    page.get_by_role("img", name="Teacher, image 4 of 4: 2").wait_for()
    save(page, "digits")
    assert open_link(browser, page) == both
    assert open_link(browser, page, width=360) == both


PROMPT = "a red <b>square</b> & a blue one"


@needs_browser
def test_prompts_are_drawn_with_either_vae_and_repeated_bit_for_bit(page: Any, browser: Any) -> None:
    page.get_by_label("Package").click()
    page.get_by_role("option", name="emoji").click()
    page.get_by_text("the student was made for 4").wait_for()  # the new package sets every field
    page.get_by_label("Guidance of the teacher").wait_for()
    prompt = page.get_by_label("Prompt")
    while prompt.input_value() != PROMPT:  # one of the fields may be set later than the others
        prompt.fill(PROMPT)
        page.wait_for_timeout(1000)
    page.get_by_label("Compare with the teacher").check()
    page.get_by_label("Steps of the teacher").fill("2")
    page.get_by_label("Guidance of the teacher").fill("3")
    page.get_by_label("Tiny VAE").check()
    both = drawn(page, draw_button(page).click)
    assert len(set(both)) == 2
    page.get_by_role("img", name=f"Student, image 1 of 1: {PROMPT}").wait_for()
    assert page.locator(".drawing b").count() == 0
    assert open_link(browser, page) == both
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the settings").click()
    assert '"tiny_vae": true' in Path(download.value.path()).read_text()
    for label, value in {
        "Prompt": "cat face",
        "Images": "4",
        "Steps of the teacher": "30",
    }.items():
        page.get_by_label(label).fill(value if EMOJI_RUN else "2")
    page.get_by_label("Tiny VAE").uncheck()
    assert len(set(drawn(page, draw_button(page).click))) == (8 if EMOJI_RUN else 4)
    save(page, "prompts")


@needs_browser
def test_a_mistake_is_one_sentence_on_the_page_and_every_control_is_reached_by_keyboard(page: Any) -> None:
    page.get_by_label("Class").fill("<img src=x onerror=alert(1)>")
    draw_button(page).click()
    alert = page.get_by_role("status").filter(has_text="give a number from 0 to")
    alert.wait_for()
    assert page.locator("img[src=x]").count() == 0
    page.reload()
    reached = set()
    page.get_by_label("Package").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.labels?.[0]?.innerText.split('\\n')[0].trim() || e.innerText)(document.activeElement)"
            )
        )
    assert {"Class", "Seed", "Images", "Steps", "Compare with the teacher", "New seed", "Draw"} <= reached


def test_the_api_draws_what_the_page_draws_and_says_its_mistakes(
    address: str, digits: dict[str, Student]
) -> None:
    from gradio_client import Client

    client = Client(address, verbose=False)
    first = client.predict(prompt="1", seed=3, images=2, compare=True, teacher_steps=2, api_name="/draw")
    assert len(first["images"]) == len(first["teacher"]) == 2
    again = client.predict(prompt="1", seed=3, images=2, api_name="/draw")
    assert again["images"] == first["images"]
    assert first["settings"]["digest"] == digits["edm-digits"].digest
    assert [each["package"] for each in client.predict(api_name="/packages")] == ["edm-digits", "emoji"]
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"prompt": 10**6 * "x", "package": "emoji"}, "prompt has 1,000,000 characters"),
        ({"prompt": "1", "steps": 10**9}, "steps is 1000000000"),
        ({"prompt": "1", "seed": "a"}, "seed is 'a'"),
        ({"prompt": "1", "package": "/etc/passwd"}, "package is none of those"),
        ({"prompt": "1", "guidance": "nan"}, "guidance is 'nan'"),
    ]
    for values, said in mistakes:
        with pytest.raises(Exception, match=said) as caught:
            client.predict(**values, api_name="/draw")
        assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ('["1", 0, 1, 1000000000, "", false, false, 0, null]', "steps is 1000000000; give a number from 0 to"),
        ('["1", 0, 1, 0, "", false, false, 0, NaN]', "guidance is nan; give a number from 1 to"),
        ('["1", Infinity, 1, 0, "", false, false, 0, null]', "seed is inf; give a number from 0 to"),
        ('[{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, 0, 1, 0, "", false, false, 0, null]', "give a number from 0 to 2"),
        ('["<script>alert(1)</script>", 0, 1, 0, "", false, false, 0, null]', "give a number from 0 to"),
    ],
)  # fmt: skip
def test_hostile_values_that_no_client_would_send_are_answered_with_one_sentence(
    values: str, said: str, address: str
) -> None:
    """Straight to the queue: numbers that JSON does not know, a file's record instead of a text."""
    asked = http().post(
        f"{address}/gradio_api/call/draw",
        content=f'{{"data": {values}}}',
        headers={"Content-Type": "application/json"},
    )
    answered = wait(address, asked.json()["event_id"]) if asked.status_code == 200 else asked.text
    assert said in answered, answered
    assert "Traceback" not in answered
    assert "root:" not in answered
    assert len(answered) < 400


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd", "gradio_api/file=pyproject.toml", "gradio_api/file/etc/passwd",
        "gradio_api//file=/etc/passwd", "gradio_api/%66ile=/etc/passwd", "gradio_api/x/../file=/etc/passwd", "file=/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1/", "static/../../../../etc/passwd", "static/%2e%2e/%2e%2e/%2e%2e/routes.py",
        "assets/..%2f..%2f..%2froutes.py", "svelte/..%2f..%2froutes.py", "theme.css/../../etc/passwd",
        "gradio_api/stream/a/1/1/playlist-file", "gradio_api/custom_component/1/client/component/..%2f..%2fx",
    ],
)  # fmt: skip
def test_no_file_of_the_server_is_read(address: str, path: str) -> None:
    host = HTTPConnection(address.removeprefix("http://"))
    host.request("GET", f"/{path}")  # as written: other clients tidy paths
    answered = host.getresponse()
    text = answered.read().decode(errors="replace")
    assert answered.status in (403, 404)
    assert "root:" not in text
    assert "import " not in text


def test_nothing_is_uploaded_and_no_long_body_is_read(address: str) -> None:
    import httpx

    upload = httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"})
    assert upload.status_code == 403
    assert httpx.post(f"{address}/gradio_api/queue/join", content=5_000_000 * b"x").status_code == 413
    chunks = (1_000_000 * b"x" for _ in range(6))
    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert httpx.post(f"{address}/gradio_api/queue/join", content=chunks).status_code == 200
    assert httpx.get(f"{address}/ready").json() == {"packages": ["edm-digits", "emoji"]}


@cache
def http() -> Any:
    """One client for all threads: each new one reads the certificates of the system, half a megabyte."""
    import httpx

    return httpx.Client(timeout=120)


def join(address: str, prompt: str, seed: int = 0, count: int = 1) -> Any:
    """Ask for a drawing by plain HTTP -> the response, with the `event_id` of the place in the queue."""
    data = {"data": [prompt, seed, count, 0, "", False, False, 0, None]}
    return http().post(f"{address}/gradio_api/call/draw", json=data)


def wait(address: str, event: str) -> str:
    """The stream of a place in the queue, to its end."""
    return http().get(f"{address}/gradio_api/call/draw/{event}").text


def resident() -> float:
    """Megabytes of memory of this process, the server's and its clients'."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_twenty_clients_at_a_time_are_served_in_turn_within_bounded_memory(address: str) -> None:
    seconds, counts = float(os.environ.get("DMD2_PAGE_SECONDS", "60")), [0] * 20
    failed: list[str] = []

    def client(number: int) -> None:
        while time.monotonic() < end:
            answered = wait(address, join(address, str(number % 3), number, 2).json()["event_id"])
            counts[number] += 1
            if "event: complete" not in answered:
                failed.append(answered)

    for duration in (2.0, seconds):  # the first fills caches
        end, before, counts = time.monotonic() + duration, resident(), [0] * 20
        threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    grown = resident() - before
    print(
        f"{sum(counts)} drawings in {seconds:.0f} s, {min(counts)} to {max(counts)} a client, {grown:.0f} MB more"
    )
    assert failed == []
    assert max(counts) - min(counts) <= 3
    assert min(counts) > 0
    assert grown < 50


def test_a_full_queue_is_said_and_a_client_that_goes_away_frees_its_place(
    digits: dict[str, Student],
) -> None:
    student, gate = digits["edm-digits"], threading.Event()
    hook = student.model.network.register_forward_pre_hook(lambda module, args: gate.wait(120) and None)
    try:
        with served(digits) as url:
            first = join(url, "0").json()["event_id"]
            events: list[str] = []
            while (answered := join(url, "1")).status_code == 200 and len(events) < 2 * QUEUE:
                events.append(answered.json()["event_id"])
            assert answered.status_code == 503
            assert answered.json()["detail"].startswith("Queue is full.")
            assert QUEUE <= len(events) <= QUEUE + 1
            lost = HTTPConnection(url.removeprefix("http://"))
            lost.request("GET", f"/gradio_api/call/draw/{events[-1]}")
            lost.getresponse().close()
            lost.close()
            for _ in range(300):
                if (answered := join(url, "2")).status_code == 200:
                    break
                time.sleep(0.1)
            gate.set()
            assert "event: complete" in wait(url, answered.json()["event_id"])
            assert "event: complete" in wait(url, first)
    finally:
        gate.set()
        hook.remove()
