"""Disk of the pods, which is fixed when the pipeline is compiled: KFP knows no request for it that a run could set."""

TRAINING_DISK_GB = 500
"""1e9 bytes below /tmp of a training: checkpoints, cached shards, networks."""
