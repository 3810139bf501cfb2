"""The page on next-item recommendation does what it says, beginning with a file of one's own."""

import os
import re
import shlex
import subprocess
import sys

QUICK = "trainer.max_epochs=1 trainer.enable_progress_bar=false backbone.d_model=16 logger=none"


def test_the_commands_of_the_page_run_as_written(repository, tmp_path):
    page = (repository / "docs" / "next_item.md").read_text()
    _, own = page.split("## Your own file")
    script = ["set -e", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}']
    for number, (kind, code) in enumerate(
        re.findall(r"```(bash|python)\n(.*?)```", own, re.DOTALL)
    ):
        if kind == "python":
            (tmp_path / f"page{number}.py").write_text(code)
            code = f"python page{number}.py"
        script.append(code.replace("trainer.max_epochs=3", QUICK))
    assert sum("max_epochs=1" in code for code in script) == 1
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=os.environ | {"RECSYS_SSM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "top.csv").read_text().startswith("user,rank,item,score")
    assert "1,492 rows, 200 users, 40 items" in done.stdout
