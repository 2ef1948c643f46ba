"""The section `segment` of a pipeline file: pixel classifiers on feature maps (DDPM-Seg)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from drl_data.spec_base import NonNegative, Positive, SizePair, Spec, StrTuple, Timestep, as_tuple


class PixelMlpSpec(Spec):
    """An ensemble of small networks on single pixels, as DDPM-Seg trains it.

    Linear, ReLU, BatchNorm for each hidden layer, then a linear one; weights from N(0, 0.02), Adam.
    Training ends when a member has seen `epochs`, or when after `least_epochs` the loss of
    `patience` batches was not below the least.
    """

    members: Positive = 10
    hidden: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)] = ()
    """Default, as published: 128 and 32, or 256 and 128 from 30 classes on."""
    epochs: Positive = 100
    least_epochs: NonNegative = 4
    patience: Positive = 51
    """The published code stops at the 51st batch in a row that is no better."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    standardise: bool = False
    """Mean 0 and variance 1 of each channel over the train pixels; not in the published code."""


class PixelLinearSpec(Spec):
    """A linear classifier (1 x 1 convolution) of each cell by itself, all trained in one pass."""

    epochs: Positive = 20
    batch_size: Positive = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the train images on which the best cell is chosen, and which train no cell."""


class SegmentSpec(Spec):
    """Segmentation from few labelled images: features of every pixel, upsampled when they are read
    and concatenated, and small classifiers on them (Baranchuk et al. 2022).

    Label maps are members of the tars (`labels: seg.png`), or files of a folder (`label_folder`)
    named by key. They are fitted to the size of the images by nearest neighbour, cropped alike;
    what `resize: pad` adds is ignored.
    """

    labels: str = "seg.png"
    """Extension of the label maps: PNG of class numbers, or `npy` of whole numbers [h, w]."""
    label_folder: str | None = None
    """Folder or URL that holds them as KEY.EXTENSION, if the tars do not."""
    ignore: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = (255,)
    """Values of pixels that count nowhere."""
    n_classes: Positive | None = None
    """Default: one more than the largest number in the label maps of the train images."""
    class_names: StrTuple = ()
    train: str = "train"
    test: str = "test"
    train_images: Positive | None = None
    """How many labelled images learn, those whose keys have the least digests; default: all."""
    predict: str | None = None
    """Split that is predicted too, labelled or not (DatasetDDPM)."""
    taps: StrTuple = ()
    timesteps: Annotated[tuple[Timestep, ...], BeforeValidator(as_tuple)] = ()
    """Default: all maps of the store, at all of its timesteps."""
    grids: Annotated[dict[str, SizePair], Field(default_factory=dict)]
    """Height and width of taps whose rows are tokens; default: the square."""
    view: str | None = None
    """`id` or `hflip`, whose labels are mirrored; default: the store's first."""
    pixels_per_image: Positive | None = 4096
    """Pixels of each train image that learn, drawn among those that count; null: all of them, as
    published."""
    min_pixels: NonNegative = 20
    """A class with fewer pixels than this in a train image is ignored there, as published."""
    memory_bytes: Positive = 8 << 30
    """Most that the features of the train pixels may take."""
    mlp: PixelMlpSpec | None = PixelMlpSpec()
    linear: PixelLinearSpec | None = None
    """`linear: {}` takes the defaults: what each (tap, timestep) is worth."""
    pixels: bool = True
    """Also train the ensemble on the colours of the pixels, the floor that features must beat."""
    save_predictions: bool = True
    seed: int = 0
