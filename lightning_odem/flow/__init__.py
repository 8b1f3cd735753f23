"""The ODE alone, on flat vectors: fields, solvers, schedule and trajectory. They know no modules and no data."""

from lightning_odem.flow.control import StepControl
from lightning_odem.flow.descent import Descent
from lightning_odem.flow.field import Field, RectifiedField, TransportField, Velocity
from lightning_odem.flow.holdout import LowestPoint
from lightning_odem.flow.reuse import ReusedGradient
from lightning_odem.flow.schedule import operating_time, scaled_time
from lightning_odem.flow.solver import SOLVERS, Euler, Heun, NonFiniteLossError, Solver, integrate, resolve_solver
from lightning_odem.flow.trajectory import Trajectory

__all__ = [
    "SOLVERS",
    "Descent",
    "Euler",
    "Field",
    "Heun",
    "LowestPoint",
    "NonFiniteLossError",
    "RectifiedField",
    "ReusedGradient",
    "Solver",
    "StepControl",
    "Trajectory",
    "TransportField",
    "Velocity",
    "integrate",
    "operating_time",
    "resolve_solver",
    "scaled_time",
]
