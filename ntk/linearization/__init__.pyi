from .bounds import Bound, flow_bounds, minimiser_bounds
from .closed_form import ClosedForm, loss_scale
from .closeness import taylor_remainder
from .model import LinearizedModel, evaluated, linearize
from .tabulated import exact_lipschitz

__all__ = [
    # for users
    "linearize",
    "LinearizedModel",
    "ClosedForm",
    # bounds
    "Bound",
    "flow_bounds",
    "minimiser_bounds",
    # closed_form
    "loss_scale",
    # closeness
    "taylor_remainder",
    # model
    "evaluated",
    # tabulated
    "exact_lipschitz",
]
