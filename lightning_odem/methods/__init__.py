"""Rules for continual model merging, by name."""

from lightning_odem.methods.average import AverageMerge
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.closed_form import ClosedFormMerge
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.dop import DOPMerge
from lightning_odem.methods.exact_stream import ExactStream
from lightning_odem.methods.function import FunctionMerge
from lightning_odem.methods.hcmm import HCMMMerge
from lightning_odem.methods.interpolation import LinearInterpolation
from lightning_odem.methods.isotropic import IsotropicMerge
from lightning_odem.methods.magmax import MagMaxMerge
from lightning_odem.methods.needs import (
    BaseModel,
    Calibration,
    InputMoments,
    Need,
    SecondMoments,
    Snapshots,
    TrainingData,
)
from lightning_odem.methods.nufilt import NUFILTMerge
from lightning_odem.methods.ode import ODEMerge
from lightning_odem.methods.ode_paper import PaperODEMerge
from lightning_odem.methods.ode_released import ReleasedODEMerge
from lightning_odem.methods.opcm import OPCMMerge
from lightning_odem.methods.operating_times import BecameTime, FixedTime, OperatingTime, SearchedTime, UtilityTime
from lightning_odem.methods.registry import METHODS, method_name, register_method, resolve_method
from lightning_odem.methods.replay import ReplayMerge
from lightning_odem.methods.representation import RepresentationCorrection
from lightning_odem.methods.sampling import Minibatches
from lightning_odem.methods.second_moment import SecondMomentMerge
from lightning_odem.methods.task_arithmetic import TaskArithmeticMerge
from lightning_odem.methods.task_singular_vectors import TaskSingularVectorsMerge
from lightning_odem.methods.ties import TiesMerge
from lightning_odem.methods.trm_style import TRMStyleMerge

__all__ = [
    "METHODS",
    "AverageMerge",
    "BaseModel",
    "BecameTime",
    "Calibration",
    "ClosedFormMerge",
    "DOPMerge",
    "ExactStream",
    "FixedTime",
    "FunctionMerge",
    "HCMMMerge",
    "InputMoments",
    "IsotropicMerge",
    "LinearInterpolation",
    "MagMaxMerge",
    "MergeContext",
    "MergeMethod",
    "MergeResult",
    "Minibatches",
    "NUFILTMerge",
    "Need",
    "ODEMerge",
    "OPCMMerge",
    "OperatingTime",
    "PaperODEMerge",
    "ReleasedODEMerge",
    "ReplayMerge",
    "RepresentationCorrection",
    "SearchedTime",
    "SecondMomentMerge",
    "SecondMoments",
    "Snapshots",
    "TRMStyleMerge",
    "TaskArithmeticMerge",
    "TaskSingularVectorsMerge",
    "TiesMerge",
    "TrainingData",
    "UtilityTime",
    "describe_method",
    "method_name",
    "register_method",
    "resolve_method",
]
