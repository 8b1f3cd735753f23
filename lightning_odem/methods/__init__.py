"""Rules for continual model merging, by name."""

from lightning_odem.methods.average import AverageMerge
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.dop import DOPMerge
from lightning_odem.methods.function import FunctionMerge
from lightning_odem.methods.interpolation import LinearInterpolation
from lightning_odem.methods.magmax import MagMaxMerge
from lightning_odem.methods.nufilt import NUFILTMerge
from lightning_odem.methods.ode import ODEMerge
from lightning_odem.methods.opcm import OPCMMerge
from lightning_odem.methods.registry import METHODS, method_name, register_method, resolve_method
from lightning_odem.methods.task_arithmetic import TaskArithmeticMerge
from lightning_odem.methods.ties import TiesMerge

__all__ = [
    "METHODS",
    "AverageMerge",
    "DOPMerge",
    "FunctionMerge",
    "LinearInterpolation",
    "MagMaxMerge",
    "MergeContext",
    "MergeMethod",
    "MergeResult",
    "NUFILTMerge",
    "ODEMerge",
    "OPCMMerge",
    "TaskArithmeticMerge",
    "TiesMerge",
    "method_name",
    "register_method",
    "resolve_method",
]
