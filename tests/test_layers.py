"""Who may know whom: the science stays usable without the framework underneath."""

import subprocess
import sys

import pytest

BLOCKED = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ImportError(f'{{name}} is blocked')

sys.meta_path.insert(0, Refuse())
import {module}
"""
FRAMEWORK = {"mmengine", "mmcv", "mmdet"}


@pytest.mark.parametrize(
    "module, blocked",
    [
        *(
            (f"deeplesion.{name}", FRAMEWORK | {"torch"})
            for name in ("annotations", "slices", "recist", "phantom", "froc", "prepare")
        ),
        *(
            (f"deeplesion.{name}", FRAMEWORK | {"torch"})
            for name in ("evaluation", "columns", "average_precision", "tables", "published")
        ),
        *(
            (f"deeplesion.{name}", FRAMEWORK | {"torch"})
            for name in ("visualize", "report", "diameters", "slice_cache")
        ),
        ("deeplesion.annotation_file", FRAMEWORK | {"torch"}),
        ("mmdet_ext.ops", FRAMEWORK),
        # The core installs with torch and numpy alone.
        ("deeplesion.froc", FRAMEWORK | {"torch", "pandas", "cv2", "skimage", "matplotlib"}),
        *(
            (f"mmdet_ext.{name}", FRAMEWORK | {"pandas", "cv2", "skimage", "matplotlib"})
            for name in ("ops", "convert")
        ),
    ],
)
def test_module_imports_with_the_layers_above_blocked(module, blocked):
    code = BLOCKED.format(blocked=sorted(blocked), module=module)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
