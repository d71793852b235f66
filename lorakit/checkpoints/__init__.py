"""Whole checkpoints by their names, one tensor in memory at a time: merge an adapter in, or extract one."""
