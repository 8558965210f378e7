"""Rendering: settings reach their places, no line of an overlay is idle, the image comes from images.lock."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmd2.errors import Refused
from images import pins
from manifests.__main__ import PLACEHOLDER, ROOT, main, overlays, render, with_image
from tests.manifests import policy

DIGEST = "europe-docker.pkg.dev/p/dmd2/dmd2:0.1.0@sha256:" + 64 * "a"
known = cache(render)
"""Of the manifests as they are."""
LISTS = ("resources", "components", "patches", "replacements")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path / "manifests"))


def _entries() -> Iterator[tuple[str, str, int]]:
    """Every entry of a list in the kustomizations of overlays and components."""
    for path in sorted(
        [*ROOT.glob("overlays/*/kustomization.yaml"), *ROOT.glob("components/*/kustomization.yaml")]
    ):
        held = yaml.safe_load(path.read_text())
        yield from (
            (str(path.relative_to(ROOT)), name, i) for name in LISTS for i in range(len(held.get(name, [])))
        )


def user(file: str) -> str:
    """An overlay that reads the file."""
    return Path(file).parent.name if file.startswith("overlays") else "gke-a3-high"


@pytest.mark.parametrize(("file", "name", "i"), list(_entries()))
def test_no_entry_of_a_kustomization_is_idle(copy: Path, file: str, name: str, i: int) -> None:
    held: dict[str, list[Any]] = yaml.safe_load((copy / file).read_text())
    before = known(user(file))
    del held[name][i]
    (copy / file).write_text(yaml.safe_dump(held))
    try:
        after = render(user(file), copy)
    except Refused:
        return  # something else needs it
    assert after != before


def test_every_overlay_is_another() -> None:
    for first, second in combinations(overlays(), 2):
        assert known(first) != known(second)


@pytest.mark.parametrize("overlay", overlays())
def test_the_settings_reach_every_place(copy: Path, overlay: str) -> None:
    values = {
        "my-bucket": "another-bucket",
        "my-project.iam": "another.iam",
        r"172\.1[68]\.[\d./]+": "203.0.113.7/32",
    }
    for path in copy.glob("overlays/*/settings.yaml"):
        text = path.read_text()
        for old, new in values.items():
            text = re.sub(old, new, text)
        path.write_text(text)
    found = render(overlay, copy)
    assert "gs://another-bucket/kfp" in found
    assert found.count("cidr: 203.0.113.7/32") == 2
    assert found.count("@another.iam.gserviceaccount.com") == (0 if overlay == "dev" else 4)
    assert not re.search(r"my-(bucket|project)|cidr: 172\.|cidr: 192\.0\.2|gs://unset|PROJECT", found)


@pytest.mark.parametrize("overlay", overlays())
def test_settings_are_not_applied(overlay: str) -> None:
    assert policy.names(list(yaml.safe_load_all(known(overlay))), "ConfigMap") == {"kfp-launcher"}


def test_a_pinned_image_takes_the_place_of_the_placeholder() -> None:
    before = known("gke-a3-high")
    after = with_image(before, DIGEST)
    assert before.count(PLACEHOLDER) == after.count(DIGEST) == 1
    assert PLACEHOLDER not in after


def test_an_image_without_a_digest_does_not() -> None:
    assert with_image(PLACEHOLDER, "dmd2:0.1.0") == PLACEHOLDER


def test_every_overlay_becomes_a_file(tmp_path: Path) -> None:
    main(tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == overlays()
    for path in (tmp_path / "out").iterdir():
        assert path.read_text() == with_image(known(path.stem), pins.reference("dmd2"))


def test_an_unknown_overlay_is_refused_in_one_sentence() -> None:
    with pytest.raises(Refused, match=r"'gke-a3-hihg' is no overlay; did you mean 'gke-a3-high'\?"):
        render("gke-a3-hihg")


def test_what_kustomize_says_is_passed_on(copy: Path) -> None:
    (copy / "base/runtime.yaml").unlink()
    with pytest.raises(Refused, match=r"refuses overlay dev: .*runtime\.yaml"):
        render("dev", copy)


def test_the_page_names_every_overlay_account_and_setting() -> None:
    page = (ROOT / "README.md").read_text()
    objects = list(yaml.safe_load_all(known("gke-a3-high")))
    accounts = policy.names(objects, "ServiceAccount") - {"default"}
    settings = yaml.safe_load((ROOT / "overlays/gke-a3-high/settings.yaml").read_text())["data"]
    for name in [*overlays(), *accounts, *settings]:
        assert f"`{name}`" in page, name
