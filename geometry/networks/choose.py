"""Networks by name.

    two_frame          scalars and vectors, all states: the default
    periodic           the same on graphs with a cutoff, where edges fade out
    equi_transformer   the same with attention
    tensor_product     irreps up to l = 2; needs e3nn-jax
    egnn               scalars that push coordinates; tiny

Table 7.2 of the specification.
"""

import difflib
from typing import Any

from common.errors import reject
from geometry.network import Network
from geometry.networks.blocks import Settings, checked
from geometry.networks.egnn import egnn
from geometry.networks.equi_transformer import equi_transformer
from geometry.networks.tensor_product import tensor_product
from geometry.networks.two_frame import two_frame

NETWORKS = {
    "two_frame": two_frame,
    "periodic": lambda s: two_frame(s._replace(envelope=True)),
    "equi_transformer": equi_transformer,
    "tensor_product": tensor_product,
    "egnn": egnn,
}


def network(name: str = "two_frame", **fields: Any) -> Network:
    """The network of that name.

    Args:
      name: one of `NETWORKS`.
      fields: of `blocks.Settings`. One config serves all networks: what only another one
        has, as `heads`, is checked but not used.

    Raises:
      UserError: an unknown name or field, a value out of its range, or a package is missing.
    """
    if name not in NETWORKS:
        raise reject(
            "network.name", name, f"one of {', '.join(NETWORKS)}{_near(name, NETWORKS)}"
        )
    for field, value in fields.items():
        if field not in Settings._fields:
            known = Settings._fields
            allowed = f"left out: fields are {', '.join(known)}{_near(field, known)}"
            raise reject(f"network.{field}", value, allowed)
    return NETWORKS[name](checked(Settings(**fields)))


def _near(word: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (nearest: {near[0]})" if near else ""
