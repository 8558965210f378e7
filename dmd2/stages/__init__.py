"""The stages: each a function from folders to a folder, one verb of the command line, one component of the pipeline.

A stage that is called again with what it was already given returns at once; one that was interrupted continues.
"""

from __future__ import annotations

from dmd2.plan import plan as plan
from dmd2.stages.adopt import adopt as adopt
from dmd2.stages.distill import distill as distill
from dmd2.stages.encode import encode as encode
from dmd2.stages.encode import what_it_learns_from as what_it_learns_from
from dmd2.stages.evaluate import evaluate as evaluate
from dmd2.stages.gate import gate as gate
from dmd2.stages.package import package as package
from dmd2.stages.pairs import pairs as pairs
from dmd2.stages.publish import publish as publish
from dmd2.stages.report import report as report
from dmd2.stages.resolve import a_teacher as a_teacher
from dmd2.stages.resolve import resolve as resolve
from dmd2.stages.sample import sample as sample
from dmd2.stages.shard import shard as shard
from dmd2.stages.teach import teach as teach
