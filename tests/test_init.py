"""Check that importing the package leaves the process as it is."""

import subprocess
import sys


def test_importing_the_package_changes_no_environment_variable_and_loads_no_torch() -> None:
    code = (
        "import os, sys; before = dict(os.environ);"
        "import recsys_ssm; assert 'torch' not in sys.modules, 'torch is loaded';"
        "import recsys_ssm.cli.threads; assert dict(os.environ) == before, 'environment changed'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
