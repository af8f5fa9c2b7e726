"""Is the kernel over a few rows or columns close to the full one?

    python -m ntk.compare
    python -m ntk.compare --rows 1 3 --columns 1 3 --lora 8 --bias --layers 0 5
    python -m ntk.compare --model roberta-base --rows 3 --task sst2
    accelerate launch --multi_gpu -m ntk.compare --model roberta-base

Compares empirical neural tangent kernels of a pretrained transformer over chosen
parameters with the kernel over all of them, and trains kernel classifiers on each.
"""

from ntk.studies.comparison.options import CompareOptions
from rocoft.commands import Command

main = Command(
    module="ntk.compare",
    options=CompareOptions,
    run="ntk.studies.comparison.run",
    description="Compare the NTK of a pretrained transformer over a few rows, columns, "
    "LoRA matrices, biases or layers with the NTK over all parameters, and train "
    "kernel classifiers on each. Without options it uses the embedded MiniLM-L6 and "
    "the embedded task 'reviews', with rows 1 3 and columns 1 3.",
    epilog="A SPEC reads rows:3@query,value/layers=0,11+bias: a name (full, rows, "
    "columns, lora, bias, head, norm, embeddings), a count, modules after @, options "
    "after / (layers=, strategy=, seed=, indices=, alpha=, rescale), and + for sums. "
    "Options can be written with - or _. Exit codes: 0 done, 2 bad input, 130 "
    "interrupted.",
    interrupted="no report was written",
)

if __name__ == "__main__":
    raise SystemExit(main())
