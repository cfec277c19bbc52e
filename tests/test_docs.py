"""What the documents say can be run, runs, and gives what they say."""

import os
import re
import subprocess
import sys

import pytest

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def operators_page(repository):
    return (repository / "docs/operators.md").read_text()


@pytest.fixture(scope="module")
def folder(operators_page, repository, tmp_path_factory):
    """The page's files, beside the repository's configs."""
    folder = tmp_path_factory.mktemp("docs")
    for language, text in BLOCK.findall(operators_page):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", text)):
            (folder / name[1]).write_text(text)
    (folder / "configs").symlink_to(repository / "configs")
    return folder


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_an_operator_of_ones_own_runs_in_the_detector(folder, repository):
    printed = run(folder, repository / "tools/complexity.py", "neighbour_mean_3slice.py")
    assert re.search(r"NeighbourMeanConv, 3 x 512 x 512\nbackbone +40.64 GFLOPs", printed)


def test_an_operator_of_ones_own_is_what_it_says(folder):
    code = """
import torch
from neighbour_mean import NeighbourMeanConv
conv = NeighbourMeanConv(4, 3, 3, padding=1, strength=0.5)
x = torch.randn(2, 4, 3, 5, 5)
outside = torch.zeros(2, 4, 5, 5)
for d in range(3):
    below = x[:, :, d - 1] if d > 0 else outside
    above = x[:, :, d + 1] if d < 2 else outside
    mixed = x[:, :, d] + 0.5 * (below + above) / 2
    expected = torch.nn.functional.conv2d(mixed, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x)[:, :, d], expected)
conv(x).sum().backward()
assert conv.strength.grad is not None
"""
    run(folder, "-c", code)
    assert run(folder, "check.py") == ""


def test_the_converted_network_prints_what_the_page_shows(operators_page, folder):
    printed = run(folder, "convert.py").strip().splitlines()[-1]
    assert printed.startswith("[(2, 64, 7") and f"\n{printed}\n" in operators_page
