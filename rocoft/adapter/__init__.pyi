from .config import Axes, RoCoFTConfig
from .export import export_lora
from .model import Loss, RoCoFTModel, calibrated
from .slices import parameter_count

__all__ = [
    # for users
    "RoCoFTConfig",
    "RoCoFTModel",
    "export_lora",
    "calibrated",
    "parameter_count",
    # config
    "Axes",
    # model
    "Loss",
]
