"""Does a training go as sound ones did? python tools/check_run.py work_dirs/alignshift_7slice

It may be called at any time, also while the training runs. It prints the medians of the losses,
says which of them are out of the range of sound runs and what the usual causes are, and draws a
plot. docs/reproduce.md says what it finds.
"""

import argparse
import json
import sys
from pathlib import Path

from deeplesion.command_line import command
from deeplesion.errors import MissingDataError, UserError
from deeplesion.files import write_whole
from mmdet_ext.engine.run_check import (
    Reference,
    causes,
    check,
    plot,
    read_log,
    read_plan,
    record,
    table,
)


@command(failure=2)
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 all is in the range of sound runs; 1 something is out of range; 2"
        " there is nothing to compare.",
    )
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="folder of a training")
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="compare with these sound runs: deeplesion, demo or another file of"
        " mmdet_ext/engine/references without its .json (default: what the config says)",
    )
    parser.add_argument(
        "--record",
        metavar="JSON",
        help="compare nothing, and write the ranges of these runs, which are sound, to a new file",
    )
    args = parser.parse_args()
    if args.record:
        if Path(args.record).exists():
            raise UserError(f"--record {args.record} is there already: name another, or remove it")
        plans = [read_plan(folder)[0] for folder in args.work_dirs]
        logs = [read_log(f, p.updates_per_epoch) for f, p in zip(args.work_dirs, plans)]
        source = f"{len(logs)} runs, recorded by tools/check_run.py --record"
        content = json.dumps(record(logs, plans[0], source), indent=1)
        write_whole(Path(args.record), content + "\n")
        return 0
    return max(show(Path(folder), args.reference) for folder in args.work_dirs)


def show(work_dir: Path, name: str | None) -> int:
    """Prints how a run goes, and draws it; returns the exit status."""
    plan, own = read_plan(work_dir)
    log = read_log(work_dir, plan.updates_per_epoch)
    name = name or own
    reference = Reference.read(name) if name else None
    if not log:
        raise MissingDataError(f"{work_dir} has no losses in its log yet")
    last = max(log)
    total = plan.updates_per_epoch * plan.max_epochs
    print(f"{work_dir}: update {last:,} of {total:,}, epoch {last / plan.updates_per_epoch:.2f}")
    misfit = reference.misfit(plan) if reference else "the config names no reference"
    if not misfit:
        print(f"compared with {name}: {reference.source}\n")
        print("\n".join(table(reference, plan, log)))
    path = work_dir / "check_run.png"
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
