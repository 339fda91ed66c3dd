"""Compiles a config's step without running it: memory and FLOPs before you book."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common import loop
from common import mesh as meshes
from common.errors import UserError, reject
from common.experiment import Experiment


class Cost(NamedTuple):
    """Of one compiled step, per device."""

    devices: int
    parameters: int  # Numbers in the leaves under `params`, all devices together.
    state_bytes: int
    temporary_bytes: int
    flops: dict[str, float]  # By part, all devices together, where the experiment knows.


def compile_step(experiment: Experiment, config: Any, topology: str = "") -> Cost:
    """Compiles the step for the config's mesh from shapes alone.

    FLOPs are the experiment's own count where it has one; XLA's counts the body of a loop
    once, whatever its length.

    Args:
      topology: TPUs to compile for, such as "v5e:4x4", without having them; empty for
        the devices that are here.

    Raises:
      UserError: the topology is not known, libtpu is not installed, the devices do not
        divide the state, or the compiler refuses the step.
    """
    devices = tpus(topology) if topology else None
    mesh = meshes.make(**config.mesh, devices=devices)
    with jax.set_mesh(mesh):
        placed = loop.shapes(experiment, mesh)
        made, parts = experiment.batch(0), mesh.shape["data"]
        if any(len(a) % parts for a in jax.tree.leaves(made)):
            rows = len(jax.tree.leaves(made)[0])
            raise reject("mesh.data", parts, f"a divisor of the batch's {rows} rows")
        batch = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                np.shape(a),
                np.asarray(a).dtype,
                sharding=NamedSharding(mesh, P("data")),
            ),
            made,
        )
        # Nothing may be computed here: these devices may not exist.
        key = jax.eval_shape(lambda: jax.random.key(0))
        number = jax.ShapeDtypeStruct((), np.dtype("uint32"))
        lowered = loop.stepper(experiment, placed).lower(placed, batch, key, number)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"The step does not compile for {mesh.size} devices: {reason}"
            ) from error
    memory = compiled.memory_analysis()
    counted = (compiled.cost_analysis() or {}).get("flops", float("nan"))
    flops = experiment.cost() if experiment.cost else {}
    params = getattr(placed, "params", ())
    return Cost(
        devices=mesh.size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=flops or {"compiled step, each loop body once": counted * mesh.size},
    )


def tpus(topology: str) -> list:
    """Descriptions of the chips of a TPU topology, such as "v5e:4x4"; none is needed.

    Raises:
      UserError: it is not known, or libtpu is not installed.
    """
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"--input={topology} is no TPU topology to compile for, such as v5e:4x4, or the "
            f"extra `tpu` is not installed: {reason}"
        ) from error


def describe(cost: Cost) -> str:
    """The cost in Markdown."""
    gib = 2**30
    rows = [
        ("devices", f"{cost.devices}"),
        ("parameters", f"{cost.parameters:,}"),
        ("state per device", f"{cost.state_bytes / gib:.3f} GiB"),
        ("temporaries per device", f"{cost.temporary_bytes / gib:.3f} GiB"),
        *((f"FLOPs, {part}", f"{value:.2e}") for part, value in cost.flops.items()),
        ("FLOPs in all", f"{sum(cost.flops.values()):.2e}"),
    ]
    return "\n".join(["| compiled step | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
