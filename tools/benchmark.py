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
from deeplesion.files import check_out_file, write_whole

BENCHMARKS = {
    "ops": "the fusion operators against their formulas on 5-D tensors, and against no fusion",
    "backbone": "backbone and neck at inference against the papers' way",
    "train-step": "forward and backward against the papers' way; checkpointing against none",
    "inference": "an image through the detector, with the shares of its parts",
    "detect": "slices of a whole scan against one stack after the other, with all their stages",
    "export": "slices of a whole scan through an exported detector against the detector itself",
    "roi-align": "RoIAlign on a CPU at inference against mmcv's",
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
        command.add_argument(
            "--rounds", type=int, default=7, metavar="N",
            help="measure N rounds after a warm-up (default 7)",
        )  # fmt: skip
        command.add_argument(
            "--out", type=Path, metavar="JSON", help="write the times and the environment to a file"
        )
    text = "training with the full recipe on a GPU: losses against the CPU's, images/s, memory"
    command = commands.add_parser("gpu-recipe", help=text, description=text)
    command.add_argument(
        "--iterations", type=int, default=200, metavar="N",
        help="train for N iterations on the GPU (default 200)",
    )  # fmt: skip
    command.add_argument(
        "--reference", type=int, default=5, metavar="N",
        help="run the first N iterations on the CPU before, to compare (default 5)",
    )  # fmt: skip
    command.add_argument(
        "--size", type=int, default=512, metavar="PX",
        help="height and width of the images in px (default 512)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=int, default=8, metavar="N", help="take N images an iteration (default 8)"
    )
    command.add_argument(
        "--weights", metavar="PTH",
        help="begin with densenet121-a639ec97.pth, which lies here (default: random weights)",
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, metavar="JSON", help="write the results and the environment to a file"
    )
    options = parser.parse_args()
    if options.out:
        check_out_file(options.out)

    if options.benchmark == "gpu-recipe":
        from benchmarks import gpu_recipe

        recipe = {k: v for k, v in vars(options).items() if k not in ("benchmark", "out")}
        results = gpu_recipe.results(**recipe)
        print(gpu_recipe.format_results(results))
    else:
        if options.rounds < 1:
            parser.error("--rounds must be at least 1")
        cases = importlib.import_module(f"benchmarks.{options.benchmark.replace('-', '_')}").cases()
        results = [measure(case, options.rounds) for case in tqdm(cases, unit="case", leave=False)]
        print(format_results(results))
    surroundings = environment()
    threads = surroundings["threads"]["OMP_NUM_THREADS"] or "as many as it likes"
    print(f"{surroundings['processor']}, OMP_NUM_THREADS {threads}")
    if options.out:
        content = dict(benchmark=options.benchmark, environment=surroundings, results=results)
        write_whole(options.out, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
