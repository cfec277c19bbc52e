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


def test_the_operator_page_shows_what_the_complexity_tool_prints(operators_page, repository):
    paths = [f"configs/{name}_{d}slice.py" for d in (3, 7) for name in names(operators_page)]
    printed = subprocess.run(
        [sys.executable, "tools/complexity.py", "configs/alignshift_3slice.py", *paths],
        cwd=repository, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    shown = re.search(r"^\$ python tools/complexity.py .*?\n(.*?)^```", operators_page, re.M | re.S)
    assert shown[1] in printed
    backbones = re.findall(r"^backbone +(\S+) GFLOPs.*?(\S+) M parameters", printed, re.M)[1:]
    for row, three, seven in zip(rows(operators_page), backbones, backbones[len(backbones) // 2 :]):
        assert row[5:7] == [three[0], seven[0]]
        expected = {three[1], seven[1]}
        assert set(re.findall(r"\d+\.\d\d", row[4])) == expected, row[0]


def rows(page):
    table = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]


def names(page):
    return [row[1].strip("`") for row in rows(page)]
