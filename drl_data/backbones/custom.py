"""Your own model as a backbone: `backbone.model: python:package.module:factory`.

The factory is a function of an importable module:

    def factory(spec: BackboneSpec, device: torch.device) -> CustomBackbone

On "meta" it must build the structure without reading weights; elsewhere it loads them onto
`device`. `spec` says the rest (dtype, init, init_seed, and the file `weights`). A `CustomBackbone`
is a `Backbone` (how an image becomes the network's input, how the network is told the time and
called; taps, cut, noise and reductions are then the same as for every family) that also says what
its weights are:

    class MyBackbone(CustomBackbone):
        def input_shape(self, images): ...      # (c, h, w) that forward takes
        def encode(self, pixels): ...           # Posterior(pixels) where there is no VAE
        def conditioning(self, spec): ...       # Conditioning() where there is none
        def forward(self, x, model_time, kwargs): ...
        def weights_digest(self): ...           # for example file_digest("my.safetensors")

A pixel-space network whose weights are one safetensors file is a `CheckpointBackbone`
(checkpoint.py) and needs none of these but, at times, `forward`; drl_data/examples has some.

Without a noise schedule (an encoder) give `NoSchedule()`, and write `schedule: {convention: none}`.

Naming the factory is the consent: it must be installed or on PYTHONPATH already, nothing is
downloaded, and no model folder can bring code with it.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from drl_data.backbones.backbone import Backbone
from drl_data.errors import SpecError
from drl_data.factories import load_factory
from drl_data.spec import BackboneSpec
from drl_data.spec_base import canonical_json


class CustomBackbone(Backbone):
    """A backbone that is made by Python code, and so must say itself what its weights are."""

    reads_weights: ClassVar[bool] = False
    """Whether it reads `backbone.weights`; others refuse such a spec."""

    @abstractmethod
    def weights_digest(self) -> str:
        """A digest of everything that decides what the network computes: weights, architecture,
        and the version of the code if it may change. Also asked of the structure on meta."""


@dataclass(frozen=True)
class CustomModel:
    """A model that Python code makes; the counterpart of `ModelFolder`."""

    spec: BackboneSpec

    def digest(self) -> str:
        """SHA-256 over the factory's name, the kind of weights, and the digest that it says."""
        entries = {"factory": self.spec.model, "weights": self._make("meta").weights_digest()}
        if self.spec.init == "random":
            entries["random"] = str(self.spec.init_seed)
        return hashlib.sha256(canonical_json(dict(entries))).hexdigest()

    def check_weights(self) -> None:
        """The factory says itself if its weights are missing, when it loads them."""

    def load(self, device: torch.device) -> Backbone:
        """What the factory makes, on `device`."""
        return self._make(device)

    def _make(self, device: str | torch.device) -> CustomBackbone:
        factory = load_factory(self.spec.model, "backbone.model")
        made = factory(self.spec, torch.device(device))
        if not isinstance(made, CustomBackbone):
            raise SpecError(
                f"backbone.model {self.spec.model!r} gave a {type(made).__name__}; want a "
                "CustomBackbone (drl_data.backbones)"
            )
        if self.spec.weights is not None and not made.reads_weights:
            raise SpecError(f"backbone.weights: {self.spec.model!r} loads its weights itself")
        return made
