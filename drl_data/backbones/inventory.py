"""What of a model can be tapped: `drl taps`. On the meta device, so that weights are not needed."""

from __future__ import annotations

from dataclasses import dataclass

from drl_data.backbones.backbone import Backbone, TappableModule
from drl_data.backbones.loader import ModelFolder, find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.spec import BackboneSpec, ImageSpec


@dataclass(frozen=True)
class Inventory:
    """The modules of a model in the order of its tree.

    `aliases` has another name for some of their outputs that taps may use: {path: name}.
    """

    modules: tuple[TappableModule, ...]
    aliases: dict[str, str]
    image_size: int
    n_parameters: int
    flops: int


def tappable_modules(spec: BackboneSpec, image_size: int | None = None) -> Inventory:
    """Every module that puts out a tensor, for square images (default: of the model's own size).

    Raises:
        SpecError: if the model does not say its size, or cannot take the one given.
        WeightsError: if there is no such model.
    """
    model = find_model(spec, structure_only=True)
    if image_size is None:
        if not isinstance(model, ModelFolder):
            raise SpecError(f"model {spec.model!r}: its size is not known; give --size")
        image_size = model.image_size()
    backbone = load_backbone(model, "meta")
    images, condition = _images(backbone, image_size), _condition(backbone)
    return Inventory(
        modules=backbone.modules(images, condition),
        aliases={out: name for name, (out, _) in reversed(tuple(backbone.aliases().items()))},
        image_size=image_size,
        n_parameters=sum(p.numel() for p in backbone.network.parameters()),
        flops=backbone.flops((), images, condition).whole,
    )


def _images(backbone: Backbone, size: int) -> ImageSpec:
    """RGB images of this size, or grey ones if the model takes those."""
    color = ImageSpec(size=(size, size))
    try:
        backbone.input_shape(color)
    except SpecError:
        grey = ImageSpec(size=(size, size), mode="L")
        try:
            backbone.input_shape(grey)
        except SpecError:
            return color  # the error that names what is wrong with the size
        return grey
    return color


def _condition(backbone: Backbone) -> ConditionSpec:
    """Any condition that the model takes; shapes and FLOPs do not depend on it."""
    try:
        backbone.conditioning(ConditionSpec())
    except SpecError:
        return ConditionSpec(class_label=0)  # class-conditional, without a null class
    return ConditionSpec()
