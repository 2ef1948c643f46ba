"""Taps: named tensors inside a model. Parse, resolve against the module tree, capture by hooks.

    tap     = pattern ["@" site ["." part]]
    pattern = dotted module path; `*` matches within one component, `**` any number of them
    site    = "out" (default) | "in"
    part    = position in the tuple that the module returns, or is called with (default: the first
              tensor), or the name of some of its tokens that an encoder has (`cls`,
              `patches`, `prefix`: those before the patches)

Examples: `mid_block`, `up_blocks.*.resnets.*`, `up_blocks.1.resnets.2@in`, `down_blocks.0@out.0`.

Hooks sit on the library's own modules and its forward is never rewritten. When the last tap has
fired the forward is abandoned by a private exception, so nothing past it is computed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drl_data.errors import TapError
from drl_data.spec import TapSpec

SITES = ("out", "in")
TOKEN_PARTS = ("cls", "patches", "prefix")


@dataclass(frozen=True)
class ResolvedTap:
    """One tensor of one module: `name` is the array's, `module` the exact dotted path."""

    name: str
    module: str
    site: str
    part: int | str | None
    reduce: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """`module@site[.part]`, without globs: what the store records."""
        return f"{self.module}@{self.site}" + ("" if self.part is None else f".{self.part}")


_TAP = re.compile(
    r"^(?P<pattern>[^@\s]+)(?:@(?P<site>[a-z_]+)(?:\.(?P<part>\d+|"
    + "|".join(TOKEN_PARTS)
    + r"))?)?$"
)


def parse(path: str) -> tuple[str, str, int | str | None]:
    """Split `pattern[@site][.part]` into (pattern, site, part).

    Raises:
        TapError: if the text is not a tap.
    """
    match = _TAP.match(path)
    if match is None or (match["site"] or "out") not in SITES:
        raise TapError(
            f"tap {path!r}: want module.path[@site][.part] with site one of {', '.join(SITES)}, "
            "for example 'mid_block', 'up_blocks.1@in' or 'down_blocks.0@out.0'"
        )
    part = match["part"]
    position = int(part) if part is not None and part.isdigit() else part
    return match["pattern"], match["site"] or "out", position


def refuse_token_names(tap: ResolvedTap) -> None:
    """Raise TapError for a tap on tokens by name, of a family whose tokens have none."""
    if isinstance(tap.part, str):
        raise TapError(f"tap {tap.address}: this family has no tokens named {tap.part!r}")


def resolve(model: nn.Module, taps: Sequence[TapSpec]) -> tuple[ResolvedTap, ...]:
    """Expand globs against the module tree of `model`; in the order of `taps`, then of the tree.

    Raises:
        TapError: if a tap matches nothing (the nearest modules are named), if two arrays would
            have one name, or if no tap is given.
    """
    modules = [name for name, _ in model.named_modules() if name]
    resolved = [tap for spec in taps for tap in _resolve_one(spec, modules)]
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


def _resolve_one(spec: TapSpec, modules: Sequence[str]) -> list[ResolvedTap]:
    pattern, site, part = parse(spec.path)
    matches = _matching(spec, pattern, modules)
    suffix = _suffix(site, part)
    return [
        ResolvedTap(spec.name or f"{module}{suffix}", module, site, part, spec.reduce)
        for module in matches
    ]


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
        pattern, site, part = parse(spec.path)
        if pattern.split(".")[0] not in roots:
            expanded.append(spec)
            continue
        matches = _matching(spec, pattern, tuple(aliases))
        suffix = _suffix(site, part)
        for alias in matches:
            module = aliases[alias][1 if site == "in" else 0]
            address = f"{module}@{site}" + ("" if part is None else f".{part}")
            name = spec.name or f"{alias}{suffix}"
            expanded.append(TapSpec(path=address, name=name, reduce=spec.reduce))
    return expanded


def _matching(spec: TapSpec, pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a tap's pattern matches: at least one, and one only if the tap has a name."""
    expression = re.compile(_glob_to_regex(pattern))
    matches = [name for name in names if expression.fullmatch(name)]
    if not matches:
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or list(names[:5])
        raise TapError(
            f"tap {spec.path!r} matches no module of this model; nearest: {', '.join(near)} "
            "(`drl taps MODEL` lists them all)"
        )
    if spec.name is not None and len(matches) > 1:
        raise TapError(
            f"tap {spec.path!r} has the name {spec.name!r} but matches {len(matches)} modules: "
            f"{', '.join(matches)}; leave `name` out, or name one module"
        )
    return matches


def _suffix(site: str, part: int | str | None) -> str:
    """What an array's name adds to its module's for another tensor than the output."""
    return ("" if site == "out" else f"-{site}") + ("" if part is None else f"-{part}")


def _glob_to_regex(pattern: str) -> str:
    pieces = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(piece, re.escape(piece)) for piece in pieces)


class _LastTapReached(BaseException):  # a signal, not an error; nothing may catch it
    """Raised from a hook to leave the forward; a BaseException so that no model swallows it."""


def capture(
    model: nn.Module,
    taps: Sequence[ResolvedTap],
    forward: Callable[[], object],
    transform: Callable[[ResolvedTap, Tensor], Tensor],
    *,
    select: Callable[[ResolvedTap, object], object] = lambda tap, value: value,
    stop_early: bool = True,
) -> dict[str, Tensor]:
    """Run `forward` once and return {tap name: transform(tap, tensor)}.

    `transform` runs inside the hook, before the model can change the tensor in place. A module
    that is called several times in one forward gives the tensor of its first call. `select` says
    which part of what a module gives is meant by a tap that names none (several streams). With
    `stop_early` the forward ends at the last tap; the tensors are the same either way.

    Raises:
        TapError: if a tap did not fire, or fired with something that holds no tensor.
    """
    captured: dict[str, Tensor] = {}

    def take(tap: ResolvedTap, value: object) -> None:
        if tap.name in captured:
            return
        chosen = select(tap, value) if tap.part is None else value
        captured[tap.name] = transform(tap, _tensor_of(tap, chosen))
        if stop_early and len(captured) == len(taps):
            raise _LastTapReached

    handles = [_hook(model.get_submodule(tap.module), tap, take) for tap in taps]
    try:
        forward()
    except _LastTapReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [tap.address for tap in taps if tap.name not in captured]
    if missing:
        raise TapError(
            f"the forward never reached {', '.join(missing)}: the module exists but is not called "
            "with this conditioning; tap another module"
        )
    return captured


def _hook(
    module: nn.Module, tap: ResolvedTap, take: Callable[[ResolvedTap, object], None]
) -> torch.utils.hooks.RemovableHandle:
    if tap.site == "in":

        def before(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
            take(tap, (*args, *kwargs.values()))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[object, ...], output: object) -> None:
        take(tap, output)

    return module.register_forward_hook(after)


def _tensor_of(tap: ResolvedTap, value: object) -> Tensor:
    """The tensor itself, the `part`-th entry of a tuple, or the first tensor of many."""
    part = tap.part if isinstance(tap.part, int) else None
    if isinstance(value, Tensor) and part is None:
        return value
    entries = tuple(value.values()) if isinstance(value, Mapping) else value
    if isinstance(entries, tuple | list):
        chosen = entries if part is None else entries[part : part + 1]
        for entry in chosen:
            if isinstance(entry, Tensor):
                return entry
    raise TapError(
        f"tap {tap.address}: no tensor there, the module gave {_describe(value)}; "
        "choose an entry with @out.N or @in.N"
    )


def _describe(value: object) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_describe(entry) for entry in value) + ")"
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return type(value).__name__
