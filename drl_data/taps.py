"""Taps: named tensors inside a model. Parse them, and resolve them against the module tree.

    tap     = pattern ["@" site {"." part}]  |  model site {"." part}
    pattern = dotted module path; `*` matches within one component, `**` any number of them;
              `vae.` before a path is the VAE, `vae.enc[i]` and `vae.dec[i]` its i-th block
    site    = "out" (default) | "in" | pre_residual | pre_concat | skip | adaln | ff.in
              | attn.q | attn.k | attn.v | attn.out | attn.probs          (tap_sites.py)
              | attn.query | attn.key        q and k after their norm and rotary embedding
    model site = latent | x0 | eps | v | loss
    part    = position in the tuple that the module returns, or is called with
              | image | text                       tokens of one stream of a joint transformer
              | patches | cls | prefix             of an encoder: its image, class token, and all
                                                   tokens before the patches
              | heads[0,3] | channels[0:320]       of an attention; of anything
              | shift | scale | gate ...           of adaln
              | noisy | moments                    of latent
              | l1 | huber                         of loss, which otherwise is the squared error

Examples: `mid_block`, `up_blocks.*.resnets.*@pre_residual`, `up_blocks.1.resnets.2@in`,
`transformer_blocks.9.attn@attn.probs.image.text`, `**.attn1@attn.k.heads[0,3]`, `latent.moments`.

Names of other projects are taps too: `cleandift:us6`, `ldm:output_blocks.4` (tap_names.py).

`latent` is what the denoiser's input is made of, `latent.noisy` that input, `latent.moments` the
posterior's mean and std before any scaling; `x0 eps v` are the network's output as that
prediction, v being alpha eps - sigma x0, of a flow eps - x0. A site that stands for another
module is resolved to it, and the store records that.

`loss` is the mean over the image of the squared error of the network's prediction, for each of
`condition.candidates` and each member: a table [candidate, member] for each image and timestep.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from drl_data.errors import TapError
from drl_data.reduce import at_source
from drl_data.spec import TapSpec
from drl_data.tap_names import OF_THE_FIRST, translated
from drl_data.tap_sites import LOSS, MODEL_SITES, MODULATION_PARTS, SITES, Modules, Place, expand

VAE = "vae."


@dataclass(frozen=True)
class ResolvedTap:
    """One tensor: `name` is the array's, `module` the exact dotted path ("" for the model's own).

    `modulation`: shift and scale of the block, for the reduction `adaln`.
    """

    name: str
    module: str
    site: str
    parts: tuple[str, ...] = ()
    reduce: tuple[str, ...] = ()
    modulation: tuple[ResolvedTap, ...] = ()

    @property
    def address(self) -> str:
        """`module@site{.part}`, without globs and without sites that stand for another: what the
        store records. Resolving it gives the same tensor."""
        own = ".".join((f"{self.module}@{self.site}" if self.module else self.site, *self.parts))
        return " + ".join((own, *(tap.address for tap in self.modulation)))

    @property
    def later(self) -> tuple[str, ...]:
        """The reductions that are left when the tap has been taken."""
        n_done = len(at_source(self.reduce)) if self.site == "attn.probs" else 0
        return self.reduce[n_done:]

    @property
    def is_timeless(self) -> bool:
        """Whether the tensor is the same at every timestep."""
        return self.module.startswith(VAE) or (self.site == "latent" and self.parts != ("noisy",))


_PART = (
    r"image|text|patches|cls|prefix|noisy|moments|l1|huber|heads\[\d+(?:,\d+)*\]"
    r"|channels\[\d+:\d+(?:,\d+:\d+)*\]|" + "|".join(sorted(MODULATION_PARTS, reverse=True))
)
_SITE = "|".join(map(re.escape, sorted({*SITES, *MODEL_SITES}, key=len, reverse=True)))
_TAP = re.compile(
    rf"(?P<pattern>[^@\s]*)(?:@(?P<site>{_SITE})(?:\.(?P<index>\d+))?(?P<parts>(?:\.(?:{_PART}))*))?"
)
_BARE = re.compile(rf"(?P<site>{'|'.join(MODEL_SITES)})(?P<parts>(?:\.(?:{_PART}))*)")
_MODEL_PARTS = {"latent": ("noisy", "moments"), LOSS: ("l1", "huber")}
_VAE_BLOCK = re.compile(r"vae\.(enc|dec)\[([\d*?]+)\]")


def parse(path: str) -> tuple[str, str, tuple[str, ...]]:
    """Split a tap into (pattern, site, parts); the pattern is "" for a site of the whole model.

    Raises:
        TapError: if the text is not a tap.
    """
    match = _BARE.fullmatch(path) or _TAP.fullmatch(path)
    groups = match.groupdict() if match else {}
    pattern, site = groups.get("pattern") or "", groups.get("site") or "out"
    if match is None or (pattern == "") != (site in MODEL_SITES):
        raise TapError(
            f"tap {path!r}: want module.path[@site][.part] with site one of {', '.join(SITES)}, "
            f"or one of {', '.join(MODEL_SITES)}; for example 'mid_block', 'up_blocks.1@in', "
            "'down_blocks.0@out.0' or '**.attn1@attn.q'"
        )
    pattern = _VAE_BLOCK.sub(
        lambda m: f"vae.{'encoder.down' if m[1] == 'enc' else 'decoder.up'}_blocks.{m[2]}", pattern
    )
    parts = tuple(re.findall(_PART, groups.get("parts") or ""))
    index = groups.get("index")
    return pattern, site, parts if index is None else (index, *parts)


def resolve(
    model: nn.Module, taps: Sequence[TapSpec], vae: nn.Module | None = None
) -> tuple[ResolvedTap, ...]:
    """Expand globs against the module tree of `model`; in the order of `taps`, then of the tree.

    Raises:
        TapError: if a tap matches nothing (the nearest modules are named), if two arrays would
            have one name, or if no tap is given.
    """
    modules = dict(model.named_modules())
    if vae is not None:
        modules |= {f"{VAE}{name}": module for name, module in vae.named_modules() if name}
    resolved = [tap for spec in taps for tap in _resolve_one(translated(spec), modules)]
    if not resolved:
        raise TapError("no taps: a pipeline needs at least one under `taps:`")
    seen: dict[str, ResolvedTap] = {}
    for tap in resolved:
        if tap.name in seen:
            raise TapError(
                f"taps {seen[tap.name].address} and {tap.address} would both be the array "
                f"{tap.name!r}; give one of them a `name:`"
            )
        seen[tap.name] = tap
    return tuple(resolved)


def expand_aliases(
    taps: Sequence[TapSpec], aliases: Mapping[str, tuple[str, str]]
) -> list[TapSpec]:
    """Taps that use other names for modules, under the modules' own; the array keeps its alias.

    `aliases` maps a name to (the module whose output it is, the module whose input it is). A tap
    whose first component no alias has stays as it is.

    Raises:
        TapError: if such a tap matches no alias.
    """
    roots = {alias.split(".")[0] for alias in aliases}
    expanded: list[TapSpec] = []
    for spec in taps:
        pattern, site, parts = parse(translated(spec).path)
        if not pattern or pattern.split(".")[0] not in roots:
            expanded.append(spec)
            continue
        matches = _matching(spec, pattern, tuple(aliases))
        _check_name(spec, matches)
        for alias in matches:
            module = aliases[alias][1 if site in OF_THE_FIRST else 0]
            address = ".".join((f"{module}@{site}", *parts))
            name = spec.name or f"{alias}{array_suffix(site, parts)}"
            expanded.append(TapSpec(path=address, name=name, reduce=spec.reduce))
    return expanded


def _matching(spec: TapSpec, pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a tap's pattern matches, at least one."""
    expression = re.compile(glob_to_regex(pattern))
    matches = [name for name in names if expression.fullmatch(name)]
    if not matches:
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or list(names[:5])
        raise TapError(
            f"tap {spec.path!r} matches no module of this model; nearest: {', '.join(near)} "
            "(`drl taps MODEL` lists them all)"
        )
    return matches


def _check_name(spec: TapSpec, matches: Sequence[str]) -> None:
    """Raise TapError if several arrays would have the one name that a tap gives."""
    if spec.name is not None and len(matches) > 1:
        raise TapError(
            f"tap {spec.path!r} has the name {spec.name!r} but matches {len(matches)} modules: "
            f"{', '.join(matches)}; leave `name` out, or name one module"
        )


def _resolve_one(spec: TapSpec, modules: Modules) -> list[ResolvedTap]:
    pattern, site, parts = parse(spec.path)
    if site in MODEL_SITES:
        own = _MODEL_PARTS.get(site, ())
        if parts and (len(parts) > 1 or parts[0] not in own):
            has = f"has the parts {' or '.join(own)}" if own else "has no parts"
            raise TapError(f"tap {spec.path}: the site {site} {has}")
        name = spec.name or ".".join((site, *parts))
        return [ResolvedTap(name, "", site, parts, spec.reduce)]
    names = [name for name in modules if name]
    matches = _matching(spec, pattern, names)
    found = {name: place for name in matches if (place := expand(modules, name, site, parts))}
    if not found:
        having = [name for name in names if expand(modules, name, site, parts)]
        near = difflib.get_close_matches(pattern, having, n=5, cutoff=0) or ["none"]
        raise TapError(
            f"tap {spec.path!r}: none of the {len(matches)} modules it matches has the site "
            f"{'.'.join((site, *parts))}; nearest that do: {', '.join(near)}"
        )
    _check_name(spec, tuple(found))
    suffix = array_suffix(site, parts)
    return [
        _resolved(spec, modules, name, spec.name or f"{name}{suffix}", place)
        for name, place in found.items()
    ]


def array_suffix(site: str, parts: Sequence[str]) -> str:
    """What an array's name adds to its module's for another tensor than the output."""
    suffix = "".join(f"-{word}" for word in (site, *parts) if word != "out")
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", suffix).rstrip("_")


def _resolved(
    spec: TapSpec, modules: Modules, matched: str, name: str, place: Place
) -> ResolvedTap:
    """The tap at one place, with the modulation of the module that was named if it needs it."""
    modulation: list[ResolvedTap] = []
    if "adaln" in spec.reduce:
        for part in ("shift", "scale"):
            at = expand(modules, matched, "adaln", (part,))
            if at is None:
                raise TapError(
                    f"tap {spec.path!r}: reduce adaln needs the {part} of {matched}, which has no "
                    "AdaLN; tap the input of a transformer block that has one"
                )
            modulation.append(ResolvedTap(f"{matched}@{part}", at.module, at.place, at.parts))
    if place.place == "attn.probs":
        selects = any(part.startswith("heads[") for part in place.parts)
        if not selects and not at_source(spec.reduce):
            raise TapError(
                f"tap {spec.path!r}: attention probabilities are heads x queries x keys for each "
                "sample; reduce them first by head_mean, head_sum, heads(...) or channels(...) "
                "(keys), or take @attn.probs.heads[...]"
            )
    return ResolvedTap(name, place.module, place.place, place.parts, spec.reduce, tuple(modulation))


def glob_to_regex(pattern: str) -> str:
    pieces = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(piece, re.escape(piece)) for piece in pieces)
