"""How much faster the kernel of contrasts is than that of all outputs, in one run.

For two classes one backward pass instead of two, and a quarter of the products:

    python -m tests.benchmarks.contrasts --model smollm2 --examples 32
"""

import argparse
import statistics
import time

from ntk import Full, Rows, empirical_ntk
from rocoft.data import few_shot, load_task
from rocoft.models import load_backbone

SPACES = {"full": Full(), "rows:3": Rows(3)}


def main():
    """Time both kernels, interleaved, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    split = few_shot(load_task("reviews"), options.examples // 2, 2, 0)
    backbone = load_backbone(options.model, split)
    batches, _ = backbone.encode(split.train, 32)
    for name, space in SPACES.items():
        seconds = {"full": [], "contrast": []}
        for _ in range(options.rounds + 1):
            for reduce, times in seconds.items():
                start = time.perf_counter()
                empirical_ntk(backbone.module, batches, space=space, reduce=reduce)
                times.append(time.perf_counter() - start)
        # The first round is a warm-up.
        full, contrast = (statistics.median(times[1:]) for times in seconds.values())
        print(  # noqa: T201
            f"{options.model}, n = {options.examples}, {name}: all outputs "
            f"{full:.2f} s, contrasts {contrast:.2f} s, {full / contrast:.2f} times"
        )


if __name__ == "__main__":
    main()
