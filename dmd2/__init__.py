"""A diffusion teacher distilled into a one- or few-step student, with DMD2."""

import os

# Read when torch loads OpenMP. Its threads wait for each other by spinning; beside any other process they then spin away
# the very time that the thread they wait for needs. This many rounds cost an idle machine nothing.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Read when torch first takes memory of a GPU. Steps of different kinds (student's turn or not, length of the rollout) follow each
# other, and blocks that cannot grow leave gaps between them.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
