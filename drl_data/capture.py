"""Capture of taps during one forward: hooks, parts of what they see, the early end.

Hooks sit on the library's own modules and its forward is never rewritten. When the last tap has
fired the forward is abandoned by a private exception, so nothing past it is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drl_data.attention import AttentionWatch
from drl_data.errors import TapError
from drl_data.reduce import PROBABILITIES, at_source, reduce
from drl_data.taps import ResolvedTap


@dataclass(frozen=True)
class Streams:
    """Tokens of a joint transformer: how many of each kind, and which kind comes first where both
    are in one tensor. An encoder's CLS and register tokens are its `n_text`, before the image."""

    n_image: int
    n_text: int
    text_first: bool = True


class _LastTapReached(BaseException):  # a signal, not an error; nothing may catch it
    """Raised from a hook to leave the forward; a BaseException so that no model swallows it."""


def capture(
    model: nn.Module,
    taps: Sequence[ResolvedTap],
    forward: Callable[[], object],
    transform: Callable[[ResolvedTap, Tensor], Tensor],
    *,
    stop_early: bool = True,
    streams: Streams | None = None,
) -> dict[str, Tensor]:
    """Run `forward` once and return {tap name: transform(tap, tensor)}.

    `transform` runs inside the hook, before the model can change the tensor in place. A module
    that is called several times in one forward gives the tensor of its first call. With
    `stop_early` the forward ends at the last tap; the tensors are the same either way. `streams`
    says how image and text tokens lie in a joint transformer: image tokens are the default.

    Raises:
        TapError: if a tap did not fire, or fired with something that holds no tensor.
    """
    captured: dict[str, Tensor] = {}

    def take(tap: ResolvedTap, tensor: Tensor) -> None:
        if tap.name in captured:
            return
        captured[tap.name] = transform(tap, tensor)
        if stop_early and len(captured) == len(taps):
            raise _LastTapReached

    with _hooks(model, taps, take, streams), suppress(_LastTapReached):
        forward()
    missing = [tap.address for tap in taps if tap.name not in captured]
    if missing:
        raise TapError(
            f"the forward never reached {', '.join(missing)}: the module exists but is not called "
            "with this conditioning (or, for attn.probs, does not call "
            "F.scaled_dot_product_attention); tap another module"
        )
    return captured


Take = Callable[[ResolvedTap, Tensor], None]


@contextmanager
def _hooks(
    model: nn.Module, taps: Sequence[ResolvedTap], take: Take, streams: Streams | None
) -> Iterator[None]:
    """The hooks of all taps, while the block runs."""
    probs: dict[str, list[ResolvedTap]] = defaultdict(list)
    handles: list[RemovableHandle] = []
    with ExitStack() as stack:
        for tap in taps:
            if tap.site == "attn.probs":
                probs[tap.module].append(tap)
            else:
                handles.append(_hook(model.get_submodule(tap.module), tap, take, streams))
        if probs:
            watch = AttentionWatch(
                {path: [_taker(tap, take, streams) for tap in group]
                 for path, group in probs.items()}
            )  # fmt: skip
            stack.enter_context(watch)
            for path in probs:
                handles += _watch(model.get_submodule(path), path, watch)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _watch(module: nn.Module, path: str, watch: AttentionWatch) -> list[RemovableHandle]:
    return [
        module.register_forward_pre_hook(lambda *_: watch.enter(path)),
        module.register_forward_hook(lambda *_: watch.leave()),
    ]


def _hook(
    module: nn.Module, tap: ResolvedTap, take: Take, streams: Streams | None
) -> RemovableHandle:
    if tap.site in ("in", "modulation"):

        def before(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
            if tap.site == "modulation":
                take(tap, _apply_parts(tap, _modulation_of(tap, module, (*args, *kwargs.values())),
                                       tap.parts, streams))  # fmt: skip
            else:
                take(tap, _tensor_of(tap, (*args, *kwargs.values()), streams, text_first=False))

        return module.register_forward_pre_hook(before, with_kwargs=True)
    # Blocks return (text, image), attentions (image, text), in every diffusers model with both.
    text_first = "Attention" not in type(module).__name__

    def after(_: nn.Module, args: tuple[object, ...], output: object) -> None:
        take(tap, _tensor_of(tap, output, streams, text_first=text_first))

    return module.register_forward_hook(after)


def _taker(
    tap: ResolvedTap, take: Take, streams: Streams | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None]]:
    """What keeps some samples' probabilities [b, h, q, k], and what takes all that was kept."""
    kinds = [part for part in tap.parts if not part.startswith("heads[")]
    heads = [part for part in tap.parts if part.startswith("heads[")]
    if streams is not None and not kinds:
        kinds = ["image"]

    def keep(x: Tensor) -> Tensor:
        if heads:
            x = x[:, [int(i) for i in heads[0][len("heads[") : -1].split(",")]]
        for axis, kind in zip((2, 3), kinds, strict=False):
            x = _stream(tap, x, axis, kind, streams)
        return reduce(x, PROBABILITIES, at_source(tap.reduce))[0]

    return keep, lambda x: take(tap, x)


def _modulation_of(tap: ResolvedTap, module: nn.Module, given: Sequence[object]) -> Tensor:
    """scale_shift_table + the block's time embedding, [b, 6 c] (PixArt-alpha, section 2.3)."""
    table = module.get_parameter("scale_shift_table")
    for value in given:
        if isinstance(value, Tensor) and value.shape[1:] == (table.numel(),):
            return table.flatten()[None] + value
    raise TapError(
        f"tap {tap.address}: the block was called without a modulation of {table.numel()} "
        f"channels, but with {_describe(tuple(given))}"
    )


def _tensor_of(
    tap: ResolvedTap, value: object, streams: Streams | None, *, text_first: bool
) -> Tensor:
    """The tensor itself, the entry of a tuple that is meant, or the first tensor of many."""
    parts = tap.parts
    chosen: Tensor | None = None
    if isinstance(value, Tensor) and not (parts and parts[0].isdecimal()):
        chosen = value
    elif isinstance(value, tuple | list | Mapping):
        entries = tuple(value.values()) if isinstance(value, Mapping) else tuple(value)
        if parts and parts[0].isdecimal():
            entries, parts = entries[int(parts[0]) : int(parts[0]) + 1], parts[1:]
        tensors = [entry for entry in entries if isinstance(entry, Tensor)]
        if len(tensors) > 1 and streams is not None:
            text = "text" in parts
            n_tokens = streams.n_text if text else streams.n_image
            same = [x for x in tensors if x.ndim == 3 and x.shape[1] == n_tokens]
            # Of two streams with equally many tokens, the order tells which is which.
            tensors = ([same[0] if text == text_first else same[-1]] if same else []) or tensors
        chosen = tensors[0] if tensors else None
    if chosen is None:
        raise TapError(
            f"tap {tap.address}: no tensor there, the module gave {_describe(value)}; "
            "choose an entry with @out.N or @in.N"
        )
    return _apply_parts(tap, chosen, parts, streams)


def _apply_parts(
    tap: ResolvedTap, x: Tensor, parts: Sequence[str], streams: Streams | None
) -> Tensor:
    """Tokens of one stream, the CLS token, channels; in joint tensors, image tokens by default."""
    if streams is not None and not {"image", "text", "patches", "cls"} & set(parts):
        joint = x.ndim == 3 and x.shape[1] == streams.n_image + streams.n_text
        x = _stream(tap, x, 1, "image", streams) if joint else x
    for part in parts:
        if part == "cls":
            x = x[:, 0]
        elif part.startswith("channels["):
            axis = -1 if x.ndim == 3 else 1
            bounds = [piece.split(":") for piece in part[len("channels[") : -1].split(",")]
            pieces = [x.narrow(axis, int(a), int(b) - int(a)) for a, b in bounds]
            x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
        elif part in ("image", "text", "patches"):
            x = _stream(tap, x, 1, part, streams)
        else:
            raise TapError(f"tap {tap.address}: the part {part} means nothing at this site")
    return x


def _stream(tap: ResolvedTap, x: Tensor, axis: int, kind: str, streams: Streams | None) -> Tensor:
    """The tokens of one kind along an axis that has them alone, or both."""
    if streams is None:
        if kind == "image":
            return x
        raise TapError(f"tap {tap.address}: this model has no {kind} tokens apart from others")
    n_wanted, n_other = streams.n_image, streams.n_text
    if kind == "text":
        n_wanted, n_other = n_other, n_wanted
    n = x.shape[axis]
    if n == n_wanted:
        return x
    if n != n_wanted + n_other:
        raise TapError(
            f"tap {tap.address}: {n} tokens; want {n_wanted} of {kind}, or {n_wanted + n_other} "
            "with the other stream"
        )
    first = (kind == "text") == streams.text_first
    return x.narrow(axis, 0 if first else n - n_wanted, n_wanted)


def _describe(value: object) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_describe(entry) for entry in value) + ")"
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return type(value).__name__
