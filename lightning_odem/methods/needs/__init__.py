"""What merge methods use besides the two models. Each need is one class in one file."""

from lightning_odem.methods.needs.base_model import BaseModel
from lightning_odem.methods.needs.calibration import Calibration
from lightning_odem.methods.needs.input_moments import InputMoments
from lightning_odem.methods.needs.need import Need, combine
from lightning_odem.methods.needs.second_moments import SecondMoments
from lightning_odem.methods.needs.snapshots import Snapshots
from lightning_odem.methods.needs.sources import Offer, Sources, TrainingRun
from lightning_odem.methods.needs.training_data import TrainingData

__all__ = [
    "BaseModel",
    "Calibration",
    "InputMoments",
    "Need",
    "Offer",
    "SecondMoments",
    "Snapshots",
    "Sources",
    "TrainingData",
    "TrainingRun",
    "combine",
]
