"""Rendering: settings reach their places, no line of an overlay is idle, the image comes from images.lock."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmd2.errors import Refused
from images import pins
from manifests.__main__ import (
    PLACEHOLDER,
    ROOT,
    overlays,
    pin,
    render,
    render_all,
    with_digests,
    without_digest,
)
from pipelines.pods import USES_HUB, USES_REGISTRY
from tests.manifests import policy
from tests.manifests.test_policies import take

DIGEST = "@sha256:" + 64 * "a"
known = cache(render)
"""Of the manifests as they are."""
LISTS = ("resources", "components", "patches", "replacements")
ALLOWING = {"hub": USES_HUB, "registry": USES_REGISTRY}
"""Components that a user adds, and that open the network: for the pods of which label."""
OPTIONAL = [
    *ALLOWING,
    "topology",
    "monitoring",
    "prometheus-operator",
    "reaper",
    "serving",
    "trainjob-status",
]


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


def test_a_component_lets_only_pods_of_its_label_reach_what_it_is_for(copy: Path) -> None:
    before = {policy.title(item) for item in yaml.safe_load_all(known("gke-a3-high"))}
    for component in ALLOWING:
        take(copy, "gke-a3-high", component)
    objects = list(yaml.safe_load_all(render("gke-a3-high", copy)))
    added = [item for item in objects if policy.title(item) not in before]
    assert [policy.title(item) for item in added] == [
        "NetworkPolicy/to-hub",
        "NetworkPolicy/to-registry",
    ]
    for item, label in zip(added, ALLOWING.values(), strict=True):
        assert item["spec"]["podSelector"] == {"matchLabels": {label: "true"}}
        assert item["spec"]["policyTypes"] == ["Egress"]
    assert set(policy.network(objects)) == {"NetworkPolicy/to-hub: the Internet"}


def user(file: str) -> str:
    """An overlay that reads the file."""
    return Path(file).parent.name if file.startswith("overlays") else "gke-a3-high"


@pytest.mark.parametrize(("file", "name", "i"), list(_entries()))
def test_no_entry_of_a_kustomization_is_idle(copy: Path, file: str, name: str, i: int) -> None:
    held: dict[str, list[Any]] = yaml.safe_load((copy / file).read_text())
    if Path(file).parent.name in OPTIONAL:
        take(copy, "gke-a3-high", Path(file).parent.name)
    before = render(user(file), copy)
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
        "my-project/dmd2/": "another-project/images/",
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


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """An images.lock in which every image has a digest."""
    lines = [f"{name}: {found.partition('@')[0]}{DIGEST}" for name, found in pins.pins().items()]
    (tmp_path / "images.lock").write_text("\n".join(lines))
    return tmp_path / "images.lock"


@pytest.mark.parametrize("overlay", overlays())
def test_with_every_image_pinned_no_tag_is_left(overlay: str, lock: Path) -> None:
    after = with_digests(known(overlay), lock)
    assert without_digest(known(overlay))
    assert not without_digest(after)
    assert PLACEHOLDER not in after
    assert after.count(pins.reference("dmd2", lock)) == 1


def test_an_image_without_a_digest_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "images.lock").write_text("dmd2: dmd2:0.1.0\n")
    text = f"- image: {PLACEHOLDER}\n  name: x\n  image: 'a/b:1'\n"
    assert with_digests(text, tmp_path / "images.lock") == text
    assert without_digest(text) == ["a/b:1", PLACEHOLDER]


def test_an_overlay_with_a_tag_is_refused_and_the_others_are_written(
    tmp_path: Path,
    lock: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock.write_text(re.sub(r"(gib: .*)@.*", r"\1", lock.read_text()))
    monkeypatch.setattr("manifests.__main__.with_digests", lambda text: with_digests(text, lock))
    out = tmp_path / "out"
    said = refusal(lambda: render_all(out=out))
    assert "images.lock has no digest for us-docker.pkg.dev/gce-ai-infra/gpudirect-gib" in said
    assert "in gke-a3-ultra; not written. Ask the registries with `make images-lock`" in said
    complete = [one for one in overlays() if one != "gke-a3-ultra"]
    assert capsys.readouterr().out.split() == [f"{out}/{one}.yaml" for one in complete]
    assert sorted(path.stem for path in out.iterdir()) == complete
    render_all(("gke-a3-ultra",), out, tags=True)
    assert capsys.readouterr().out.split() == [f"{out}/gke-a3-ultra.yaml"]
    for path in out.iterdir():
        assert path.read_text() == with_digests(known(path.stem), lock)


def test_one_overlay_is_rendered_though_another_lacks_a_digest(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.write_text(re.sub(r"(gib: .*)@.*", r"\1", lock.read_text()))
    monkeypatch.setattr("manifests.__main__.with_digests", lambda text: with_digests(text, lock))
    render_all(("dev",), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dev.yaml"]
    lock.write_text("dmd2: dmd2:0.1.0\n")
    with pytest.raises(Refused, match=r"images\.lock has no digest for dmd2 in dev; not written"):
        render_all(("dev",), tmp_path / "out")


def test_the_manifests_of_others_are_pinned_or_refused(
    lock: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refusal: Callable[..., str],
) -> None:
    monkeypatch.setattr("manifests.__main__.with_digests", lambda text: with_digests(text, lock))
    monkeypatch.setattr(
        "sys.stdin", StringIO('  - image: "gcr.io/google-containers/pause:2.0"\n    name: pause\n')
    )
    pin()
    assert f'image: "gcr.io/google-containers/pause:2.0{DIGEST}"\n' in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", StringIO("image: ubuntu\n"))
    assert "no digest for ubuntu in the standard input" in refusal(pin)


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
