"""Training of U-Nets over 8 devices, their parameters split: the same as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from tests.diffusion.test_training import config, disturbed, started

SMALL = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
# EDM2 has no input for what an augmentation did.
NETWORKS = dict(
    unet=dict(augment=0.5, model=dict(name="unet", dropout=0.2, unet=SMALL)),
    edm2=dict(
        schedule=dict(kind="edm2"),
        model=dict(name="edm2", dropout=0.2, edm2=SMALL | dict(channels_per_head=8)),
    ),
)
# Adam divides by the size of the gradient: with its usual eps a sum over devices for a mean
# would not show, nor a rounding error stay one. So with clipping.
COMMON = dict(
    data=dict(class_cond=True),
    label_drop=0.3,
    optim=dict(learning_rate=0.02, rate="constant", eps=0.1, clip=0.0),
)


def two_steps(name, **changes):
    """The placed parameters before and after, the state and what each step shows."""
    c = config(**COMMON, **NETWORKS[name], **changes)
    shown = []
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made, state, step = started(c)
        state = disturbed(state)
        before = jax.device_get(state.params)
        for i in range(2):
            batch = meshes.to_devices(made.batch(i), mesh)
            state, values = step(state, batch, jax.random.key(1), jnp.uint32(i))
            shown.append(jax.device_get(values))
        return before, state, shown


def named(tree):
    return dict(zip(meshes.paths(tree), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_eight_devices_with_split_parameters_are_as_one(name):
    before, one, shown_one = two_steps(name)
    _, many, shown_many = two_steps(name, devices=8, fsdp=True)
    split = {n for n, a in named(many.params).items() if not a.sharding.is_fully_replicated}
    kernel = many.params["net"]["enc8_block0"]["conv0"]["kernel"]
    assert "net/enc8_block0/conv0/kernel" in split
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 3, 8, 1)}
    # Most of the network, and with it the moments and the averages.
    sizes = {n: a.size for n, a in named(many.params).items()}
    assert sum(sizes[n] for n in split) > 0.5 * sum(sizes.values())
    for tree, copies in ((many.opt, 2), (many.averages, len(many.averages.trees))):
        held = [n for n, a in named(tree).items() if not a.sharding.is_fully_replicated]
        assert len(held) == copies * len(split)
    for a, b in zip(shown_one, shown_many, strict=True):
        for figure in a:
            assert b[figure] == pytest.approx(a[figure], rel=1e-5), figure
    # Float32 sums in another order: some 1e-7 of the largest parameter of an array, 1e-6 of
    # its moments. The steps move every array by a hundred times the tolerance or more.
    a, b = named(jax.device_get(one)), named(jax.device_get(many))
    for n in a:
        np.testing.assert_allclose(
            b[n], a[n], rtol=0, atol=1e-5 * np.abs(a[n]).max(), err_msg=n
        )
    for n, start in named(before).items():
        size = np.abs(start).max()
        assert np.abs(a[f"params/{n}"] - start).max() > 1e-3 * size, n
