"""Operators of state space models: one file an operator, its reference beside its fast paths."""

from recsys_ssm.ops.selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
)

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_step"]
