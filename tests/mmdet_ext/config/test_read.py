"""Finding and reading a config, and reading --cfg-options: what is wrong is said with its place."""

import argparse
from pathlib import Path

import pytest

from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.experiment import MissingConfigError, config_folder, find_config, read_config
from mmdet_ext.config.overrides import Overrides

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_an_experiment_is_found_by_its_path_or_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # away from the repository
    assert config_folder() == CONFIGS
    for name in ("alignshift_7slice", "alignshift_7slice.py", "configs/alignshift_7slice.py"):
        assert find_config(name) == CONFIGS / "alignshift_7slice.py"
    for name in ("demo/alignshift_3slice", "released/a3d_3slice"):
        assert find_config(name) == CONFIGS / f"{name}.py"
    own = tmp_path / "alignshift_7slice.py"
    own.touch()
    assert find_config("alignshift_7slice.py") == Path("alignshift_7slice.py"), "the user's own"


def test_a_mistyped_name_is_answered_with_the_nearest():
    with pytest.raises(MissingConfigError, match=r"configs/alingshift_7slice\.py, .* did you mean "
                       "alignshift_7slice"):  # fmt: skip
        find_config("configs/alingshift_7slice.py")
    with pytest.raises(MissingConfigError, match=r"there are .*25d_3slice.* released/tsm_7slice"):
        find_config("zzz")


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = (", r"own\.py: .*never closed.*line 1"),
        ('_base_ = "../none.py"', r"own\.py: .*No such file.*none\.py"),
        ("a = 1\nb = c\n", r"own\.py, line 2: NameError: name 'c' is not defined"),
        ("a = 1\nraise RuntimeError('bad luck')", r"own\.py, line 2: RuntimeError: bad luck"),
        ("custom_imports = dict(imports=['my_part.op'])", "no module my_part. Its folder must"),
        ("custom_imports = dict(imports='mmdet_ext.none')", "no module mmdet_ext.none"),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_the_line(text, message, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(file)


@pytest.mark.parametrize(
    "name, variable",
    [
        ("demo/alignshift_3slice", "DEEPLESION_ROOT"),
        ("acs_volumes/lidc_seg_acs", "LIDC_ROOT"),
        ("acs_volumes/lits_acs", "LITS_ARRAYS"),
    ],
)
def test_a_variable_that_is_empty_is_named(name, variable, monkeypatch):
    monkeypatch.setenv(variable, "")
    with pytest.raises(
        ConfigError, match=f"the variable {variable}, which is set, but empty: give"
    ):
        read_config(find_config(name))
    monkeypatch.delenv(variable)
    read_config(find_config(name))


def test_a_module_that_is_there_and_lacks_something_is_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "part_that_lacks.py").write_text("import not_there_at_all\n")
    (tmp_path / "own.py").write_text("custom_imports = dict(imports=['part_that_lacks'])")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all") as error:
        read_config(tmp_path / "own.py")
    assert not isinstance(error.value, ConfigError)


@pytest.mark.parametrize("value", ["model", "=3", "", "a=(1,2", "a=[1,(2]", "a=[my file,b]"])
def test_an_override_that_cannot_be_read_is_named(value, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=Overrides)
    with pytest.raises(SystemExit):
        parser.parse_args(["--cfg-options", "a=1", value])
    error = capsys.readouterr().err
    assert f"argument --cfg-options: expected name=value, got {value!r}" in error or (
        f"argument --cfg-options: cannot read {value!r}" in error
    )


def test_overrides_add_up():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=Overrides)
    line = ["--cfg-options", "a=1", "b=(1,2)", "--cfg-options", "c=x=y"]
    assert parser.parse_args(line).cfg_options == {"a": 1, "b": (1, 2), "c": "x=y"}


@pytest.mark.parametrize(
    "typed, value",
    [
        ("/data/my run/epoch_3.pth", "/data/my run/epoch_3.pth"),
        ("'my run'", "my run"),
        (" 3", 3),
        ("None ", None),
        ("[1, 2]", [1, 2]),
        ("1, (2, a)", [1, (2, "a")]),
    ],
)
def test_a_value_keeps_its_spaces(typed, value):
    """Failed before: /data/myrun/epoch_3.pth was looked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=Overrides)
    assert parser.parse_args(["--cfg-options", f"load_from={typed}"]).cfg_options == {
        "load_from": value
    }
