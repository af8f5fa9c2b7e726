from .cache import KernelCache
from .estimate import PlanCost, routes
from .machine import multiply_adds_per_second, run_floor, seconds
from .parts import ENTRY, PassSize, count_positions, packed
from .planning import Plan, compute_as_planned, held, plan, room
from .processes import Processes, launched_size
from .resources import Resources
from .run import Computation, kernels
from .storage import (
    StorageError,
    finite,
    load_kernels,
    save_kernels,
    write_bytes,
    write_text,
)
from .units import parse_bytes
from .work import Work

__all__ = [
    # for users
    "plan",
    "Plan",
    "kernels",
    "Work",
    "Resources",
    "KernelCache",
    "save_kernels",
    "load_kernels",
    "Processes",
    # estimate
    "PlanCost",
    "routes",
    # machine
    "multiply_adds_per_second",
    "run_floor",
    "seconds",
    # parts
    "ENTRY",
    "PassSize",
    "count_positions",
    "packed",
    # processes
    "launched_size",
    # planning
    "compute_as_planned",
    "held",
    "room",
    # run
    "Computation",
    # storage
    "StorageError",
    "finite",
    "write_bytes",
    "write_text",
    # units
    "parse_bytes",
]
