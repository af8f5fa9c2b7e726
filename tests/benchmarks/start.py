"""How fast a command answers before anything is computed.

    python -m tests.benchmarks.start

Wall time of ``ntk compare --help`` and of a mistyped option, as ratios to that of
``import torch, transformers``: medians of interleaved runs, each in a process.
"""

import statistics
import subprocess
import sys
import time

RUNS = 7
CASES = {
    "ntk compare --help": ("-m", "ntk", "compare", "--help"),
    "ntk --version": ("-m", "ntk", "--version"),
    "ntk compare --row 3": ("-m", "ntk", "compare", "--row", "3"),
}
IMPORTS = ("-c", "import torch, transformers")


def seconds(*arguments: str) -> float:
    """Return the wall time of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the ratios."""
    cases = {**CASES, "import torch, transformers": IMPORTS}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(RUNS + 1):
        for name, arguments in cases.items():
            took = seconds(*arguments)
            if number:  # The first run warms up.
                times[name].append(took)
    reference = times["import torch, transformers"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, reference, strict=True))
        print(f"{name:28} {statistics.median(values):6.2f} s  {ratio:5.3f}")


if __name__ == "__main__":
    main()
