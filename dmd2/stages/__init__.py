"""The stages: each is a function that reads artifacts and writes one, a verb of the command line and a component of the pipeline.

A stage whose output is already there, made from the same inputs, returns at once; an interrupted one continues. Importing
this package is cheap: a stage imports torch and the rest of the library when it is called, after it has checked its inputs.
"""

from __future__ import annotations

from dmd2.plan import plan as plan
from dmd2.stages.adopt import adopt as adopt
from dmd2.stages.alias import alias as alias
from dmd2.stages.convert import convert as convert
from dmd2.stages.distill import distill as distill
from dmd2.stages.encode import encode as encode
from dmd2.stages.encode import encode_if_needed as encode_if_needed
from dmd2.stages.evaluate import evaluate as evaluate
from dmd2.stages.gate import gate as gate
from dmd2.stages.mirror import mirror as mirror
from dmd2.stages.package import package as package
from dmd2.stages.pairs import pairs as pairs
from dmd2.stages.publish import publish as publish
from dmd2.stages.report import report as report
from dmd2.stages.resolve import resolve as resolve
from dmd2.stages.resolve import resolve_or_teach as resolve_or_teach
from dmd2.stages.sample import sample as sample
from dmd2.stages.serve import serve as serve
from dmd2.stages.shard import shard as shard
from dmd2.stages.teach import teach as teach
from dmd2.stages.verify import verify as verify
