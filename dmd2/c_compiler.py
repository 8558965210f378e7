"""`dmd2-cc`: a C compiler from a Python package, for machines that have none, such as the containers of a training.

Triton compiles the C code that launches its kernels with the program that `CC` names. `ziglang` is Zig with the C compiler of LLVM and
the headers of libc, in one package that a lock can pin.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run the compiler with the arguments of this process, in its place."""
    found = find_spec("ziglang")
    if not found or not found.origin:
        sys.exit("dmd2-cc: the package ziglang is not installed; install it, or set CC to a C compiler")
    zig = str(Path(found.origin).with_name("zig"))
    os.execv(zig, [zig, "cc", *sys.argv[1:]])
