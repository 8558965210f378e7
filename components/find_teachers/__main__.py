"""`python -m components.find_teachers SETTINGS PAGE`: one look, as the component takes it, in JSON -> the ledger as a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from components.find_teachers.watch import retrained
from dmd2.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():
        Path(sys.argv[2]).write_text(retrained(**json.loads(sys.argv[1])))
