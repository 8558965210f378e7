"""The number of processors of a container is its quota, not that of the node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dmd2.processors import usable_processors


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def tree(root: Path, groups: str, **files: str) -> Path:
    """A root with `proc/self/cgroup` and files of control groups; in a name `__` stands for `/`, and `cpu_` for `cpu.`."""
    named = {f"sys/fs/cgroup/{name.replace('__', '/')}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": groups, **named}.items():
        path = root / name.replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_limits_to_its_quota(tmp_path: Path) -> None:
    assert usable_processors(tree(tmp_path, "0::/\n", cpu_max="300000 100000\n")) == 3


def test_a_fraction_is_rounded_up(tmp_path: Path) -> None:
    assert usable_processors(tree(tmp_path, "0::/\n", cpu_max="150000 100000\n")) == 2
    assert usable_processors(tree(tmp_path, "0::/\n", cpu_max="10000 100000\n")) == 1


def test_the_group_above_limits_too(tmp_path: Path) -> None:
    root = tree(
        tmp_path, "0::/pods/one\n", pods__cpu_max="200000 100000\n", pods__one__cpu_max="max 100000\n"
    )
    assert usable_processors(root) == 2


def test_version_1_limits_to_its_quota(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct__pod__cpu_cfs_quota_us": "400000\n",
        "cpu,cpuacct__pod__cpu_cfs_period_us": "100000\n",
    }
    assert usable_processors(tree(tmp_path, "4:memory:/pod\n3:cpu,cpuacct:/pod\n", **files)) == 4


def test_version_1_of_a_container_that_does_not_see_the_path_of_its_group(tmp_path: Path) -> None:
    files = {"cpu__cpu_cfs_quota_us": "500000\n", "cpu__cpu_cfs_period_us": "100000\n"}
    assert usable_processors(tree(tmp_path, "3:cpu,cpuacct:/docker/0123\n", **files)) == 5


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", {"cpu_max": "max 100000\n"}),
        ("0::/\n", {"cpu_max": "1600000 100000\n"}),
        ("0::/\n", {}),
        ("3:cpu:/\n", {"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}),
        ("0::/\n", {"cpu_max": "nonsense"}),
    ],
)
def test_without_a_lower_quota_they_are_those_of_the_affinity(
    groups: str, files: dict[str, str], tmp_path: Path
) -> None:
    assert usable_processors(tree(tmp_path, groups, **files)) == 8


def test_without_control_groups_too(tmp_path: Path) -> None:
    assert usable_processors(tmp_path) == 8
