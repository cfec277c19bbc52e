"""Does a training go as sound ones did? python tools/check_run.py work_dirs/alignshift_7slice

At any time, also while it runs: medians of its losses beside those of sound runs, what is out of
range and why that usually is, and a plot. docs/reproduce.md says what it finds.
"""

import argparse
import sys
from pathlib import Path

from deeplesion.command_line import command
from deeplesion.errors import MissingDataError
from mmdet_ext.engine.run_check import Reference, causes, check, plot, read_log, read_plan, table


@command(failure=2)
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 as sound runs, 1 something is out of range, 2 nothing to compare.",
    )
    parser.add_argument("work_dir", metavar="WORK_DIR", help="folder of a training")
    parser.add_argument(
        "--reference", help="compare with references/NAME.json; default: what the config says"
    )
    parser.add_argument("--plot", metavar="PNG", help="default: WORK_DIR/check_run.png")
    args = parser.parse_args()
    plan, name = read_plan(args.work_dir)
    log = read_log(args.work_dir, plan.updates_per_epoch)
    name = args.reference or name
    reference = Reference.read(name) if name else None
    if not log:
        raise MissingDataError(f"{args.work_dir} has no losses in its log yet")
    last = max(log)
    total = plan.updates_per_epoch * plan.max_epochs
    print(
        f"{args.work_dir}: update {last:,} of {total:,}, epoch {last / plan.updates_per_epoch:.2f}"
    )
    misfit = reference.misfit(plan) if reference else "the config names no reference"
    if not misfit:
        print(f"compared with {name}: {reference.source}\n")
        print("\n".join(table(reference, plan, log)))
    path = args.plot or Path(args.work_dir) / "check_run.png"
    plot(None if misfit else reference, plan, log, path)
    print(f"\nplot: {path}")
    if misfit:
        print(f"not compared: {misfit}")
        return 2
    findings = [f for update, values in log.items() for f in check(reference, plan, update, values)]
    if not findings:
        print("all in the range of sound runs")
        return 0
    now = {f.quantity for f in check(reference, plan, last, log[last])}
    print(f"{len(findings)} of {len(log)} lines out of range; the first of each quantity:")
    seen = set()
    for finding in findings:
        if finding.quantity not in seen:
            seen.add(finding.quantity)
            print(f"  {finding}{'' if finding.quantity in now else ' (in range by now)'}")
    print("usual causes:", *causes(findings), sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
