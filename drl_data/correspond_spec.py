"""The section `correspond` of a pipeline file: keypoints matched between images (DIFT)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from drl_data.spec_base import Positive, SizePair, Spec, StrTuple, Timestep, as_tuple


class FusedTap(Spec):
    """One part of a fusion: its vectors are normalised, then weighted."""

    tap: str
    """`NAME/TAP` of one of `correspond.stores`."""
    timestep: Timestep | None = None
    """Not needed where the tap does not depend on it, or the store has one timestep."""
    weight: Annotated[float, Field(gt=0)] = 1.0


Warps = Literal["shift", "rotate", "rotate90", "zoom"]


class WarpCheckSpec(Spec):
    """Matches whose truth is known: images of the store against themselves, warped.

    Free: the same map, the map mirrored and turned (which try the matcher alone), and the views
    that the store has. `computed` warps images, and computes their features with the backbone.
    """

    images: Positive = 16
    """Rows, evenly spaced."""
    points: Positive = 8
    """Side of the grid of points on each."""
    split: str | None = None
    computed: Annotated[tuple[Warps, ...], BeforeValidator(as_tuple)] = ()
    shift: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Of the image's sides, down and to the right; what comes in is black."""
    degrees: float = 15.0
    scale: Annotated[float, Field(gt=0)] = 1.25


class CorrespondSpec(Spec):
    """Nearest neighbours of keypoints by cosine, for each (tap, timestep), and their PCK (Tang et
    al. 2023).

    `pairs` is a file of pairs (Parquet, or JSON lines) or SPair-71k's folder of annotations, as
    pairs.py says. `check` does without: warps whose truth is known. At least one of them is done;
    without either, `check` with its defaults.
    """

    pairs: str | None = None
    taps: StrTuple = ()
    timesteps: Annotated[tuple[Timestep, ...], BeforeValidator(as_tuple)] = ()
    """Default: all maps of the store, at all of its timesteps."""
    grids: Annotated[dict[str, SizePair], Field(default_factory=dict)]
    """Height and width of taps whose rows are tokens; default: the square."""
    view: str | None = None
    """`id` or `hflip`; default: the store's first, which must be one of them."""
    stores: Annotated[dict[str, str], Field(default_factory=dict)]
    """Other pipeline files, whose stores `fuse` may name: {name: path}. Rows are joined by key."""
    fuse: Annotated[dict[str, tuple[FusedTap, ...]], Field(default_factory=dict)]
    """Cells to concatenate, each normalised and weighted (SD+DINO): {name: [taps]}."""
    alphas: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (0.01, 0.05, 0.1, 0.15)
    relative_to: Literal["box", "image"] | None = None
    """A match is right within alpha times the longer side of the target's bounding box, or of the
    target image. Default: of the box, if all pairs have one."""
    search: Literal["image", "input", "map"] = "image"
    """Where matches may lie: on the pixels of the original image (as DIFT upsamples its maps), on
    those of the backbone's input, or on the cells of the map."""
    cycle: bool = True
    """Also match the found points back, and count those that return to within alpha."""
    check: WarpCheckSpec | None = None

    @model_validator(mode="after")
    def _fused_are_several(self) -> CorrespondSpec:
        for name, parts in self.fuse.items():
            if len(parts) < 2:
                raise ValueError(f"fuse.{name}: {len(parts)} taps; want two or more")
        if len(set(self.alphas)) < len(self.alphas):
            raise ValueError(f"alphas {list(self.alphas)}: want each number once")
        return self
