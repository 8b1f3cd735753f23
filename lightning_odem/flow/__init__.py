"""The ODE alone, on flat vectors: fields, solvers, schedule and trajectory. It knows no modules and no data."""

from lightning_odem.flow.field import Field, RectifiedField, TransportField, Velocity
from lightning_odem.flow.schedule import operating_time
from lightning_odem.flow.solver import SOLVERS, Euler, Heun, NonFiniteLossError, Solver, integrate
from lightning_odem.flow.trajectory import Trajectory

__all__ = [
    "SOLVERS",
    "Euler",
    "Field",
    "Heun",
    "NonFiniteLossError",
    "RectifiedField",
    "Solver",
    "Trajectory",
    "TransportField",
    "Velocity",
    "integrate",
    "operating_time",
]
