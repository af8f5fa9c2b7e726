"""Fine-tune a pretrained transformer by rows and columns, or by a rival method.

    python -m rocoft.train
    python -m rocoft.train --model roberta-base --task sst2 --rows 3
    python -m rocoft.train --method lora:8 --lr 1e-4 3e-4 1e-3 --shots 16

The learning rate is chosen on dev, the best checkpoint is tested once. A run that was
killed goes on with the same command and ``--resume``.
"""

from rocoft.commands import Command
from rocoft.training import TrainOptions

main = Command(
    module="rocoft.train",
    options=TrainOptions,
    run="rocoft.training.run",
    description="Fine-tune a pretrained transformer by rows and columns (RoCoFT) or "
    "another way; the learning rate is chosen on dev, the best checkpoint is tested "
    "once. Without options it trains three rows of every weight of the embedded "
    "MiniLM-L6 on the embedded task 'reviews'.",
    epilog="A SPEC reads rows:3@query,value/layers=0,11: full, rows:R, columns:R, "
    "rows:R+columns:R, auto:R, lora:R, dora:R, bitfit, head, probe, 'masked rows:R'; "
    "modules after @, options after / (layers=, strategy=, seed=, alpha=), and +bias. "
    "Options can be written with - or _. Exit codes: 0 done, 2 bad input, 130 "
    "interrupted.",
    interrupted="go on with --resume",
)

if __name__ == "__main__":
    raise SystemExit(main())
