"""What several test files share: a small phantom, prepared once a session."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """Root of a prepared phantom DeepLesion of a few patients."""
    from deeplesion.phantom import make_phantom
    from deeplesion.prepare import prepare

    root = tmp_path_factory.mktemp("phantom") / "DeepLesion"
    make_phantom(root, patients=6, size=128, seed=3)
    prepare(root, workers=1)
    for split in ("train", "val", "test"):
        assert json.loads((root / f"annotations/{split}.json").read_text())["images"]
    return root
