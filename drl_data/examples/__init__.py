"""Published models that are neither in diffusers nor in transformers, as backbones of one's own.

Each module is a worked example of `backbone.model: python:drl_data.examples.MODULE:FACTORY`
(backbones/custom.py) and serves the recipes that name it. Networks are written from the papers,
with the parameter names of the authors' checkpoints, so that those load: `backbone.weights` is the
checkpoint as safetensors.
"""
