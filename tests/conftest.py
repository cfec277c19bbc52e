"""What several test files share: a small phantom, prepared once a session."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """Root of a prepared phantom DeepLesion of a few patients."""
    from deeplesion.data.prepare import prepare
    from deeplesion.phantom.make import make_phantom

    root = tmp_path_factory.mktemp("phantom") / "DeepLesion"
    make_phantom(root, patients=6, size=128, seed=3)
    prepare(root, workers=1)
    for split in ("train", "val", "test"):
        assert json.loads((root / f"annotations/{split}.json").read_text())["images"]
    return root


@pytest.fixture(scope="session")
def cached_phantom(phantom, tmp_path_factory) -> Path:
    """A copy of the phantom with a slice cache, as tools/prepare_data.py --cache leaves it."""
    from deeplesion.data.slice_cache import fill_cache

    root = tmp_path_factory.mktemp("cached") / "DeepLesion"
    shutil.copytree(phantom, root)
    report = fill_cache(root, 7, workers=1)
    assert report.exit_code == 0 and report.written == report.slices > 20
    return root
