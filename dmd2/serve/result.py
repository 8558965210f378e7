"""A drawing as text: its settings, the link that repeats it, the answer of the HTTP API, and the HTML of the page.

Images are data URIs: the server writes no file, and has none to give away. All text of users is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from typing import Any
from urllib.parse import urlencode

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dmd2.errors import Refused
from dmd2.image_grid import image_grid
from dmd2.serve.drawing import Drawing, Images, Student

Settings = dict[str, Any]


def settings(drawing: Drawing) -> Settings:
    """What gives the same images again."""
    student, request = drawing.student, drawing.request
    model = student.model
    found: Settings = {"package": student.name, "digest": student.digest} | asdict(request)
    if not request.compare:
        del found["teacher_steps"], found["guidance"]
    return found | {
        "timesteps": list(model.timesteps[: request.steps]),
        "teacher": student.teacher.digest if student.teacher and request.compare else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": next(model.network.parameters()).device.type,
        "versions": {name: version(name) for name in ("dmd2", "torch")},
    }


FIELDS = (
    "package", "digest", "prompt", "seed", "images", "steps", "tiny_vae", "compare", "teacher_steps", "guidance",
)  # fmt: skip
"""What a link says."""


def link(drawing: Drawing) -> str:
    """`?package=...`: the address that repeats the drawing, relative to that of the page."""
    found = settings(drawing) | {"digest": drawing.student.digest[:16]}
    flags = {True: 1, False: 0}
    values = {name: found[name] for name in FIELDS if name in found}
    return "?" + urlencode({n: flags[v] if isinstance(v, bool) else v for n, v in values.items()})


def read_link(query: Mapping[str, str], students: Mapping[str, Student]) -> Settings:
    """The values of a link; empty for an address without any.

    Raises:
        Refused: It is the link of a package that is not served here.
    """
    values = {name: query[name] for name in FIELDS if name in query}
    if values:
        student = find_student(values.get("package", ""), students)
        if not student.digest.startswith(values.get("digest", "")):
            raise Refused(
                f"the link is of another {student.name} than the one that is served here ({student.digest[:16]}); its picture cannot be repeated"
            )
    return values


def find_student(name: Any, students: Mapping[str, Student]) -> Student:
    """The student of this name; the first one for an empty name."""
    if name in ("", None):
        return next(iter(students.values()))
    if not isinstance(name, str) or name not in students:
        raise Refused(f"package is none of those that are served here; known: {', '.join(students)}")
    return students[name]


def answer(drawing: Drawing) -> dict[str, Any]:
    """The answer of the HTTP API."""
    of_teacher = drawing.of_teacher
    return {
        "images": _data_uris(drawing.images.pixels),
        "teacher": _data_uris(of_teacher.pixels) if of_teacher else [],
        "seconds": drawing.images.seconds,
        "teacher_seconds": of_teacher.seconds if of_teacher else {},
        "settings": settings(drawing),
        "link": link(drawing),
        "note": drawing.note,
        "withheld": drawing.images.withheld,
    }


def page_of(drawing: Drawing) -> str:
    """The HTML of a drawing."""
    answered, what = answer(drawing), escape(str(drawing.request.prompt))
    said, rows = [_seconds("Student", drawing.images)], [_figures("Student", answered["images"], what)]
    if drawing.of_teacher:
        said.append(_seconds("Teacher", drawing.of_teacher))
        rows.append(_figures("Teacher", answered["teacher"], what))
    text = json.dumps(answered["settings"], indent=1)
    return f"""<div class="drawing">
<p role="status">{" ".join(said)} {escape(drawing.note)}</p>
{"".join(rows)}
<p><a href="{escape(answered["link"])}">Link that repeats this picture</a>
<a download="dmd2.png" href="{_picture(drawing, text)}">Download the picture</a>
<a download="dmd2.json" href="{_data_uri("application/json", text.encode())}">Download the settings</a></p>
</div>"""


def _figures(who: str, uris: list[str], what: str) -> str:
    images = "".join(
        f'<img alt="{who}, image {number} of {len(uris)}: {what}" src="{uri}">'
        for number, uri in enumerate(uris, 1)
    )
    return f"<figure><figcaption>{who}</figcaption><div>{images}</div></figure>"


def _seconds(who: str, images: Images) -> str:
    parts = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in images.seconds.items())
    return f"{who}: {len(images.pixels)} images in {sum(images.seconds.values()):.3f} s ({parts}), {images.per_second:.1f} images/s."


def _picture(drawing: Drawing, settings: str) -> str:
    """All images in one PNG, the teacher's below the student's; it contains the settings as the text `dmd2`."""
    pixels = [drawing.images.pixels, *([drawing.of_teacher.pixels] if drawing.of_teacher else [])]
    info = PngInfo()
    info.add_itxt("dmd2", settings)
    return _png(image_grid(torch.cat(pixels), len(pixels[0])), pnginfo=info)


def _data_uris(pixels: Tensor) -> list[str]:
    return [_png(image_grid(image[None], 1, border=0)) for image in pixels]


def _png(picture: Any, **more: Any) -> str:
    picture.save(buffer := io.BytesIO(), format="PNG", **more)
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
