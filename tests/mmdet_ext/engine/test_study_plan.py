"""The methods of a command line, and what their fingerprints depend on."""

import ast
import copy
import hashlib
import importlib.util
import json
import shutil
import sys

import pytest

from deeplesion.data.slices import SliceFolder
from deeplesion.errors import MissingDataError, UserError
from mmdet_ext.config.experiment import find_config, read_experiment
from mmdet_ext.config.overrides import apply_overrides
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.study_plan import (
    _without_words,
    besides_operators,
    check_methods,
    code_hashes,
    methods_of,
    modules_of,
    parsed,
    with_fingerprints,
)

DEMO = "configs/demo/nofusion_3slice.py"


def test_methods_are_called_as_their_files_or_as_one_says():
    found = methods_of(
        ["configs/demo/a.py", "configs/b.py", "b/a.py"],
        [["thick", "b", "stack.policy=keep_thick"], ["plain", "b"]],
        ["x=1"],
    )
    assert [m.name for m in found] == ["configs/demo/a", "b", "b/a", "thick", "plain"]
    assert [m.config for m in found] == ["configs/demo/a.py", "configs/b.py", "b/a.py", "b", "b"]
    # A variant's own options come last: they go over the common ones.
    assert [m.options for m in found[2:4]] == [("x=1",), ("x=1", "stack.policy=keep_thick")]


@pytest.mark.parametrize(
    "configs, variants, message",
    [
        ([], [], "give at least one CONFIG"),
        (["a.py"], [["a", "b.py"]], "two methods are called a"),
        (["a.py", "a.py"], [], "two methods are called a"),
        ([], [["thick"]], "NAME CONFIG"),
        ([], [["b.py", "stack.policy=keep_thick"]], "NAME CONFIG"),
        ([], [["a\nb", "b.py"]], "cannot be called"),
    ],
)
def test_what_is_no_method_is_refused(configs, variants, message):
    with pytest.raises(UserError, match=message):
        methods_of(configs, variants, [])


def test_options_are_read_as_the_commands_read_them():
    assert parsed(["a.b=(1,1)", "c=keep", "d=None", "a.b=2"]) == {"a.b": 2, "c": "keep", "d": None}
    assert parsed([]) == {}
    with pytest.raises(UserError, match="name=value"):
        parsed(["a"])


@pytest.fixture(scope="module")
def demo(repository):
    return load_config(str(repository / DEMO))


@pytest.fixture
def fingerprints(demo, repository, phantom):
    """Of the demo's config with options, on a phantom."""
    code = code_hashes(modules_of(demo), repository / "tools")

    def of(*options, root=phantom):
        config = copy.deepcopy(demo)
        for split in ("train", "val", "test"):
            config[f"{split}_dataloader"].dataset.data_root = str(root)
        apply_overrides(config, parsed(options))
        (method,) = methods_of([DEMO], [], options)
        return with_fingerprints(method, config, code)

    return of


def changed(one, other):
    """'training config' and the like: the parts in which two methods differ."""
    return {
        f"{name} {part}"
        for name in ("training", "test")
        for part in ("config", "code", "data")
        if getattr(one, name)[part] != getattr(other, name)[part]
    }


def test_a_fingerprint_is_of_what_is_done(fingerprints, phantom, tmp_path):
    plain = fingerprints()
    assert plain.images == (str(phantom / "Images_png"),)
    for options, parts in {
        ("stack.policy=keep_thick",): {"training config", "test config"},
        ("optim_wrapper.optimizer.lr=1e-3",): {"training config"},
        ("test_dataloader.dataset.ann_file=annotations/val.json",): {"test data"},
        ("test_evaluator.iou_threshold=0.3",): {"test config"},
        ("randomness.seed=3",): set(),
        ("log_level=ERROR", "visualizer.vis_backends=[]"): set(),
        ("default_hooks.logger.interval=7", "default_hooks.run_check.reference=None"): set(),
        ("train_dataloader.num_workers=0", "test_dataloader.num_workers=1"): set(),
        ("val_dataloader.persistent_workers=False", "train_dataloader.pin_memory=True"): set(),
        ("train_dataloader.batch_size=2",): {"training config"},
        ("stack.target_mm=2",): set(),
        ("stack.target_mm=2.5",): {"training config", "test config"},
        ("test_dataloader.dataset.data_prefix.img=Images_denoised",): {"test config"},
        ("train_dataloader.dataset.cache=/fast/slice_cache",): set(),
        ("train_dataloader.dataset.cache=None",): set(),
        tuple(
            f"{s}_dataloader.dataset.data_prefix.img={phantom}/Images_png"
            for s in ("train", "val", "test")
        ): set(),
    }.items():
        assert changed(plain, fingerprints(*options)) == parts, options

    moved = tmp_path / "moved"
    shutil.copytree(phantom / "annotations", moved / "annotations")
    there = fingerprints(root=moved)
    assert changed(plain, there) == set() and there.images == ()
    file = moved / "annotations/train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    assert changed(plain, fingerprints(root=moved)) == {"training data"}
    file.unlink()
    with pytest.raises(MissingDataError, match=r"train\.json.*prepare_data"):
        fingerprints(root=moved)


def annotations_with(root, phantom, images):
    """The phantom's annotations elsewhere, with the folders in which its series are said to lie;
    None: nothing is said of them."""
    for file in (phantom / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        content["info"]["images"] = images
        if images is None:
            del content["info"]["images"]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / file.name).write_text(json.dumps(content, separators=(",", ":")))
    return root


def test_the_data_is_the_same_wherever_its_series_lie(fingerprints, phantom, tmp_path):
    plain = fingerprints()
    for i, images in enumerate((["/share/a b/Images_png"], ["Images_png", 'x/"\\]ä', "y"])):
        root = annotations_with(tmp_path / str(i), phantom, images)
        assert changed(plain, fingerprints(root=root)) == set()
        file = root / "annotations/test.json"
        file.write_text(file.read_text().replace("thickness_mm", "thickness"))
        assert changed(plain, fingerprints(root=root)) == {"test data"}
    # Finished runs are known by the plain hashes of files that say nothing, or the usual.
    for i, images in enumerate((None, ["Images_png"])):
        root = annotations_with(tmp_path / f"plain{i}", phantom, images)
        content = (root / "annotations/test.json").read_bytes()
        of = {".test_dataloader.dataset.ann_file": hashlib.sha256(content).hexdigest()[:16]}
        expected = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
        assert fingerprints(root=root).test["data"] == expected


def test_the_slices_of_the_test_are_looked_for_where_they_were_found(
    fingerprints, phantom, tmp_path
):
    """Archives are unpacked in many ways, which `prepare` records."""
    root = annotations_with(tmp_path / "data", phantom, ["Images_png", "part/Images_png", "gone"])
    for i, series in enumerate(sorted((phantom / "Images_png").iterdir())):
        shutil.copytree(series, root / ("part" * (i % 2)) / "Images_png" / series.name)
    found = fingerprints(root=root).images
    assert found == (str(root / "Images_png"), str(root / "part/Images_png"))
    images = json.loads((root / "annotations/test.json").read_text())["images"]
    assert len({image["file_name"].partition("/")[0] for image in images}) > 1
    assert all(SliceFolder(*found).path(image["file_name"]).is_file() for image in images)


def test_of_several_annotation_files_the_contents_count_too(fingerprints, phantom, tmp_path):
    both = 'train_dataloader.dataset.ann_file=["annotations/train.json","annotations/test.json"]'
    plain = fingerprints(both)
    assert changed(plain, fingerprints()) == {"training data"}
    moved = tmp_path / "moved"
    shutil.copytree(phantom / "annotations", moved / "annotations")
    assert changed(plain, fingerprints(both, root=moved)) == set()
    second = moved / "annotations/test.json"
    second.write_text(second.read_text() + "\n")
    assert changed(plain, fingerprints(both, root=moved)) == {"training data", "test data"}
    second.unlink()
    with pytest.raises(MissingDataError, match=r"test\.json.*prepare_data"):
        fingerprints(both, root=moved)


def test_weights_that_training_starts_from_count_by_their_content(fingerprints, tmp_path):
    found = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        found.append(fingerprints(f"load_from={tmp_path / name}"))
    assert changed(found[0], found[1]) == set()
    assert changed(found[0], found[2]) == {"training data"}


@pytest.mark.parametrize(
    "option, more",
    [
        ("load_from", ()),
        ("model.backbone.init_cfg.checkpoint", ("model.backbone.init_cfg.type=Pretrained",)),
    ],
)
def test_weights_are_a_file_that_is_there_or_are_fetched(
    fingerprints, tmp_path, monkeypatch, option, more
):
    missing = rf"nofusion_3slice: there is no .*none\.pth, which {option} names"
    with pytest.raises(MissingDataError, match=missing):
        fingerprints(*more, f"{option}={tmp_path / 'none.pth'}")
    for name in ("https://example.org/weights.pth", "torchvision://densenet121"):
        fingerprints(*more, f"{option}={name}")
    # One's own folder is looked into, as it is in loading.
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    for content in (b"1", b"2"):
        (tmp_path / "w.pth").write_bytes(content)
        found += [fingerprints(*more, f"{option}={place}/w.pth") for place in ("~", tmp_path)]
    assert changed(found[0], found[1]) == set()
    assert changed(found[0], found[2]) == {"training data"}


def test_two_methods_that_nothing_tells_apart_are_refused(fingerprints):
    one, other = fingerprints(), fingerprints("stack.num_slices=3")
    with pytest.raises(UserError, match="are the same"):
        check_methods([one, other])
    check_methods([one, fingerprints("stack.num_slices=5")])


def test_code_is_what_the_imports_reach_without_words_and_layout(tmp_path, monkeypatch):
    """A package of one's own, as `custom_imports` names one."""
    package, tools = tmp_path / "own_parts", tmp_path / "tools"
    package.mkdir()
    tools.mkdir()
    (package / "__init__.py").write_text("")
    (package / "operator.py").write_text(
        "from .helper import add\n\ndef run(x):\n    return add(x)\n"
    )
    (package / "helper.py").write_text("def add(x):\n    return x + 1\n")
    (package / "other.py").write_text("y = 1\n")
    for name in ("train.py", "test.py"):
        (tools / name).write_text("pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def now():
        code_hashes.cache_clear()
        return code_hashes(frozenset({"own_parts.operator", "torch.nn"}), tools)

    first = now()
    (package / "other.py").write_text("y = 2\n")
    (package / "helper.py").write_text(
        '"""Adds."""\n# One.\ndef add(x):\n    """One more."""\n    return (x +\n            1)\n'
    )
    assert now() == first
    (package / "helper.py").write_text("def add(x):\n    return x + 2\n")
    second = now()
    assert second != first
    (package / "__init__.py").write_text("import os\n")
    third = now()
    assert all(third[of] != second[of] != first[of] for of in ("training", "test"))
    # A command is of its own step alone.
    (tools / "test.py").write_text("pass\npass\n")
    fourth = now()
    assert fourth["training"] == third["training"] and fourth["test"] != third["test"]


def test_what_lies_beside_ones_own_file_counts_if_it_is_imported(tmp_path, monkeypatch):
    """A single file needs no package: PYTHONPATH names its folder."""
    own, installed = tmp_path / "own", tmp_path / "site-packages"
    for folder in (own, installed):
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))
    for name in ("train.py", "test.py"):
        (tmp_path / name).write_text("pass\n")
    (own / "lone_operator.py").write_text("import sys\nfrom lone_helper import add\n")
    (own / "lone_helper.py").write_text("from lone_library import one\nimport lone_further.part\n")
    (own / "lone_further").mkdir()
    (own / "lone_further/part.py").write_text("x = 1\n")
    (own / "lone_other.py").write_text("x = 1\n")
    (installed / "lone_library.py").write_text("import lone_installed\none = 1\n")
    (installed / "lone_installed.py").write_text("x = 1\n")

    def after(file, text="x = 2\n", of="lone_operator"):
        file.write_text(file.read_text() + text)
        code_hashes.cache_clear()
        return code_hashes(frozenset({of, "torch.nn"}), tmp_path)["training"]

    first = after(own / "lone_operator.py", "")
    assert after(own / "lone_other.py") == after(installed / "lone_library.py") == first
    assert first != (second := after(own / "lone_helper.py"))
    assert second != after(own / "lone_further/part.py")
    # Of an installed part its own package counts alone.
    before = after(installed / "lone_library.py", "", "lone_library")
    assert after(installed / "lone_installed.py", of="lone_library") == before
    assert after(installed / "lone_library.py", of="lone_library") != before
    for name in [name for name in sys.modules if name.startswith("lone_")]:
        del sys.modules[name]


def test_the_package_of_ones_own_part_counts_if_nothing_imports_it(tmp_path, monkeypatch):
    package = tmp_path / "lone_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "operator.py").write_text("import torch\n")
    for name in ("train.py", "test.py"):
        (tmp_path / name).write_text("pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for content in ("", "import torch\ntorch.set_num_threads(1)\n"):
        (package / "__init__.py").write_text(content)
        code_hashes.cache_clear()
        found.append(code_hashes(frozenset({"lone_parts.operator"}), tmp_path))
    assert found[0] != found[1]


def test_code_is_the_same_for_every_version_of_python():
    """Later ones write more of a syntax tree, or less."""
    code = "class A(B):\n    'Doc.'\n    def f(self, x=1):\n        return f'{x!r:>{x}} a'\n"
    text = _without_words(ast.parse(code))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a9fd5294a2a3a25e"


def test_the_code_of_a_run_holds_its_operator_and_no_reports_phantoms_or_studies(
    repository, monkeypatch
):
    looked_at = []
    find_spec = importlib.util.find_spec

    def recorded(name, *more):
        looked_at.append(name)
        return find_spec(name, *more)

    modules = modules_of(load_config(str(repository / "configs/demo/alignshift_3slice.py")))
    monkeypatch.setattr(importlib.util, "find_spec", recorded)
    code_hashes.cache_clear()
    code_hashes(modules, repository / "tools")
    reached = set(looked_at)
    for name in (
        "mmdet_ext.ops.alignshift",
        "mmdet_ext.ops.slice_conv",
        "mmdet_ext.models.densenet",
        "mmdet_ext.engine.loop",
        "deeplesion.data.slices",
        "deeplesion.evaluation.froc",
    ):
        assert name in reached
    for room in ("deeplesion.report", "deeplesion.phantom", "mmdet_ext.engine.study", "mmengine"):
        assert not [name for name in reached if name.startswith(room)]
    assert "mmdet_ext.ops.a3d" not in reached, "an operator that the config does not name"


KEPT, AT_2 = "stack.policy=keep_thick", "stack.policy=normalize"
OTHERS = "param_scheduler.1.milestones=9,16"  # as the documents give it
NONE, ALIGN = "demo/nofusion_3slice", "demo/alignshift_3slice"


@pytest.mark.parametrize(
    "variants, said",
    [
        (  # operator and policy differ together
            [("none", NONE), ("align", ALIGN)],
            "stack.policy=normalize in 'none'; stack.policy=keep_thick in 'align'",
        ),
        (
            [("none", NONE), ("none, kept", NONE, KEPT), ("align", ALIGN)],
            "stack.policy=normalize in 'none'; stack.policy=keep_thick in 'none, kept', 'align'",
        ),
        (
            [("align", ALIGN), ("wide", NONE, "stack.target_mm=6")],
            "stack.policy=keep_thick, stack.target_mm=2.0 in 'align'; "
            "stack.policy=normalize, stack.target_mm=6 in 'wide'",
        ),
        ([("none", NONE, KEPT), ("align", ALIGN)], None),  # the operator alone
        ([("none", NONE), ("none, kept", NONE, KEPT)], None),  # the policy alone
        (  # crossed
            [("none", NONE), ("none, kept", NONE, KEPT), ("align", ALIGN), ("a", ALIGN, AT_2)],
            None,
        ),
        ([("shapes", "acs_volumes/shapes_acs"), ("3D", "acs_volumes/shapes_i3d")], None),
        (  # the schedule differs with the operator
            [("none", "nofusion_3slice"), ("acs", "acs_3slice"), ("a3d", "a3d_3slice")],
            "param_scheduler.1.milestones=[9, 16] in 'none', 'a3d'; "
            "param_scheduler.1.milestones=[10, 13] in 'acs'",
        ),
        (
            [("none", NONE), ("align", ALIGN, AT_2, "train_cfg.max_epochs=5")],
            "train_cfg.max_epochs=10 in 'none'; train_cfg.max_epochs=5 in 'align'",
        ),
        ([("none", "nofusion_3slice"), ("acs", "acs_3slice", OTHERS)], None),
        ([("acs", "acs_3slice"), ("acs, later", "acs_3slice", OTHERS)], None),
    ],
)
def test_methods_that_are_given_other_slices_are_named(variants, said):
    configs = []
    for _, config, *options in variants:
        configs.append(read_experiment(find_config(config)))
        apply_overrides(configs[-1], parsed(options))
    notes = besides_operators(methods_of([], variants, []), configs)
    what = "schedule" if said and "stack" not in said else "slices"
    assert notes == [f"note: the methods differ in their {what} too, not in the operator alone: "
                     f"{said}"] * (said is not None)  # fmt: skip
