"""FLOPs counted by hand."""

import jax
import jax.numpy as jnp

from diffusion.cost import flops


def test_products_and_their_gradients():
    x, w = jnp.ones((8, 3)), jnp.ones((3, 5))
    assert flops(jnp.matmul, x, w) == 2 * 8 * 3 * 5
    loss = lambda w, x: jnp.sum((x @ w) ** 2)
    assert flops(jax.grad(loss), w, x) == 2 * 2 * 8 * 3 * 5
    assert flops(jax.grad(loss, (0, 1)), w, x) == 3 * 2 * 8 * 3 * 5


def test_batched_products():
    q = jnp.ones((2, 4, 7, 16))
    assert flops(lambda q: jnp.einsum("bhtc,bhsc->bhts", q, q), q) == 2 * 2 * 4 * 7 * 7 * 16


def test_convolutions_by_output_window_and_group():
    x, w = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6, 10))
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops(conv, x, w) == 2 * (2 * 4 * 4 * 10) * 9 * 6
    grouped = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    assert flops(grouped, x, jnp.ones((3, 3, 2, 9))) == 2 * (2 * 8 * 8 * 9) * 9 * 2


def test_loops_count_as_often_as_they_run():
    w = jnp.ones((4, 4))

    def loop(x):
        return jax.lax.scan(lambda h, _: (jax.jit(jnp.matmul)(h, w), None), x, None, length=7)[
            0
        ]

    assert flops(loop, w) == 7 * 2 * 4**3
    assert flops(jax.checkpoint(loop), w) == 7 * 2 * 4**3


def test_a_branch_counts_as_the_dearer_one():
    w = jnp.ones((4, 4))
    pick = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)
    assert flops(pick, w) == 2 * 2 * 4**3
