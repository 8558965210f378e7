"""What a page draws is what the library draws; what it is asked for is checked, in one sentence."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2 import stages
from dmd2.cli import run
from dmd2.io.artifact import read_manifest
from dmd2.model import load_network
from dmd2.serve.drawing import Student, draw
from dmd2.serve.request import MAX_SEED, Limits, Offer, check_request
from dmd2.serve.result import answer, find_student, link, page_of, read_link
from dmd2.serve.students import load_students, teacher_digest

Refusal = Callable[[Callable[[], object]], str]
LIMITS = Limits(images=8, prompt=100)
CLASSES, TEXTS = Offer(classes=3, steps=2), Offer(classes=0, steps=4, guidance=7.5)


@pytest.fixture(scope="module")
def students(made: Path) -> dict[str, Student]:
    run, teacher = str(made / "run"), str(made / "teacher")
    found = [(run, read_manifest(run, "run"))]
    return load_students(found, [(teacher, read_manifest(teacher, "teacher"))], "", torch.float32)


@pytest.fixture(scope="module")
def student(students: dict[str, Student]) -> Student:
    return students["edm-digits"]


def pixels(uri: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_the_images_are_those_of_the_library(student: Student, made: Path) -> None:
    values = {"prompt": "2", "seed": 5, "images": 3}
    drawing = draw(student, values, LIMITS)
    expected = load_network(made / "run").sample([2, 2, 2], seed=5)
    assert torch.equal(drawing.images.pixels, expected)
    for uri, image in zip(answer(drawing)["images"], expected, strict=True):
        assert np.array_equal(pixels(uri), image[0].numpy())
    assert drawing.images.seconds.keys() == {"text", "steps", "decode"}


def test_the_teacher_draws_from_the_same_noise_whatever_the_number_of_the_students_steps(
    student: Student, made: Path
) -> None:
    teacher = load_network(made / "teacher")
    values = {"prompt": 1, "seed": 4, "images": 2, "compare": True, "teacher_steps": 3}
    drawing = draw(student, values, LIMITS)
    assert drawing.of_teacher is not None
    assert torch.equal(drawing.of_teacher.pixels, teacher.sample_teacher([1, 1], seed=4, steps=3))
    two = replace(student, model=replace(student.model, timesteps=(999, 500)))
    seen: list[torch.Tensor] = []
    for network in (student.model.network, teacher.network):
        network.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    noisy = replace(two, teacher=replace(two.teacher, model=teacher)) if two.teacher else two
    draw(noisy, values, LIMITS)
    first_of_student, first_of_teacher = seen[0], seen[2]
    torch.testing.assert_close(
        first_of_student / first_of_student.std(), first_of_teacher / first_of_teacher.std()
    )


def test_a_student_takes_its_first_steps_and_progress_reaches_both(student: Student) -> None:
    two = replace(student, model=replace(student.model, timesteps=(999, 500)))
    seen: list[float] = []
    drawing = draw(two, {"prompt": 0, "compare": True, "teacher_steps": 2}, LIMITS, seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert 0.5 < seen[-1] < 1
    one = draw(two, {"prompt": 0, "steps": 1}, LIMITS)
    assert torch.equal(one.images.pixels, draw(student, {"prompt": 0}, LIMITS).images.pixels)
    assert not torch.equal(one.images.pixels, drawing.images.pixels)


def test_the_link_repeats_the_picture(students: dict[str, Student], student: Student) -> None:
    values = {"prompt": "1", "seed": MAX_SEED, "images": 2, "compare": True, "teacher_steps": 2}
    drawing = draw(student, values, LIMITS)
    query = dict(parse_qsl(link(drawing).removeprefix("?")))
    again = draw(find_student(query["package"], students), read_link(query, students), LIMITS)
    assert again.request == drawing.request
    first, second = answer(drawing), answer(again)
    for name in ("images", "teacher", "settings", "link"):
        assert first[name] == second[name]


def test_a_link_of_another_package_is_refused(students: dict[str, Student], refusal: Refusal) -> None:
    assert read_link({"__theme": "dark"}, students) == {}
    assert "its picture cannot be repeated" in refusal(
        lambda: read_link({"prompt": "1", "digest": 16 * "0"}, students)
    )
    assert "known: edm-digits" in refusal(lambda: read_link({"package": "../../etc/passwd"}, students))


def test_the_page_has_a_text_for_each_image_and_the_picture_has_its_settings(student: Student) -> None:
    drawing = draw(student, {"prompt": 1, "images": 2, "compare": True, "teacher_steps": 2}, LIMITS)
    html = page_of(drawing)
    assert re.findall('alt="([^"]*)"', html) == [
        f"{who}, image {number} of 2: 1" for who in ("Student", "Teacher") for number in (1, 2)
    ]
    (picture,) = re.findall('download="dmd2.png" href="[^,]*,([^"]*)"', html)
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert json.loads(image.text["dmd2"]) == answer(drawing)["settings"]  # type: ignore[attr-defined]
    assert image.size == (2 * 8 + 3, 2 * 8 + 3)


def test_html_in_a_prompt_stays_text(student: Student) -> None:
    evil = '"><script>alert(1)</script>'
    drawing = draw(student, {"prompt": 0}, LIMITS)
    html = page_of(replace(drawing, request=replace(drawing.request, prompt=evil), note=evil))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


HOSTILE: list[tuple[Offer, dict[str, Any], str]] = [
    (TEXTS, {"prompt": 10**6 * "x"}, "prompt has 1,000,000 characters; give at most 100"),
    (TEXTS, {"prompt": ["a", "list"]}, "prompt is ['a', 'list']; give a text"),
    (TEXTS, {"prompt": "\ud800"}, "prompt has half of a character"),
    (CLASSES, {"prompt": 10**6 * "9"}, "class is '999999999999...9999999999999'; give a number from 0 to 2"),
    (CLASSES, {"prompt": "<b>1</b>"}, "class is '<b>1</b>'; give a number from 0 to 2"),
    (CLASSES, {"prompt": "../../etc/passwd"}, "class is '../../etc/passwd'; give a number"),
    (CLASSES, {"prompt": 3}, "class is 3; give a number from 0 to 2"),
    (CLASSES, {"prompt": 1.5}, "class is 1.5; give a whole number from 0 to 2"),
    (CLASSES, {"prompt": True}, "class is True; give a number from 0 to 2"),
    (CLASSES, {}, "class is ''; give a number from 0 to 2"),
    (TEXTS, {"steps": 10**9}, "steps is 1000000000; give a number from 0 to 4"),
    (TEXTS, {"steps": -1}, "steps is -1; give a number from 0 to 4"),
    (TEXTS, {"steps": {"a": 1}}, "steps is {'a': 1}; give a number from 0 to 4"),
    (TEXTS, {"seed": 10**5000}, "seed is a number of thousands of digits; give a number from 0 to 4294967295"),
    (TEXTS, {"seed": 1e308}, "seed is 1e+308; give a number from 0 to 4294967295"),
    (TEXTS, {"images": 9}, "images is 9; give a number from 1 to 8"),
    (TEXTS, {"images": math.inf}, "images is inf; give a number from 1 to 8"),
    (TEXTS, {"guidance": math.nan}, "guidance is nan; give a number from 1 to 30"),
    (TEXTS, {"guidance": "NaN"}, "guidance is 'NaN'; give a number from 1 to 30"),
    (TEXTS, {"teacher_steps": 10**9}, "teacher_steps is 1000000000; give a number from 0 to 200"),
    (TEXTS, {"compare": True}, "the teacher of this package is not here"),
    (TEXTS, {"tiny_vae": "1"}, "there is no tiny VAE for this package"),
    (TEXTS, {"compare": "yes"}, "compare is 'yes'; give true or false"),
    (TEXTS, {"compare": []}, "compare is []; give true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("offer", "values", "said"), HOSTILE, ids=[said[:60] for *_, said in HOSTILE])
def test_what_is_not_allowed_is_refused_in_one_sentence(
    offer: Offer, values: dict[str, Any], said: str, refusal: Refusal
) -> None:
    sentence = refusal(lambda: check_request(values, offer, LIMITS))
    assert said in sentence
    assert len(sentence) < 200


def test_what_is_left_out_has_its_default() -> None:
    request = check_request({"prompt": None, "seed": "", "steps": 0.0}, TEXTS, LIMITS)
    assert (request.prompt, request.seed, request.images, request.steps) == ("", 0, 1, 4)
    assert (request.teacher_steps, request.guidance) == (30, 7.5)


def test_a_teacher_is_found_by_its_digest_and_two_packages_of_a_recipe_are_named_by_theirs(
    made: Path, student: Student, tmp_path: Path, refusal: Refusal
) -> None:
    out = tmp_path / "package"
    stages.package(str(made / "run"), str(made / "evaluation"), str(made / "gate"), str(out))
    package, digest = read_manifest(out, "package"), read_manifest(made / "teacher", "teacher").digest
    assert teacher_digest(str(out), package) == digest
    other = read_manifest(made / "teacher", "teacher").model_copy(update={"kind": "run"})
    said = refusal(lambda: load_students([(str(out), package)], [(str(made), other)], "", torch.float32))
    assert "is the teacher of none of the packages" in said
    run = read_manifest(made / "run", "run")
    both = load_students([(str(made / "run"), run), (str(out), package)], [], "", torch.float32)
    assert list(both) == [f"edm-digits {run.digest[:8]}", f"edm-digits {package.digest[:8]}"]
    assert find_student("", both).offer == student.offer._replace(has_teacher=False)


def test_the_command_refuses_what_it_cannot_serve(made: Path, refusal: Refusal) -> None:
    assert "package" in refusal(lambda: run(["serve"]))
    assert "a package or run folder is needed" in refusal(lambda: run(["serve", str(made / "teacher")]))
    assert "queue is 0" in refusal(lambda: run(["serve", str(made / "run"), "--queue", "0"]))


def test_verify_takes_the_package_as_a_word_or_a_flag(made: Path, refusal: Refusal) -> None:
    for words in ([str(made / "run")], ["--package", str(made / "run")]):
        assert "run" in refusal(lambda words=words: run(["verify", *words]))  # type: ignore[misc]
    assert "unrecognized" in refusal(lambda: run(["verify", "a", "b"])).lower()
