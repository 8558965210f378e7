"""`python -m components.find_teachers ARGUMENTS PAGE`: run the component with arguments in JSON; write the ledger as a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from components.find_teachers.watch import find_and_start
from dmd2.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():
        Path(sys.argv[2]).write_text(find_and_start(**json.loads(sys.argv[1])))
