"""The page and the HTTP API, in gradio; nothing else imports it.

The server holds no files of visitors and gives none away: requests to upload, fetch or proxy are refused before gradio sees
them. Its pages load nothing from elsewhere, which a content security policy enforces.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from html import escape
from types import FrameType
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000"  # events between summaries that nobody sees
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1000"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from dmd2.errors import Refused
from dmd2.serve.drawing import Drawing, Progress, Student, draw
from dmd2.serve.request import Limits
from dmd2.serve.result import answer, find_student, page_of, read_link

logger = logging.getLogger(__name__)

Students = Mapping[str, Student]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY = 4_000_000
"""Bytes of a request to the server. A longer prompt than is allowed is refused by a sentence, up to this."""
MAX_CONNECTIONS = 512
SESSIONS = 200
"""Sessions that gradio remembers, each with a copy of the form of 50 kB. By default it keeps 10,000: every call of the API is one."""
REFUSED = (
    "upload",
    "file",
    "proxy=",
    "stream",
    "component_server",
    "runs",
    "run-history",
    "custom_component",
    "deep_link",
)
"""Beginnings of gradio's routes, below `/gradio_api/`, that are about files and other servers."""
POLICY = {
    b"content-security-policy": b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    b"script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",  # addresses contain prompts
    b"x-content-type-options": b"nosniff",
}
CSS = """
.drawing img { width: max(8rem, 100%); max-width: 32rem; image-rendering: pixelated; border-radius: 4px }
.drawing figure { margin: 0 0 1rem } .drawing figcaption { font-weight: 600; margin-bottom: .25rem }
.drawing figure > div { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(min(8rem, 45%), 1fr)) }
.drawing a { display: inline-block; padding: .5rem .75rem .5rem 0; text-decoration: underline }
"""
FAILED = "the drawing failed; the log of the server says why"
CLICK_OF_LINK = (
    "() => { if (new URLSearchParams(location.search).has('seed')) document.getElementById('draw').click() }"
)
"""Draws what a link says, once the form has its values."""
INPUTS = ("package", "prompt", "seed", "images", "steps", "tiny_vae", "compare", "teacher_steps", "guidance")
"""Names of the fields of the form, in its order."""


def make_app(students: Students, limits: Limits, queue: int) -> FastAPI:
    """The server. `/ready` answers as soon as it listens, which is after the packages were loaded."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/ready")(lambda: {"packages": list(students)})
    blocks = _blocks(students, limits).queue(max_size=queue, api_open=False)
    blocks.state_session_capacity = SESSIONS
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {
        "ssr_mode": False,
        "run_history": False,
        "footer_links": ["api"],
        "enable_monitoring": False,
        "pwa": False,
    }
    gr.mount_gradio_app(app, blocks, "/", theme=theme, css=CSS, show_error=True, max_file_size=1, **options)
    app.add_middleware(_Guard)
    return app


def run_app(app: FastAPI, host: str, port: int) -> None:
    """Listen until SIGINT or SIGTERM."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise Refused(
            f"{host}:{port} cannot be listened at ({error.strerror}); choose another --host or --port"
        ) from None
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=2
    )
    _Server(config).run([listener])


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Ends without a trace of each connection that is open, as that of a page always is."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


class _Guard:
    """Refuses routes about files and long bodies, and adds the headers of `POLICY`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].lstrip("/").removeprefix("gradio_api").lstrip("/").startswith(REFUSED):
            await _refuse(send, 403)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                return {"type": "http.disconnect"}
            return message

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *POLICY.items()]
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            await _refuse(send, 413)
            return
        await self.app(scope, bounded, with_policy)


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*POLICY.items()]})
    await send({"type": "http.response.body", "body": b""})


def _blocks(students: Students, limits: Limits) -> Any:
    def drawn(values: Mapping[str, Any], progress: Progress = lambda share: None) -> Drawing:
        try:
            return draw(find_student(values.get("package"), students), dict(values), limits, progress)
        except Refused as error:
            raise gr.Error(escape(str(error), quote=False), duration=None, print_exception=False) from None
        except Exception:
            logger.exception("a drawing failed")
            raise gr.Error(FAILED, duration=None, print_exception=False) from None

    def show(*values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 - as gradio finds it
        return page_of(
            drawn(dict(zip(INPUTS, values, strict=True)), lambda share: progress(share, desc="Drawing"))
        )

    def draw_by_api(
        prompt: str = "",
        seed: int = 0,
        images: int = 1,
        steps: int = 0,
        package: str = "",
        tiny_vae: bool = False,
        compare: bool = False,
        teacher_steps: int = 0,
        guidance: float | None = None,
    ) -> dict[str, Any]:
        """Draw: PNGs as data URIs, seconds of each part, settings, and the link that repeats the picture."""
        values = package, prompt, seed, images, steps, tiny_vae, compare, teacher_steps, guidance
        return answer(drawn(dict(zip(INPUTS, values, strict=True))))

    def packages() -> list[dict[str, Any]]:
        """What is served here."""
        return [{"package": s.name, "digest": s.digest} | s.offer._asdict() for s in students.values()]

    def open_link(request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        try:
            values = read_link(query, students)
        except Refused as error:
            raise gr.Error(escape(str(error), quote=False), duration=None, print_exception=False) from None
        if not values:
            return [gr.skip()] * len(INPUTS)
        return _form(find_student(values.get("package"), students), values)

    def describe(name: str) -> list[Any]:
        return _form(find_student(name, students), {})[1:]

    first = next(iter(students.values()))
    with gr.Blocks(title="dmd2", analytics_enabled=False) as blocks:
        gr.Markdown("# Draw with a distilled student")
        with gr.Row():
            with gr.Column(min_width=280):
                fields = _fields(students, first, limits)
                another = gr.Button("New seed")
                go = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=2, min_width=280):
                result = gr.HTML("<p>Nothing is drawn yet.</p>", elem_id="result")
        gr.Markdown(
            f"{_safety(students)} Images are kept nowhere; the link and the settings repeat them on this server."
        )
        one_at_a_time: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1}
        private: dict[str, Any] = {"api_visibility": "private"}
        by_hand: dict[str, Any] = (
            {"inputs": fields, "outputs": result, "show_progress_on": result} | one_at_a_time | private
        )
        gr.on([go.click, fields[1].submit, fields[2].submit], show, **by_hand)
        another.click(None, None, fields[2], js="() => Math.floor(Math.random() * 2 ** 32)", **private).then(
            show, **by_hand
        )
        fields[0].input(describe, fields[0], fields[1:], queue=False, **private)
        blocks.load(open_link, None, fields, queue=False, **private).success(
            None, js=CLICK_OF_LINK, **private
        )
        gr.api(draw_by_api, api_name="draw", **one_at_a_time)
        gr.api(packages, api_name="packages", queue=False)
    return blocks


def _safety(students: Students) -> str:
    """Which packages have a safety checker."""
    without = [name for name, student in students.items() if not student.safety]
    if len(without) == len(students):
        return "The packages have no safety checker: no image is withheld."
    said = "Images that the safety checker of their package finds are replaced by black ones."
    return (
        f"{said} No image is withheld of {', '.join(without)}, without a safety checker." if without else said
    )


def _fields(students: Students, first: Student, limits: Limits) -> list[Any]:
    """The fields of the form, in the order of `INPUTS`."""
    offer = first.offer
    return [
        gr.Dropdown(list(students), value=first.name, label="Package", interactive=True),
        gr.Textbox("0" if offer.classes else "", max_length=limits.prompt, **_prompt_label(first)),
        gr.Number(0, label="Seed", info="0 to 4294967295", step=1),
        gr.Number(1, label="Images", info=f"1 to {limits.images}", step=1),
        gr.Number(offer.steps, **_steps_label(first)),
        gr.Checkbox(False, label="Tiny VAE", info="Fast decoding", visible=offer.has_tiny_vae),
        gr.Checkbox(
            False, label="Compare with the teacher", info="From the same noise", visible=offer.has_teacher
        ),
        gr.Number(offer.teacher_steps, label="Steps of the teacher", step=1, visible=offer.has_teacher),
        gr.Number(
            offer.guidance, label="Guidance of the teacher", visible=offer.has_teacher and not offer.classes
        ),
    ]


def _form(student: Student, values: Mapping[str, str]) -> list[Any]:
    """What the fields become for a student: the values of a link, or else the student's defaults."""
    offer = student.offer
    return [
        gr.update(value=student.name),
        gr.update(
            value=values.get("prompt", "0" if offer.classes else ""),
            **_prompt_label(student),
        ),
        gr.update(**_value(values, "seed")),
        gr.update(**_value(values, "images")),
        gr.update(value=values.get("steps", offer.steps), **_steps_label(student)),
        gr.update(value=values.get("tiny_vae") == "1", visible=offer.has_tiny_vae),
        gr.update(value=values.get("compare") == "1", visible=offer.has_teacher),
        gr.update(value=values.get("teacher_steps", offer.teacher_steps), visible=offer.has_teacher),
        gr.update(
            value=values.get("guidance", offer.guidance), visible=offer.has_teacher and not offer.classes
        ),
    ]


def _value(values: Mapping[str, str], name: str) -> dict[str, str]:
    return {"value": values[name]} if name in values else {}


def _prompt_label(student: Student) -> dict[str, str]:
    if classes := student.offer.classes:
        return {"label": "Class", "info": f"0 to {classes - 1}", "placeholder": ""}
    return {"label": "Prompt", "info": "", "placeholder": "what to draw"}


def _steps_label(student: Student) -> dict[str, Any]:
    steps = student.offer.steps
    return {"label": "Steps", "info": f"1 to {steps}; the student was made for {steps}", "step": 1}
