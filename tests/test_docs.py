"""What the documents say can be run, runs, and gives what they say; what they name is there."""

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmdet_ext.config.experiment import config_name, find_config
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.study_plan import parsed

ROOT = Path(__file__).resolve().parent.parent
# The folders of a study's runs hold tables that its command wrote.
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "docs/study").glob("*.md"),
]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
# `$ python tools/NAME.py ...`, and the commands as pip installs them; groups: name, arguments.
COMMAND = re.compile(r"(?:\bpython tools/(\w+)\.py|^(deeplesion-[a-z-]+))(?= |$)(.*)")
# The scripts hand on to a tool what follows their own arguments, of which so many are not its.
SCRIPTS = {
    "dist_train": ("train", [1]),
    "dist_test": ("test", [2]),
    "slurm_train": ("train", [0, 1]),
}
SCRIPT = re.compile(r"\bscripts/(\w+)\.sh (.*)")
INSTALLED = runpy.run_path(str(ROOT / "tools/installed.py"))["COMMANDS"]


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
    (of_readme,) = re.findall(r"^```python\n(.*?NextSliceConv.*?)^```", README, re.M | re.S)
    (folder / "next_slice.py").write_text(of_readme.rpartition("```python\n")[2])
    (folder / "configs").symlink_to(repository / "configs")
    return folder


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.slow
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
from mmdet_ext.ops import check_operator
from next_slice import NextSliceConv
check_operator(NextSliceConv)
"""
    run(folder, "-c", code)
    assert run(folder, "check.py") == ""


def test_the_converted_network_prints_what_the_page_shows(operators_page, folder):
    printed = run(folder, "convert.py").strip().splitlines()[-1]
    assert printed.startswith("[(2, 64, 7") and f"\n{printed}\n" in operators_page


def prose(page):
    return BLOCK.sub("", page.read_text())


def anchors(page):
    """Those that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in (link for link in links if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """`configs/demo/lits.py` and the like; those that a page tells the reader to write apart."""
    folders = "benchmarks|configs|ct_volumes|deeplesion|docs|mmdet_ext|scripts|tests|tools"
    named = set(
        re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+\.(?:py|sh|md|json|png)", page.read_text())
    )
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing <= {"configs/neighbour_mean_3slice.py"}


def test_papers_to_cite_are_in_machine_readable_form_too():
    cited = [" ".join(t.split()) for t in re.findall(r"\*([^*]+?)\.\*", README.split("## Cite")[1])]
    file = (ROOT / "CITATION.cff").read_text()
    assert len(cited) == 6 and re.findall(r'^    title: "(.*)"$', file, re.M) == cited


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w/]+\.md)", README))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES[1:]}


def commands_of(text):
    """(tool, arguments) of every command in the code blocks; shell variables become 1."""
    for _, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line):
                tool, skipped, rest = match[1] or INSTALLED[match[2]], [], match[3]
            elif match := SCRIPT.search(line):
                (tool, skipped), rest = SCRIPTS[match[1]], match[2]
            else:
                continue
            arguments = shlex.split(re.sub(r"\$\w+", "1", rest), comments=True)
            yield tool, [a for k, a in enumerate(arguments) if k not in skipped]


class Parsed(BaseException):
    """Carries the options out of a command before it does anything."""


@pytest.fixture
def options_of(monkeypatch):
    def parse_args(parser, *_):
        options, unknown = parser.parse_known_args()
        assert not unknown, unknown
        raise Parsed(options)

    def parse(tool, arguments):
        main = importlib.import_module(f"tools.{tool}").main
        with monkeypatch.context() as patch, pytest.raises(Parsed) as carrier:
            patch.setattr(sys, "argv", [f"{tool}.py", *arguments])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            main()
        return carrier.value.args[0]

    return parse


def overridden(options):
    """(config, overrides) of a command's options, where they override an experiment that exists."""
    common = getattr(options, "cfg_options", None) or {}
    common = common if isinstance(common, dict) else parsed(common)
    configs = getattr(options, "configs", None) or [getattr(options, "config", None)]
    methods = [(str(config), common) for config in configs if config]
    for _, config, *own in getattr(options, "variant", []):
        methods.append((config, common | parsed(own)))
    for config, overrides in methods:
        if overrides and config not in PLACEHOLDERS:
            yield find_config(config), overrides


PLACEHOLDERS = {"CONFIG"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page, options_of, monkeypatch):
    """By the parser of each tool, and what they override in a config by the check of options."""
    monkeypatch.chdir(ROOT)
    methods = {}
    for tool, arguments in commands_of(page.read_text()):
        for config, overrides in overridden(options_of(tool, arguments)):
            methods[config, str(overrides)] = overrides
    for (config, _), overrides in methods.items():
        load_config(config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_weights_are_taken_from_where_training_leaves_them(page, options_of):
    """A folder of work_dirs is the config's own, or one that the page trains into."""
    calls = [(tool, options_of(tool, line)) for tool, line in commands_of(page.read_text())]
    chosen = [Path(o.work_dir) for tool, o in calls if tool == "train" and o.work_dir]
    for tool, options in calls:
        weights = Path(str(getattr(options, "checkpoint", None)))
        if tool == "train" or weights.parts[0] != "work_dirs" or options.config in PLACEHOLDERS:
            continue
        folder = Path("work_dirs", config_name(find_config(options.config)))
        assert {weights, weights.parent} & {folder, *chosen}, weights


def test_every_installed_command_is_on_the_page_of_training():
    page = (ROOT / "docs/training.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| (`deeplesion-.*?) \| (`tools/.*?) \|$", page, re.M)
    pairs = {}
    for commands, files in rows:
        names = re.findall(r"`(deeplesion-[a-z-]+)", commands)
        pairs |= dict(zip(names, re.findall(r"`tools/(\w+)\.py`", files), strict=True))
    assert pairs == INSTALLED and set(pairs) == set(project["scripts"])


def test_extras_that_are_named_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for page in PAGES:
        installed = re.findall(r"pip install[^`\n]*'[\w.-]+\[([\w,]+)\]'", page.read_text())
        assert {extra for each in installed for extra in each.split(",")} <= extras, page.name
    in_readme = re.findall(r"^\| `\[(\w+)\]` \|", README, re.M)
    assert set(in_readme) == extras


def test_versions_to_install_are_those_that_the_tests_run_on():
    pinned = set((ROOT / "requirements.txt").read_text().splitlines())
    named = {
        word
        for page in PAGES
        for line in page.read_text().splitlines()
        if line.strip().startswith("pip install")
        for word in shlex.split(line)
        if "==" in word
    }
    assert "opencv-python-headless" in {name.partition("==")[0] for name in named}
    assert named <= pinned
