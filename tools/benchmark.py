"""Measure speed side by side with plain baselines: python tools/benchmark.py froc"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from benchmarks.measure import environment, format_results, measure
from deeplesion.command_line import command
from deeplesion.files import write_whole

BENCHMARKS = {
    "ops": "the fusion operators against their formulas on 5-D tensors, and against no fusion",
    "backbone": "backbone and neck at inference against the papers' way",
    "train-step": "forward and backward against the papers' way; checkpointing against none",
    "inference": "an image through the detector, with the shares of its parts",
    "loader": "a training sample from disk to tensor against one step after another",
    "prepare": "GrabCut on a lesion's surroundings against GrabCut on the whole slice",
    "froc": "deeplesion.evaluation.froc against a plain loop over detections and lesions",
}


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, text in BENCHMARKS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--rounds", type=int, default=7, help="after a warm-up (default 7)")
        command.add_argument("--out", type=Path, metavar="JSON", help="write times, environment")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")

    cases = importlib.import_module(f"benchmarks.{options.benchmark.replace('-', '_')}").cases()
    results = [measure(case, options.rounds) for case in tqdm(cases, unit="case", leave=False)]
    surroundings = environment()
    print(format_results(results))
    threads = surroundings["threads"]["OMP_NUM_THREADS"] or "as many as it likes"
    print(f"{surroundings['processor']}, OMP_NUM_THREADS {threads}")
    if options.out:
        content = dict(benchmark=options.benchmark, environment=surroundings, results=results)
        write_whole(options.out, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
