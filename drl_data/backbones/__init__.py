"""Frozen diffusion models, one adapter a family; `load_backbone` picks the family by itself."""

from drl_data.backbones.backbone import Backbone, Conditioning, Posterior
from drl_data.backbones.loader import ModelFolder, load_backbone

__all__ = ["Backbone", "Conditioning", "ModelFolder", "Posterior", "load_backbone"]
