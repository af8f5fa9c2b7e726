from .files import base_name
from .metrics import metric_names, scores, text_scores
from .prompts import (
    Completion,
    Completions,
    encode_completion,
    generated,
    has_prompts,
    log_likelihoods,
    split_completions,
    without_end,
)
from .splits import (
    Split,
    few_shot,
    full_split,
    lmbff_split,
    stratified_folds,
    with_test,
)
from .tasks import (
    DEFAULT_TASK,
    HUB,
    SCORED_HUB,
    Example,
    Task,
    load_file,
    load_task,
    with_prompt,
)
from .templates import Prompt, TaskError

__all__ = [
    # for users
    "load_task",
    "load_file",
    "few_shot",
    "lmbff_split",
    # files
    "base_name",
    # metrics
    "metric_names",
    "scores",
    "text_scores",
    # prompts
    "Completion",
    "Completions",
    "encode_completion",
    "generated",
    "has_prompts",
    "log_likelihoods",
    "split_completions",
    "without_end",
    # splits
    "Split",
    "full_split",
    "stratified_folds",
    "with_test",
    # tasks
    "DEFAULT_TASK",
    "Example",
    "HUB",
    "SCORED_HUB",
    "Task",
    "with_prompt",
    # templates
    "Prompt",
    "TaskError",
]
