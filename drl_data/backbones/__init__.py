"""Frozen models, one adapter a family; `find_model` and `load_backbone` pick it by themselves."""

from drl_data.backbones.backbone import Backbone, Conditioning, Posterior, TappableModule
from drl_data.backbones.checkpoint import CheckpointBackbone
from drl_data.backbones.custom import CustomBackbone, CustomModel
from drl_data.backbones.loader import Model, ModelFolder, find_model, load_backbone

__all__ = [
    "Backbone",
    "CheckpointBackbone",
    "Conditioning",
    "CustomBackbone",
    "CustomModel",
    "Model",
    "ModelFolder",
    "Posterior",
    "TappableModule",
    "find_model",
    "load_backbone",
]
