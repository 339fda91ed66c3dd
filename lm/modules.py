"""Which parameters of `lm.transformer` are modules for weight decay: 7 per layer."""

from typing import Any

from optim.modules import Dims

TYPES = ("q", "k", "v", "o", "gate", "up", "down")


def modules(name: str, leaf: Any) -> Dims | None:
    """q, k, v, o, gate, up and down of every block; layers are stacked along axis 0.

    Args:
      name: dotted path, such as `blocks.q.kernel`.
    """
    del leaf
    parts = name.split(".")
    return Dims(1, 2) if parts[0] == "blocks" and parts[1] in TYPES else None
