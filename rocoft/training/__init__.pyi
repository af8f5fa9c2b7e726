from .anchor import Anchor
from .grid import EXTENSIONS, End, grid_end
from .groups import (
    ModelOptions,
    OutputOptions,
    TaskOptions,
    file_name,
    refuse_two_sources,
    task_name,
)
from .methods import LEARNING_RATES, parse_method
from .options import TrainOptions
from .readout_trainer import Loss, readout_loss
from .trainer import FineTuned, fine_tune, versions

__all__ = [
    # for users
    "fine_tune",
    "FineTuned",
    "parse_method",
    # anchor
    "Anchor",
    # methods
    "LEARNING_RATES",
    # grid
    "EXTENSIONS",
    "End",
    "grid_end",
    # groups
    "ModelOptions",
    "OutputOptions",
    "TaskOptions",
    "TrainOptions",
    "file_name",
    "refuse_two_sources",
    "task_name",
    # readout_trainer
    "Loss",
    "readout_loss",
    # trainer
    "versions",
]
