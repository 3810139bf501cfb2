"""Operators of state space models: one file for each, with its reference and its fast paths."""

from recsys_ssm.ops._choice import set_backend
from recsys_ssm.ops._dispatch import backends, describe_backends
from recsys_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step, same_conv1d
from recsys_ssm.ops.in_transformers import (
    transformers_kernels,
    undo_in_transformers,
    use_in_transformers,
)
from recsys_ssm.ops.rank_products import rank_products
from recsys_ssm.ops.selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
)
from recsys_ssm.ops.sequences import each_sequence, seq_idx_of, sequences_of
from recsys_ssm.ops.ssd import ssd, ssd_step
from recsys_ssm.ops.trapezoidal_ssd import rotate, trapezoidal_ssd

__all__ = [
    "backends",
    "causal_conv1d",
    "causal_conv1d_step",
    "describe_backends",
    "each_sequence",
    "rank_products",
    "rotate",
    "same_conv1d",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
    "seq_idx_of",
    "sequences_of",
    "set_backend",
    "ssd",
    "ssd_step",
    "transformers_kernels",
    "trapezoidal_ssd",
    "undo_in_transformers",
    "use_in_transformers",
]
