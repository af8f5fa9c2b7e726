from .adapter.calibration import calibrated
from .adapter.config import RoCoFTConfig
from .adapter.export import export_lora
from .adapter.model import RoCoFTModel
from .adapter.slices import parameter_count
from .data.splits import few_shot, lmbff_split
from .data.tasks import load_file, load_task
from .models.architecture import SelectionError
from .models.backbone import Backbone, load_backbone
from .models.offloaded import keep_on_host
from .models.quantised import dequantised_on_use
from .training.trainer import FineTuned, fine_tune

__all__ = [
    # which parameters
    "SelectionError",
    # tasks
    "load_task",
    "load_file",
    "few_shot",
    "lmbff_split",
    # models
    "Backbone",
    "load_backbone",
    "dequantised_on_use",
    "keep_on_host",
    # row/column fine-tuning as a method of peft
    "RoCoFTConfig",
    "RoCoFTModel",
    "calibrated",
    "export_lora",
    "parameter_count",
    # fine-tuning by any method under one protocol
    "fine_tune",
    "FineTuned",
]
