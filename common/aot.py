"""Compiles a config's step without running it: memory and FLOPs before you book."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common import loop
from common import mesh as meshes
from common.experiment import Experiment


class Cost(NamedTuple):
    """Of one compiled step, per device."""

    devices: int
    parameters: int  # Numbers in the leaves under `params`, all devices together.
    state_bytes: int
    temporary_bytes: int
    flops: float


def compile_step(experiment: Experiment, config: Any) -> Cost:
    """Compiles the step for the config's mesh from shapes alone.

    XLA counts the body of a loop once, so `flops` is a lower bound where the step
    loops; experiments that know better say so in their own figures.
    """
    mesh = meshes.make(**config.mesh)
    with jax.set_mesh(mesh):
        placed = loop.shapes(experiment, mesh)
        batch = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                np.shape(a),
                np.asarray(a).dtype,
                sharding=NamedSharding(mesh, P("data")),
            ),
            experiment.batch(0),
        )
        lowered = loop.stepper(experiment, placed).lower(
            placed, batch, jax.random.key(0), jnp.uint32(0)
        )
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    params = getattr(placed, "params", ())
    return Cost(
        devices=mesh.size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=cost.get("flops", float("nan")),
    )


def describe(cost: Cost) -> str:
    """The cost in Markdown."""
    gib = 2**30
    return "\n".join(
        [
            "| compiled step | |",
            "|---|---|",
            f"| devices | {cost.devices} |",
            f"| parameters | {cost.parameters:,} |",
            f"| state per device | {cost.state_bytes / gib:.3f} GiB |",
            f"| temporaries per device | {cost.temporary_bytes / gib:.3f} GiB |",
            f"| FLOPs per device, loop bodies counted once | {cost.flops:.3e} |",
        ]
    )
