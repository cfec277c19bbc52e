"""A command of the repository as a user calls it, in a process of its own."""

import os
import subprocess
import sys


def command(
    repository, *arguments, root=None, variable="DEEPLESION_ROOT", expect=0, timeout=300
) -> str:
    """What it prints; `variable` of its environment says where the data is, `root`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if root is not None:
        environment[variable] = str(root)
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == expect, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout + run.stderr
