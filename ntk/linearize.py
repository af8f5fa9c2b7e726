"""When does the linearised model explain fine-tuning?

python -m ntk.linearize --methods rows:3 full --lambdas 0 0.1 1 10
"""

import importlib
from typing import TYPE_CHECKING, Any

from ntk.studies.lambdas.options import LinearizeOptions
from rocoft.commands import Command

if TYPE_CHECKING:
    from ntk.linearization import LinearizedModel, linearize

__all__ = ["LinearizedModel", "linearize", "main"]

main = Command(
    module="ntk.linearize",
    options=LinearizeOptions,
    run="ntk.studies.lambdas.run",
    description="When does the linearised model explain fine-tuning? For every task, "
    "seed, method and lambda: fine-tuning that is held at its start by (lambda / 2) "
    "||theta - theta0||^2, beside its linearisation trained in the same way. The same "
    "command goes on where it was stopped, and more tasks, shots, seeds, lambdas and "
    "methods can be added; other settings need another --name.",
    epilog="A METHOD is that of ntk train. Exit codes: 0 done, 1 some records failed, "
    "2 bad input, 130 interrupted.",
    interrupted="the same command goes on with what is missing",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ntk.linearization.model"), name)


if __name__ == "__main__":
    raise SystemExit(main())
