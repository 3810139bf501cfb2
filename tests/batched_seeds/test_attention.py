"""Check who changes PyTorch's own vmap rules: only models of several seeds."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch

def has_rule():
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched")

before = has_rule()
import recsys_ssm, recsys_ssm.ops, recsys_ssm.models.two_tower, recsys_ssm.batched_seeds.train
assert has_rule() == before, "importing the package registered a rule"
from recsys_ssm.batched_seeds.attention import register_attention_rule
register_attention_rule()
register_attention_rule()
assert has_rule()
"""


def test_imports_leave_pytorchs_rules_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_does_not_import_batched_seeds() -> None:
    code = (
        "import sys, recsys_ssm.train, recsys_ssm.report;"
        "assert not [name for name in sys.modules if 'batched_seeds' in name]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
