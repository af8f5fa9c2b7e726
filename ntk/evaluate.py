"""Do kernel classifiers match fine-tuning, and a few rows' kernel the full one?

    python -m ntk.evaluate
    python -m ntk.evaluate --tasks sst2 trec --data-dir DATA --shots 16 64 --jobs 2
    python -m ntk.evaluate --model roberta-base --tasks sst2 mnli --finetune full rows:3

The few-shot study of the kernel view of fine-tuning (Malladi et al. 2023) over any
parameters. Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.studies.fewshot.options import EvaluateOptions
from rocoft.commands import Command

main = Command(
    module="ntk.evaluate",
    options=EvaluateOptions,
    run="ntk.studies.fewshot.run",
    description="Do kernel classifiers match fine-tuning, and does the kernel over a "
    "few rows match the full one? For every task and seed: few-shot splits drawn as "
    "LM-BFF draws them, kernels of all spaces from one pass, classifiers and "
    "fine-tuning with hyperparameters chosen on the same dev examples. What is done is "
    "kept: the same command goes on where it was stopped, and further tasks, shots, "
    "seeds, spaces and methods can be added.",
    epilog="A SPEC is that of ntk compare, a METHOD that of ntk train. Exit codes: 0 "
    "done, 1 some records failed, 2 bad input, 130 interrupted.",
    interrupted="the same command goes on with what is missing",
)

if __name__ == "__main__":
    raise SystemExit(main())
