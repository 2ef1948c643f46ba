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

from drl_data.attention import AttentionWatch, Operand
from drl_data.errors import TapError
from drl_data.reduce import PROBABILITIES, at_source, reduce
from drl_data.tap_sites import is_text, n_heads
from drl_data.taps import ResolvedTap

OPERANDS: Mapping[str, Operand] = {"attn.query": "query", "attn.key": "key"}
"""Sites of what an attention multiplies."""

MAX_PREFIX_TOKENS = 16
"""More tokens than this before an encoder's patches are no class token and registers."""


@dataclass(frozen=True)
class Streams:
    """Tokens of a transformer that has more than the image's, and where they lie.

    Of a joint transformer `n_text` are the text's (of the longest in the batch), and `text_first`
    says which kind comes first where both are in one tensor. An encoder has None: whatever is
    before its patches, the class token first.
    """

    n_image: int
    n_text: int | None
    text_first: bool = True
    multiple: int = 1
    """Each kind is padded behind to a multiple of so many tokens, which are nobody's."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Parts that name tokens; the first one is meant where a tap names none."""
        return ("patches", "cls", "prefix") if self.n_text is None else ("image", "text")

    def holds(self, n_tokens: int) -> bool:
        """Whether so many tokens are an encoder's patches with others before them."""
        return self.n_text is None and 0 < n_tokens - self.n_image <= MAX_PREFIX_TOKENS

    def span(self, n_tokens: int, kind: str) -> tuple[int, int] | None:
        """(first, number) of the tokens of a kind among `n_tokens` that are all of this kind, or of
        a joint transformer's both; None if they are neither."""
        assert self.n_text is not None
        wanted, other = self.n_image, self.n_text
        if kind == "text":
            wanted, other = other, wanted
        before = other + -other % self.multiple
        alone = wanted + -wanted % self.multiple
        if n_tokens == alone:
            return 0, wanted
        if n_tokens != alone + before:
            return None
        return (0 if (kind == "text") == self.text_first else before), wanted


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
    says how the image's tokens lie among others: they are the default.

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
            "with this conditioning (or, for attn.probs, attn.query and attn.key, does not call "
            "F.scaled_dot_product_attention); tap another module"
        )
    return captured


Take = Callable[[ResolvedTap, Tensor], None]


@contextmanager
def _hooks(
    model: nn.Module, taps: Sequence[ResolvedTap], take: Take, streams: Streams | None
) -> Iterator[None]:
    """The hooks of all taps, while the block runs."""
    watched: dict[str, list[ResolvedTap]] = defaultdict(list)
    handles: list[RemovableHandle] = []
    with ExitStack() as stack:
        for tap in taps:
            if tap.site == "attn.probs" or tap.site in OPERANDS:
                watched[tap.module].append(tap)
            else:
                handles.append(_hook(model, tap, take, streams))
        if watched:
            watch = AttentionWatch(
                {
                    path: [_taker(tap, take, streams) for tap in group if tap.site == "attn.probs"]
                    for path, group in watched.items()
                },
                {
                    path: [
                        (OPERANDS[tap.site], _operand_taker(tap, take, streams))
                        for tap in group
                        if tap.site in OPERANDS
                    ]
                    for path, group in watched.items()
                },
            )
            stack.enter_context(watch)
            for path in watched:
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
    model: nn.Module, tap: ResolvedTap, take: Take, streams: Streams | None
) -> RemovableHandle:
    module, heads = model.get_submodule(tap.module), _heads_apart(model, tap.module)
    if tap.site in ("in", "modulation"):

        def before(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
            if tap.site == "modulation":
                take(tap, _apply_parts(tap, _modulation_of(tap, module, (*args, *kwargs.values())),
                                       tap.parts, streams))  # fmt: skip
            else:
                given = tuple(_together(x, heads) for x in (*args, *kwargs.values()))
                take(tap, _tensor_of(tap, given, streams, text_first=False))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[object, ...], output: object) -> None:
        value = _together(output, heads)
        take(tap, _tensor_of(tap, value, streams, text_first=_gives_text_first(module)))

    return module.register_forward_hook(after)


def image_output(
    model: nn.Module, path: str, output: object, streams: Streams | None
) -> Tensor | None:
    """What a tap on a module's output takes by default; None where there is no tensor."""
    value = _together(output, _heads_apart(model, path))
    text_first = _gives_text_first(model.get_submodule(path))
    found = _choose(value, (), streams, text_first=text_first)[0]
    return None if found is None else _by_default(path, found, streams)


def _heads_apart(model: nn.Module, path: str) -> int | None:
    """Heads of the attention whose norm of queries or keys a module is; None for others."""
    parent, _, name = path.rpartition(".")
    is_norm = name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return n_heads(model.get_submodule(parent)) if is_norm else None


def _together(value: object, heads: int | None) -> object:
    """Tokens [b, n, h d] of the [b, n, h, d] or [b, h, n, d] that a norm of each head sees; any
    other value as it is. With as many tokens as heads they are taken for [b, n, h, d]."""
    if heads is None or not isinstance(value, Tensor) or value.ndim != 4:
        return value
    if value.shape[2] == heads:
        return value.flatten(2)
    return value.transpose(1, 2).flatten(2) if value.shape[1] == heads else value


def _gives_text_first(module: nn.Module) -> bool:
    """Blocks return (text, image), attentions (image, text), in every diffusers model with both;
    but CogVideoX's blocks and norms too return (image, text)."""
    name = type(module).__name__
    return "Attention" not in name and not name.startswith("CogVideoX")


def _taker(
    tap: ResolvedTap, take: Take, streams: Streams | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None]]:
    """What keeps some samples' probabilities [b, h, q, k], and what takes all that was kept."""
    kinds = [part for part in tap.parts if not part.startswith("heads[")]
    heads = [part for part in tap.parts if part.startswith("heads[")]
    if streams is not None and not kinds:
        kinds = [_kind_of(tap.module, streams)]

    def keep(x: Tensor) -> Tensor:
        if heads:
            x = x[:, [int(i) for i in heads[0][len("heads[") : -1].split(",")]]
        for axis, kind in zip((2, 3), kinds, strict=False):
            x = _stream(tap, x, axis, kind, streams)
        return reduce(x, PROBABILITIES, at_source(tap.reduce))[0]

    return keep, lambda x: take(tap, x)


def _operand_taker(
    tap: ResolvedTap, take: Take, streams: Streams | None
) -> Callable[[Tensor], None]:
    """What takes the queries or the keys [b, n, c] of an attention."""
    return lambda x: take(tap, _apply_parts(tap, x, tap.parts, streams))


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
    chosen, parts = _choose(value, tap.parts, streams, text_first=text_first)
    if chosen is None:
        raise TapError(
            f"tap {tap.address}: no tensor there, the module gave {_describe(value)}; "
            "choose an entry with @out.N or @in.N"
        )
    return _apply_parts(tap, chosen, parts, streams)


def _choose(
    value: object, parts: tuple[str, ...], streams: Streams | None, *, text_first: bool
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The tensor among what a module gives, and the parts that are left to take of it."""
    by_position = bool(parts) and parts[0].isdecimal()
    if isinstance(value, Tensor) and not by_position:
        return value, parts
    if not isinstance(value, tuple | list | Mapping):
        return None, parts
    entries = tuple(value.values()) if isinstance(value, Mapping) else tuple(value)
    if by_position:
        entries, parts = entries[int(parts[0]) : int(parts[0]) + 1], parts[1:]
    tensors = [x for x in entries if isinstance(x, Tensor) and not x.is_complex()]  # no rotations
    if len(tensors) > 1 and streams is not None and streams.n_text is not None:
        text = "text" in parts
        n_tokens = streams.n_text if text else streams.n_image
        same = [x for x in tensors if x.ndim == 3 and x.shape[1] == n_tokens]
        # Of two streams with equally many tokens, the order tells which is which.
        tensors = ([same[0] if text == text_first else same[-1]] if same else []) or tensors
    return (tensors[0] if tensors else None), parts


def _apply_parts(
    tap: ResolvedTap, x: Tensor, parts: Sequence[str], streams: Streams | None
) -> Tensor:
    """Tokens of one stream, the class token, channels; by default the image's tokens."""
    if {"image", "text", "patches", "cls", "prefix"}.isdisjoint(parts):
        x = _by_default(tap.module, x, streams)
    for part in parts:
        if part.startswith("channels["):
            axis = -1 if x.ndim == 3 else 1
            bounds = [piece.split(":") for piece in part[len("channels[") : -1].split(",")]
            pieces = [x.narrow(axis, int(a), int(b) - int(a)) for a, b in bounds]
            x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
        elif part in ("image", "text", "patches", "cls", "prefix"):
            x = _stream(tap, x, 1, part, streams)
            x = x[:, 0] if part == "cls" else x
        else:
            raise TapError(f"tap {tap.address}: the part {part} means nothing at this site")
    return x


def _kind_of(module: str, streams: Streams) -> str:
    """The tokens that are meant at a module where a tap names none."""
    return "text" if streams.n_text is not None and is_text(module) else streams.kinds[0]


def _by_default(module: str, x: Tensor, streams: Streams | None) -> Tensor:
    """The image's tokens where x holds others too; the text's of a module that sees only those."""
    if streams is None or x.ndim != 3:
        return x
    if streams.n_text is None:
        return x[:, -streams.n_image :] if streams.holds(x.shape[1]) else x
    span = streams.span(x.shape[1], _kind_of(module, streams))
    return x if span is None else x.narrow(1, *span)


def _stream(tap: ResolvedTap, x: Tensor, axis: int, kind: str, streams: Streams | None) -> Tensor:
    """The tokens of one kind along an axis that has them alone, or with others."""
    if streams is None and kind == "image":
        return x
    if streams is None or kind not in streams.kinds:
        has = "tells no tokens apart" if streams is None else f"has {' and '.join(streams.kinds)}"
        raise TapError(f"tap {tap.address}: no tokens named {kind!r}, this model {has}")
    n = x.shape[axis] if x.ndim > 2 else 0
    if streams.n_text is None:
        n_prefix = n - streams.n_image if 0 <= n - streams.n_image <= MAX_PREFIX_TOKENS else -1
        if n_prefix < (0 if kind == "patches" else 1):
            what = "patches of this image" if kind == "patches" else "token before its patches"
            raise TapError(f"tap {tap.address}: {list(x.shape)} has no {what}")
        start, length = {
            "patches": (n_prefix, streams.n_image),
            "cls": (0, 1),
            "prefix": (0, n_prefix),
        }[kind]
        return x.narrow(axis, start, length)
    span = streams.span(n, kind)
    if span is None:
        wanted = streams.n_text if kind == "text" else streams.n_image
        raise TapError(
            f"tap {tap.address}: {n} tokens; want {wanted} of {kind}, or "
            f"{streams.n_image + streams.n_text} with the other stream"
        )
    return x.narrow(axis, *span)


def _describe(value: object) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_describe(entry) for entry in value) + ")"
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return type(value).__name__
