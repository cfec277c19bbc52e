"""Several processes: the launch scripts, a step of two against its two halves computed alone, and
how a run ends when one of its processes does."""

import copy
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.engine.distributed import (
    DataParallelDetector,
    images_per_process,
    join_processes,
    settle_learning_rate,
    slurm_variables,
)

DEMO = "configs/demo/alignshift_3slice.py"
LR, DECAY = 0.02, 1e-4
# A step of plain SGD: its change of the weights is linear in the gradients. With checkpointing, as
# in the experiments: DDP averages gradients while forward passes are computed again.
PROBED = f"""
_base_ = "{{demo}}"
custom_imports = dict(imports=[*_base_.custom_imports.imports, "step_probe"])
custom_hooks = [dict(type="StepProbe", folder="{{folder}}")]
model = dict(backbone=dict(with_cp=True))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
auto_scale_lr = dict(base_batch_size=2)
optim_wrapper = dict(
    _delete_=True, type="OptimWrapper",
    optimizer=dict(type="SGD", lr={LR}, momentum=0.9, weight_decay={DECAY}),
)
param_scheduler = []
visualizer = dict(vis_backends=[dict(type="LocalVisBackend")])
"""


def script(repository, name, *arguments, **variables):
    return subprocess.run(
        [repository / "scripts" / name, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=150,  # none of these may hang
    )


# The scripts


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("dist_train.sh", [], "usage: scripts/dist_train.sh CONFIG GPUS"),
        ("dist_train.sh", [DEMO], "usage: scripts/dist_train.sh CONFIG GPUS"),
        ("dist_train.sh", [DEMO, "two"], "GPUS must be a whole number of at least 1, got 'two'"),
        ("dist_train.sh", [DEMO, 0], "GPUS must be a whole number of at least 1, got '0'"),
        ("dist_test.sh", [DEMO, 2], "usage: scripts/dist_test.sh CONFIG CHECKPOINT GPUS"),
        ("dist_test.sh", [DEMO, "none.pth", 2], "no checkpoint none.pth"),
        ("slurm_train.sh", ["gpu", DEMO], "usage: scripts/slurm_train.sh PARTITION JOB CONFIG"),
    ],
)
def test_scripts_say_what_they_take(repository, monkeypatch, name, arguments, said):
    monkeypatch.chdir(repository)
    run = script(repository, name, *arguments)
    assert run.returncode == 2 and said in run.stderr


@pytest.fixture
def recorder(tmp_path):
    """A program that prints its arguments, one a line, and a folder that is on PATH."""
    for name in ("python", "srun"):
        program = tmp_path / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        program.chmod(0o755)
    return tmp_path


def test_dist_train_hands_options_over_and_takes_a_free_port(repository, recorder):
    options = ["--work-dir", "a folder", "--cfg-options", "a.b=1", "c=2"]
    config = repository / DEMO
    run = script(
        repository, "dist_train.sh", config, 4, *options, PYTHON=str(recorder / "python")
    )  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--nnodes", "1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "4"]
    command = [f"{repository}/tools/train.py", f"{config}", *options, "--launcher", "pytorch"]
    assert run.stdout.splitlines() == launch + command


def test_an_experiment_may_be_named_as_to_the_commands(repository, recorder):
    python, name, found = str(recorder / "python"), "demo/alignshift_3slice", recorder / "run"
    found.mkdir()
    path = f"{recorder}:{os.environ['PATH']}"
    for call in (
        ["dist_train.sh", name, 2],
        ["dist_test.sh", name, found, 2],
        ["slurm_train.sh", "gpu", "job", name],
    ):
        run = script(repository, *call, PYTHON=python, PATH=path)
        assert run.returncode == 0 and name in run.stdout.splitlines(), run.stderr


def test_dist_train_on_several_nodes(repository, recorder):
    python, config = str(recorder / "python"), repository / DEMO
    node = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="node0", PORT="1234", PYTHON=python)
    given = script(repository, "dist_train.sh", config, 8, **node).stdout.splitlines()
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node0", "--master-port", "1234"]
    assert given[2:12] == [*nodes, "--nproc-per-node", "8"]
    run = script(repository, "dist_train.sh", config, 8, NNODES="2", PYTHON=python)
    assert run.returncode != 0 and "NODE_RANK" in run.stderr


def test_slurm_train_asks_for_a_process_a_gpu(repository, recorder):
    config = repository / DEMO
    path = f"{recorder}:{os.environ['PATH']}"
    more = dict(PATH=path, GPUS="16", SRUN_ARGS="--time=2-0  --mem=64G", CPUS_PER_TASK="7")
    run = script(repository, "slurm_train.sh", "gpu", "my job", config, "--amp", **more)
    assert run.stdout.splitlines() == [
        "--partition=gpu", "--job-name=my job", "--ntasks=16", "--ntasks-per-node=8",
        "--gres=gpu:8", "--cpus-per-task=7", "--kill-on-bad-exit=1", "--time=2-0", "--mem=64G",
        f"{repository}/scripts/python.sh", "-u", f"{repository}/tools/train.py", f"{config}",
        "--amp", "--launcher", "slurm",
    ]  # fmt: skip
    run = script(repository, "slurm_train.sh", "gpu", "job", config, PATH=path, GPUS="2")
    assert {"--ntasks=2", "--ntasks-per-node=2", "--gres=gpu:2"} <= set(run.stdout.splitlines())


# Joining


def test_slurm_names_process_node_and_port():
    given = dict(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NTASKS="8", SLURM_JOB_ID="123456")
    expected = dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", MASTER_ADDR="n0")
    expected["LOCAL_WORLD_SIZE"] = "1"  # as far as is known
    variables = slurm_variables({**given, "MASTER_ADDR": "n0"})
    assert variables == {**expected, "MASTER_PORT": "18456"}
    variables = slurm_variables({**given, "MASTER_ADDR": "n0", "MASTER_PORT": "77"})
    assert variables == {**expected, "MASTER_PORT": "77"}


@pytest.mark.parametrize(
    "given, expected",
    [
        (dict(SLURM_TASKS_PER_NODE="4", SLURM_NTASKS_PER_NODE="8"), ["4"]),
        (dict(SLURM_TASKS_PER_NODE="8(x2),4"), ["8", "8", "4"]),
        (dict(SLURM_TASKS_PER_NODE="1,2(x2)"), ["1", "2", "2"]),
        (dict(SLURM_NTASKS_PER_NODE="8"), ["8", "8"]),
        ({}, ["1"]),
    ],
)
def test_slurm_tells_how_many_processes_share_a_node(given, expected):
    """They share its memory, which is looked at before the first iteration."""
    job = dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="9", SLURM_JOB_ID="1")
    job = {**job, **given, "MASTER_ADDR": "n0"}
    for node, processes in enumerate(expected):
        variables = slurm_variables({**job, "SLURM_NODEID": str(node)})
        assert variables["LOCAL_WORLD_SIZE"] == processes


def test_slurm_asks_for_the_first_node(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$3" = "n[7-8]" ] && printf "n7\\nn8\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    given = dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="2", SLURM_JOB_ID="1")
    assert slurm_variables({**given, "SLURM_NODELIST": "n[7-8]"})["MASTER_ADDR"] == "n7"


@pytest.mark.parametrize("launcher", ["pytorch", "slurm"])
def test_a_launcher_that_was_not_used_is_named(launcher, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=f"--launcher {launcher}.*scripts/"):
        join_processes(Config(dict(launcher=launcher)))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    variables = dict(RANK="2", LOCAL_RANK="2", WORLD_SIZE="3", MASTER_ADDR="x", MASTER_PORT="1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"process 2 .* has no GPU: it has 2"):
        join_processes(Config(dict(launcher="pytorch")))


# BatchNorm


class Small(nn.Sequential):
    def __init__(self, cuda):
        super().__init__(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Sequential(nn.BatchNorm2d(2)))
        self.cuda_given = cuda

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(is_cuda=self.cuda_given)])


@pytest.mark.parametrize("cuda, sync_bn", [(True, True), (True, False), (False, True)])
def test_batch_norm_is_synchronised_on_gpus_alone(monkeypatch, cuda, sync_bn):
    wrapped = {}
    monkeypatch.setattr(
        MMDistributedDataParallel,
        "__init__",
        lambda self, module, **options: wrapped.update(options, module=module),
    )
    warnings = []
    monkeypatch.setattr(
        "mmdet_ext.engine.distributed.print_log", lambda *given: warnings.append(given)
    )
    model = Small(cuda)
    before = model.state_dict()
    DataParallelDetector(model, device_ids=[3], sync_bn=sync_bn)
    kinds = {type(m) for m in wrapped["module"].modules() if "BatchNorm" in type(m).__name__}
    if cuda and sync_bn:
        assert kinds == {nn.SyncBatchNorm}
    else:
        assert kinds == {nn.BatchNorm3d, nn.BatchNorm2d}
    assert wrapped["device_ids"] == ([3] if cuda else None)
    assert len(warnings) == (0 if cuda else 1)
    after = wrapped["module"].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# The learning rate


def recipe(images=8, accumulated=1, **rule):
    return Config(
        dict(
            train_dataloader=dict(batch_size=images),
            optim_wrapper=dict(optimizer=dict(lr=0.02), accumulative_counts=accumulated),
            auto_scale_lr=dict(enable=False, base_batch_size=8, **rule),
        )
    )


@pytest.fixture
def processes(monkeypatch):
    def set_number(number):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: number)

    return set_number


@pytest.mark.parametrize("number", range(1, 13))
@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_the_total_batch_is_shared_or_refused_with_numbers_that_fit(processes, number, accumulated):
    processes(number)
    config = recipe(12, accumulated)
    if 12 % (number * accumulated) == 0:
        assert images_per_process(config) * number * accumulated == 12
        return
    with pytest.raises(ConfigError, match="batch_size=12 is the total") as refused:
        images_per_process(config)
    fitting, nearest = re.search(
        r"fits (.*?) process.* can share (.*?) \(", str(refused.value)
    ).groups()
    for fit in map(int, re.findall(r"\d+", fitting)):
        processes(fit)
        assert images_per_process(config) >= 1
    assert fit == 12 // accumulated
    processes(number)
    totals = [int(total) for total in re.findall(r"\d+", nearest)]
    assert any(total > 12 for total in totals)
    for total in totals:
        assert images_per_process(recipe(total, accumulated)) >= 1
        assert abs(total - 12) < number * accumulated


@pytest.mark.parametrize("number", [1, 2, 4, 8])
@pytest.mark.parametrize("images, expected", [(8, 0.02), (32, 0.08), (16, 0.04)])
def test_the_learning_rate_follows_the_total_batch_alone(processes, number, images, expected):
    processes(number)
    config = recipe(images, accumulated=2 if number < 8 else 1)
    settle_learning_rate(config, scale=True)
    assert config.optim_wrapper.optimizer.lr == pytest.approx(expected)
    assert config.train_dataloader.batch_size == images
    processes(1)  # as from the config that the run saved
    text = settle_learning_rate(config)
    assert config.optim_wrapper.optimizer.lr == pytest.approx(expected)
    assert f"total batch {images} = 1 process(es) x" in text


def test_another_total_batch_is_refused_unless_it_is_said():
    with pytest.raises(ConfigError) as refused:
        settle_learning_rate(recipe(images=4))
    for part in ("is meant for 8", "--auto-scale-lr makes the learning rate 0.01",
                 "auto_scale_lr.base_batch_size=4 keeps it"):  # fmt: skip
        assert part in str(refused.value)
    config = recipe(images=4)
    config.auto_scale_lr.base_batch_size = 4
    assert "total batch 4 = 1 process(es) x 4 image(s)" in settle_learning_rate(config)
    assert config.optim_wrapper.optimizer.lr == 0.02


@pytest.mark.parametrize("wrong", [0, -4, 2.5, True, None, "8"])
@pytest.mark.parametrize(
    "option",
    [
        "train_dataloader.batch_size",
        "optim_wrapper.accumulative_counts",
        "auto_scale_lr.base_batch_size",
    ],
)
def test_numbers_that_are_none_of_images_are_refused_by_name(option, wrong):
    config = recipe()
    config.merge_from_dict({option: wrong})
    with pytest.raises(ConfigError, match=rf"^{option} must be a whole number from 1 on, got"):
        settle_learning_rate(config)


def test_a_learning_rate_is_needed():
    config = recipe()
    config.optim_wrapper.optimizer.lr = None
    with pytest.raises(ConfigError, match=r"^optim_wrapper\.optimizer\.lr must be a number"):
        settle_learning_rate(config)


# A step of two processes


@pytest.fixture(scope="module")
def run(repository, phantom, tmp_path_factory):
    """A run of two processes, which step once; then process 1 raises."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "probed.py"
    config.write_text(PROBED.format(demo=repository / DEMO, folder=folder))
    found = script(
        repository, "dist_train.sh", config, 2, "--work-dir", folder / "run",
        DEEPLESION_ROOT=str(phantom), PYTHONPATH=str(repository / "tests/mmdet_ext/engine"),
    )  # fmt: skip
    assert sorted(path.name for path in folder.glob("*.pth")) == ["0.pth", "1.pth"], found.stderr
    return SimpleNamespace(folder=folder, output=found.stdout + found.stderr, code=found.returncode)


@pytest.fixture(scope="module")
def alone(run, repository):
    """The model, and the gradients of the two halves, each computed alone."""
    sys.path.insert(0, str(repository / "tests/mmdet_ext/engine"))
    try:
        import step_probe
    finally:
        sys.path.pop(0)
    steps = [torch.load(run.folder / f"{r}.pth", weights_only=False) for r in (0, 1)]
    config = read_experiment(repository / DEMO)
    import_modules_from_strings(**config.custom_imports)
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")
    model = MODELS.build(config.model)
    gradients = []
    for seed, step in enumerate(steps):
        model.load_state_dict(step["before"])
        model.train()
        step_probe.prepare_step(model, seed)
        model.zero_grad()
        data = model.data_preprocessor(copy.deepcopy(step["batch"]), training=True)
        model.parse_losses(model(**data, mode="loss"))[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return SimpleNamespace(
        model=model, steps=steps, gradients=gradients, prepare=step_probe.prepare_step
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_two_processes_start_alike_and_see_different_images(alone):
    first, second = alone.steps
    assert all(torch.equal(first["before"][n], second["before"][n]) for n in first["before"])
    names = [[s.file_name for s in step["batch"]["data_samples"]] for step in alone.steps]
    assert names[0] != names[1]


def test_gradients_of_two_processes_are_the_mean_of_the_halves(alone):
    first, second = alone.gradients
    assert any((first[name] - second[name]).abs().max() > 1e-3 for name in first)
    for step in alone.steps:
        for name, gradient in step["gradients"].items():
            close(gradient, (first[name] + second[name]) / 2)


def test_weights_after_a_step_are_those_of_the_mean_gradient(alone):
    first, second = alone.gradients
    for step in alone.steps:
        for name in first:
            before = step["before"][name]
            mean = (first[name] + second[name]) / 2
            close(step["after"][name], before - LR * (mean + DECAY * before))
        moved = [n for n in first if not torch.equal(step["after"][n], step["before"][n])]
        assert len(moved) == len(first)


def test_accumulated_gradients_are_those_of_two_processes(alone):
    alone.model.load_state_dict(alone.steps[0]["before"])
    alone.model.zero_grad()
    optimizer = torch.optim.SGD(alone.model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.initialize_count_status(alone.model, 0, 2)
    for seed, step in enumerate(alone.steps):
        alone.model.train()
        alone.prepare(alone.model, seed)
        alone.model.train_step(copy.deepcopy(step["batch"]), wrapper)
    after = alone.model.state_dict()
    for name, value in alone.steps[0]["after"].items():
        close(after[name].float(), value.float())


def test_images_without_lesions_leave_no_parameter_without_gradient(alone):
    # Of two processes one would wait forever for a gradient that the other does not have.
    batch = copy.deepcopy(alone.steps[0]["batch"])
    for sample in batch["data_samples"]:
        sample.gt_instances = sample.gt_instances[:0]
    alone.model.zero_grad()
    alone.model.train()
    data = alone.model.data_preprocessor(batch, training=True)
    alone.model.parse_losses(alone.model(**data, mode="loss"))[0].backward()
    assert all(p.grad is not None for p in alone.model.parameters())


# The end of a process


def test_a_process_that_raises_ends_the_run_with_its_message(run):
    assert run.code != 0
    assert "process 1 has had enough" in run.output.rpartition("Root Cause")[2]
    assert "Connection closed by peer" not in run.output


KILLED = """
import os, signal
import torch
from mmengine.config import Config
from mmdet_ext.engine.distributed import join_processes, launched

@launched
def main():
    join_processes(Config(dict(launcher="pytorch")))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))

main()
"""


def test_a_process_that_is_killed_ends_the_run(tmp_path, repository):
    # The launcher of this folder starts what is in the tools folder beside it.
    for name in ("scripts", "tools"):
        (tmp_path / name).mkdir()
    for name in ("launch.sh", "python.sh"):
        (tmp_path / "scripts" / name).symlink_to(repository / "scripts" / name)
    (tmp_path / "tools/killed.py").write_text(KILLED)
    run = script(tmp_path, "launch.sh", 2, "killed.py")
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in run.stderr.rpartition("Root Cause")[2]
    assert "Connection closed by peer" not in run.stderr


def test_plain_batch_norm_on_the_cpu_is_one_warning(run):
    assert run.output.count("BatchNorm is not synchronised") == 1
