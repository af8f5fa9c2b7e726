from .calibration import Loss, calibrated
from .config import Axes, RoCoFTConfig
from .export import export_lora
from .model import RoCoFTModel
from .slices import parameter_count

__all__ = [
    # for users
    "RoCoFTConfig",
    "RoCoFTModel",
    "export_lora",
    "calibrated",
    "parameter_count",
    # calibration
    "Loss",
    # config
    "Axes",
]
