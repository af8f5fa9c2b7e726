"""Row and column fine-tuning: what is selected, and the tasks and models it runs on."""

from rocoft.architecture import SelectionError
from rocoft.backbone import Backbone, load_backbone
from rocoft.config import RoCoFTConfig
from rocoft.export import export_lora
from rocoft.model import RoCoFTModel, calibrated
from rocoft.offloaded import keep_on_host
from rocoft.quantised import dequantised_on_use
from rocoft.slices import parameter_count
from rocoft.splits import few_shot, lmbff_split
from rocoft.tasks import load_file, load_task

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
]
