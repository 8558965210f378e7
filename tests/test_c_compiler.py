"""The C compiler of the image: a program that runs another one, and what is asked of a compiler before it is relied on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.training.activation import builds_extensions

RUN = [sys.executable, "-c", "from dmd2.c_compiler import main; main()"]


def test_the_arguments_go_to_the_compiler_of_the_package(tmp_path: Path) -> None:
    package = tmp_path / "ziglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "zig").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    (package / "zig").chmod(0o755)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [*RUN, "a b.c", "-o", "c.so"], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["cc", "a b.c", "-o", "c.so"]
    assert done.returncode == 3


def test_without_the_package_it_says_what_to_do() -> None:
    pathless = "import sys; import dmd2.c_compiler as c; sys.path.clear(); c.main()"
    done = subprocess.run([sys.executable, "-c", pathless], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the package ziglang is not installed; install it, or set CC" in done.stderr


def test_a_compiler_is_one_that_builds_with_the_headers_of_python(tmp_path: Path) -> None:
    assert builds_extensions("gcc")
    assert not builds_extensions("false")
    assert not builds_extensions(str(tmp_path / "nowhere"))


def test_the_compiler_of_the_package_builds_with_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ziglang", reason="the group `compiler` is only in the image")
    for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), *sys.path]))
    program = tmp_path / "dmd2-cc"
    program.write_text(f"#!{sys.executable}\nfrom dmd2.c_compiler import main\nmain()\n")
    program.chmod(0o755)
    assert builds_extensions(str(program))
