"""Online speculative decoding: a server whose draft model learns while it serves."""

from limbeck.online.buffer import Buffer, Lot, Trace
from limbeck.online.feature_learner import FeatureLearner, feature_learner
from limbeck.online.gate import Gate, Watch
from limbeck.online.learner import Learner, ModelLearner, Training, model_learner
from limbeck.online.learning import Learning
from limbeck.online.pace import Pace
from limbeck.online.routing import Routing
from limbeck.online.service import Service
from limbeck.online.versions import Version, Versions

__all__ = [
    "Buffer",
    "FeatureLearner",
    "Gate",
    "Learner",
    "Learning",
    "Lot",
    "ModelLearner",
    "Pace",
    "Routing",
    "Service",
    "Trace",
    "Training",
    "Version",
    "Versions",
    "Watch",
    "feature_learner",
    "model_learner",
]
