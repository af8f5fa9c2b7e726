"""Running a command as a user does, and reading what a study leaves."""

import subprocess
import sys

HELD = """
import sys
from ntk import compare
{before}
code = compare.main(sys.argv[1:])
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print("peak", int(line.split()[1]) * 1024)
sys.exit(code)
"""


def held_by_compare(*options, before=""):
    """Return the most bytes that a run of `ntk.compare` held, on Linux."""
    done = subprocess.run(
        [sys.executable, "-c", HELD.format(before=before), *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split("peak ")[1])


def exit_code(main, *arguments):
    """Return the exit code, whether the command or the parser gave it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def texts(folder):
    """Return what a study leaves but its figures."""
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*.json"))
    }
