"""All commands as sub-commands of one: ``ntk compare`` is ``python -m ntk.compare``."""

from rocoft.commands import Group

main = Group(
    name="ntk",
    description="Empirical neural tangent kernels of transformers, and fine-tuning by "
    "rows and\ncolumns.",
    commands={
        "compare": ("ntk.compare", "kernels of a few parameters with that of all"),
        "evaluate": ("ntk.evaluate", "kernel classifiers with fine-tuning"),
        "ablate": ("ntk.ablate", "which rows and columns, and how many"),
        "layers": ("ntk.layers", "which layers to tune"),
        "linearize": ("ntk.linearize", "the linearised model with fine-tuning"),
        "bench": ("ntk.bench", "what kernels cost on this machine"),
        "train": ("rocoft.train", "fine-tune by rows and columns, or another way"),
    },
)

if __name__ == "__main__":
    raise SystemExit(main())
