"""The stages: each a function from folders to a folder, one verb of the command line, one component of the pipeline.

A stage that is called again with what it was already given returns at once; one that was interrupted continues.
"""

from __future__ import annotations

from dmd2.plan import plan as plan
from dmd2.stages.delivery import package as package
from dmd2.stages.delivery import publish as publish
from dmd2.stages.delivery import report as report
from dmd2.stages.judging import evaluate as evaluate
from dmd2.stages.judging import gate as gate
from dmd2.stages.judging import sample as sample
from dmd2.stages.samples import encode as encode
from dmd2.stages.samples import pairs as pairs
from dmd2.stages.samples import shard as shard
from dmd2.stages.samples import what_it_learns_from as what_it_learns_from
from dmd2.stages.teachers import a_teacher as a_teacher
from dmd2.stages.teachers import adopt as adopt
from dmd2.stages.teachers import resolve as resolve
from dmd2.stages.training import distill as distill
from dmd2.stages.training import teach as teach
