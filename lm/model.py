"""What a language model is to those that train it and write with it: pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

Params = Any
Cache = dict[str, Array]


class Model(NamedTuple):
    """A language model as pure functions.

    Attributes:
      init: key -> params, float32 (float64 where that is the dtype).
      apply: (params, tokens [B, T], positions [B or 1, T] = 0, 1, ..., segments [B, T] =
        one) -> logits [B, T, V], float32 or wider; logits[:, t] are of the token at t + 1
        (of a model that is not causal, at t). Attention stays among tokens of the same
        segment, an int per document of a packed row; what is earlier is a matter of the
        place in the row. Positions enter the rotation, where only their differences
        matter, and `block`.
      hidden, head: the same in two, apply = head(params, hidden(params, ...)): features
        [B, T, d] after the last norm, and logits of any of them, [B, R, d] -> [B, R, V].
      start: (batch, length, dtype = that of the model) -> an empty cache of keys and
        values, {"k", "v"}: [L, B, length, kv_heads, c].
      extend: (params, cache, tokens [B, t], positions [B or 1, t]) -> (logits [B, t, V],
        cache). A position is the slot that is written, and a token sees all slots up to
        its own: fill them from 0 without gaps. Slots beyond `length` are dropped. What
        comes out is what `apply` gives for the whole row.
      fill: `hidden` that also returns the cache of all its keys and values.
      window: (params, cache, tokens [B, w], start, positions, segments) -> (features
        [B, w, d], cache) of slots start ... start + w - 1 only; the others stay as the
        cache has them. Positions and segments are those of all slots. Slots beyond the
        cache are dropped, and their features mean nothing.
      vocab: V.
      block: of `transformer`.
    """

    init: Callable[..., Params]
    apply: Callable[..., Array]
    hidden: Callable[..., Array]
    head: Callable[..., Array]
    start: Callable[..., Cache]
    extend: Callable[..., tuple[Array, Cache]]
    fill: Callable[..., tuple[Array, Cache]]
    window: Callable[..., tuple[Array, Cache]]
    vocab: int
    block: int = 0
