"""Backbones that a published system needs and no library has, written as users write theirs.

Each is named by a pipeline as `python:drl_data.examples.MODULE:FACTORY` (backbones/custom.py).
"""
