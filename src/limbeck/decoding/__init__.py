"""Writing completions: `generate` is the rollout engine, `Sampling` says how tokens are drawn, `Mix` joins two
models into one writer; `Engine` serves requests by speculative decoding, `speculate` does so for a list of prompts."""

from limbeck.decoding.adaptive import Adaptive
from limbeck.decoding.controller import Controller, Fixed
from limbeck.decoding.drafts import Draft
from limbeck.decoding.drafts.feature import FeatureDraft
from limbeck.decoding.drafts.feature_net import FeatureNet, feature_shape
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.drafts.model import ModelDraft
from limbeck.decoding.drafts.ngram import NgramDraft
from limbeck.decoding.generate import generate
from limbeck.decoding.int8 import int8_weights
from limbeck.decoding.records import Completion, Mix, Prompt
from limbeck.decoding.requests import Counters, Event, Observation, Observed, Request
from limbeck.decoding.sampler import Sampling
from limbeck.decoding.speculate import speculate
from limbeck.decoding.speculative import Engine

__all__ = [
    "Adaptive",
    "Completion",
    "Controller",
    "Counters",
    "Draft",
    "Engine",
    "Event",
    "FeatureDraft",
    "FeatureNet",
    "Fixed",
    "Mix",
    "ModelDraft",
    "NgramDraft",
    "Observation",
    "Observed",
    "Prompt",
    "Request",
    "Sampling",
    "feature_shape",
    "generate",
    "int8_weights",
    "layers_draft",
    "speculate",
]
