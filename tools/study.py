"""Compare methods, not single models: train and test every config with several seeds.

python tools/study.py configs/alignshift_3slice.py configs/a3d_3slice.py --seeds 3 --out study \\
    --cfg-options stack.policy=keep_thick    # the same slices for both
python tools/study.py configs/demo/nofusion_3slice.py --phantom 300 --out study \\
    --variant thick configs/demo/nofusion_3slice.py stack.policy=keep_thick
python tools/study.py --out study --report    # tables and page again, from what is done
"""

import argparse
import json
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from deeplesion.command_line import command, config_help, told_to_repeat
from deeplesion.data.prepare import prepare
from deeplesion.errors import MissingDataError, UserError
from deeplesion.evaluation.intervals import MIN_RESAMPLES
from deeplesion.files import check_out_folder, parse_json, write_whole
from deeplesion.lock import only_writer
from deeplesion.phantom.make import make_phantom
from deeplesion.processes import available_cores, termination_interrupts
from deeplesion.report.study_page import write_study
from mmdet_ext.config.check import refused_by_parts
from mmdet_ext.config.overrides import use_data
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.study import (
    finished_runs,
    of_other_code,
    pairs,
    run_all,
    run_on_slurm,
    todo_of,
    visible_gpus,
)
from mmdet_ext.engine.study_plan import (
    besides_operators,
    check_methods,
    check_tests,
    code_hashes,
    methods_of,
    modules_of,
    parsed,
    with_fingerprints,
)
from mmdet_ext.engine.study_progress import known_seconds
from mmdet_ext.engine.study_run import Method
from mmdet_ext.models.complexity import Complexity, detector_complexity

TOOLS = Path(__file__).resolve().parent
PLAN = "plan.json"
OF_RUNS = ("seeds", "jobs", "slurm", "dry_run")
OF_CONFIGS = ("data", "phantom", "cfg_options")
PHANTOM_SIZE = 128  # px, as the demo's


@command()
def main() -> int:
    options = arguments()
    # Tables may be made while the runs go on elsewhere.
    looks = options.report or options.dry_run
    if looks and to_be_made(options):
        option = "--report" if options.report else "--dry-run"
        raise MissingDataError(
            f"{option} makes no phantom, and there is no whole one in {options.out / 'phantom'}:"
            f" call this without {option} first"
        )
    lock = nullcontext() if looks else only_writer(options.out / "study.lock", "--out")
    with told_to_repeat(), termination_interrupts(), lock:
        failed = []
        if options.configs or options.variant:
            set_data(options)
            plan = make_plan(options)
            failed = [] if options.report else run(options, plan)
        else:
            plan = read_plan(options.out)
        if not options.dry_run:
            report(options, plan)
    if failed:
        print(f"\nfailed: {'; '.join(outcome.job.name for outcome in failed)}. The same command "
              "tries again what failed")  # fmt: skip
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "configs", nargs="*", metavar="CONFIG", help=config_help("config of a method")
    )
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME CONFIG", "k=v"),
        help="add a method under a name of its own: a config with options of its own",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N",
        help="run every method with N seeds, 0 to N - 1 (default 3)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder to write the runs, the tables and the page to",
    )  # fmt: skip
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data", type=Path, metavar="ROOT",
        help="folder of the prepared data (default: DEEPLESION_ROOT)",
    )  # fmt: skip
    data.add_argument(
        "--phantom", type=int, metavar="PATIENTS",
        help="instead of --data: make a phantom of so many patients in DIR/phantom, with slices of"
        f" {PHANTOM_SIZE} x {PHANTOM_SIZE} px",
    )  # fmt: skip
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="k=v",
        help="override options of all configs",
    )  # fmt: skip
    parser.add_argument(
        "--reference", metavar="NAME",
        help="method that all others are compared with (default: the first)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="do N runs at once (default: as many as there are GPUs; 1 without a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--slurm", nargs="*", action="extend", metavar="k=v",
        help="do the runs as an array of Slurm jobs, by submitit (an extra); k=v are parameters of"
        " its executor, such as slurm_partition=gpu gpus_per_node=1 cpus_per_task=6"
        " timeout_min=600",
    )  # fmt: skip
    parser.add_argument(
        "--accept-code-changes", action="store_true",
        help="also take runs of the same config and data that other code has done",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N",
        help="draw N bootstrap samples of the patients (default 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true",
        help="say what would be run, and end; --phantom's must have been made",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true", help="run nothing, and write tables and page again"
    )
    options = parser.parse_args()
    for name, low in (("seeds", 1), ("jobs", 1), ("resamples", MIN_RESAMPLES)):
        if (value := getattr(options, name)) is not None and value < low:
            raise UserError(f"--{name} must be at least {low}, got {value}")
    if options.slurm is not None:
        options.slurm = dict(pairs(options.slurm))
    check_out_folder(options.out)
    if not (options.configs or options.variant) and not options.report:
        parser.error("give a CONFIG, a --variant NAME CONFIG, or --report")
    if options.report:
        without = () if options.configs or options.variant else OF_CONFIGS
        ignored = [n for n in (*OF_RUNS, *without) if getattr(options, n) != parser.get_default(n)]
        if ignored:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            raise UserError(f"{names}: --report runs nothing; leave one of them out")
    return options


def to_be_made(options: argparse.Namespace) -> bool:
    """Whether a phantom is asked for that is not there yet, or not whole."""
    whole = options.out / "phantom/annotations/test.json"
    return options.phantom is not None and not whole.is_file()


def set_data(options: argparse.Namespace) -> None:
    """Makes the phantom, if one is asked for, and tells configs and commands where the data is."""
    root = options.data
    if options.phantom is not None:
        root, workers = options.out / "phantom", available_cores()
        make_phantom(root, options.phantom, PHANTOM_SIZE, workers=workers)
        if to_be_made(options):
            prepare(root, workers=workers)
    if root is not None:
        use_data(root)


def make_plan(options: argparse.Namespace) -> dict:
    """The methods with their fingerprints and costs, also written to DIR/plan.json."""
    wanted = methods_of(options.configs, options.variant, options.cfg_options)
    reference = options.reference or wanted[0].name
    if reference not in [method.name for method in wanted]:
        names = ", ".join(method.name for method in wanted)
        raise UserError(f"--reference {reference} is none of the methods {names}")
    known = {}
    with suppress(UserError):  # there is none yet, or it is damaged and written anew
        known = {counted_for(m): m["cost"] for m in read_plan(options.out)["methods"]}
    found, configs = [], []
    for method in tqdm(wanted, desc="reading configs", unit="method", leave=False, disable=None):
        config = load_config(method.config, parsed(method.options))
        found.append(with_fingerprints(method, config, code_hashes(modules_of(config), TOOLS)))
        configs.append(config)
    check_methods(found)
    check_tests(found, configs)
    for note in besides_operators(found, configs):
        print(note)
    methods = []
    for method, config in zip(tqdm(found, desc="counting", leave=False, disable=None), configs):
        own = asdict(method)
        methods.append({**own, "cost": known.get(counted_for(own)) or cost_of(config)})
    plan = dict(
        reference=reference, accept_code_changes=options.accept_code_changes, methods=methods
    )
    if not (options.dry_run or options.report):
        kept = [{k: v for k, v in each.items() if k != "images"} for each in methods]  # of here
        text = json.dumps({**plan, "methods": kept}, indent=1)
        write_whole(options.out / PLAN, text + "\n")
    return plan


def read_plan(out: Path) -> dict:
    """Of the latest call that had configs."""
    file = out / PLAN
    if not file.is_file():
        raise MissingDataError(f"{out} holds no study (there is no {PLAN}): name its configs")
    try:
        plan = parse_json(file.read_bytes())
        plan["reference"], [(method_of(m), counted_for(m), m["cost"]) for m in plan["methods"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is not the plan of a study: name its configs again") from None
    return plan


def counted_for(method: dict) -> tuple[str, ...]:
    """What a cost is of: another operator's code may count otherwise under the same config."""
    training, test = method["training"], method["test"]
    return training["config"], training["code"], test["config"]


def method_of(each: dict) -> Method:
    own = {name: value for name, value in each.items() if name != "cost"}
    return Method(**own | {"options": tuple(own["options"])})


def cost_of(config) -> dict:
    """Operations and parameters on one image, or a note where they cannot be counted."""
    try:
        with refused_by_parts():
            parts = detector_complexity(config)
    except UserError as error:
        return dict(note=str(error))
    return asdict(sum(parts.values(), Complexity()))


def run(options: argparse.Namespace, plan: dict) -> list:
    """Does what is not done yet; returns the outcomes that failed."""
    methods, out = [method_of(each) for each in plan["methods"]], options.out
    todo = todo_of(out, methods, options.seeds, options.accept_code_changes)
    for (name, seed), parts in todo.changed.items():
        print(f"{name}, seed {seed}: {parts} changed since it was run; it is run anew, the old one "
              f"stays in {out / 'runs'}")  # fmt: skip
    waiting = sum(len(job.methods) for job in todo.jobs)
    counts = f"{_counted(len(methods), 'method')} x {_counted(options.seeds, 'seed')}"
    print(f"{counts}: {_counted(todo.done, 'run')} done, {waiting} to do; {out}", flush=True)
    if options.dry_run:
        print("\n".join(f"  {job.name}: {job.folder}" for job in todo.jobs))
    if options.dry_run or not todo.jobs:
        return []
    # Slurm need not pass on where the data is.
    environment = {k: v for k, v in os.environ.items() if k == "DEEPLESION_ROOT"}
    same = dict(done=todo.done, known=known_seconds(out), environment=environment)
    if options.slurm is not None:
        outcomes = run_on_slurm(
            todo.jobs, TOOLS, out / "slurm", options.slurm, options.jobs, **same
        )
    else:
        gpus = visible_gpus(torch.cuda.device_count())
        outcomes = run_all(todo.jobs, TOOLS, options.jobs or len(gpus) or 1, gpus, **same)
    return [outcome for outcome in outcomes if outcome.failed]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def report(options: argparse.Namespace, plan: dict) -> None:
    accept = plan.get("accept_code_changes", False) or options.accept_code_changes
    methods = {
        each["name"]: dict(
            config=each["config"],
            options=list(each["options"]),
            cost=each["cost"],
            test=each["test"],
            runs=finished_runs(options.out, method_of(each), accept),
        )
        for each in plan["methods"]
    }
    reference = options.reference or plan["reference"]
    others = of_other_code(options.out, [method_of(each) for each in plan["methods"]], accept)
    notes = [others] if others else []
    print("\n" + write_study(options.out, methods, reference, options.resamples, notes))


if __name__ == "__main__":
    sys.exit(main())
