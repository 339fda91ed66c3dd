"""DiT and LightningDiT: the network in NumPy and float64, its start, and many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import mesh as meshes
from diffusion import dit
from tests.diffusion import reference as ref

SHAPE = (4, 8, 2)
SMALL = dict(dim=16, depth=2, heads=2, label_dim=3, vector_dim=5, cond_channels=1)
CASES = {
    "dit": dict(learn_variance=True),
    "lightning": dict(patch=1, norm="rms", activation="swiglu", rope=True),
    "pixels": dict(patch=4, heads=4, mlp=20),
}


def numpy_dit(p, x, noise, cond, o):
    d, heads, patch = o["dim"], o["heads"], o.get("patch", 2)
    rms, swiglu = o.get("norm") == "rms", o.get("activation") == "swiglu"

    def norm(x, p):
        x = x if rms else x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * p["scale"] if rms else x

    def rotate(q):
        """The pair (2i, 2i + 1) as a complex number: by the row, then by the column."""
        z = q[..., ::2] + 1j * q[..., 1::2]
        n = z.shape[-1] // 2
        f = 1e4 ** -(np.arange(n) / n)
        angle = np.concatenate([rows[:, None] * f, columns[:, None] * f], axis=1)
        z = z * np.exp(1j * angle)[:, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(q.shape)

    def turned(qkv):
        qkv = qkv.copy()
        if o.get("rope"):
            qkv[..., 0, :], qkv[..., 1, :] = rotate(qkv[..., 0, :]), rotate(qkv[..., 1, :])
        return qkv

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = np.concatenate([x, cond["channels"]], axis=-1)
    b, h, w, _ = x.shape
    places = [(i, j) for i in range(h // patch) for j in range(w // patch)]
    rows, columns = np.array(places, float).T
    cut = lambda i, j: (
        slice(None),
        slice(i * patch, (i + 1) * patch),
        slice(j * patch, (j + 1) * patch),
    )
    t = np.stack([x[cut(i, j)].reshape(b, -1) for i, j in places], axis=1)
    f = 1e4 ** -(np.arange(d // 4) / (d // 4))
    table = [g(place[:, None] * f) for place in (columns, rows) for g in (np.sin, np.cos)]
    t = ref.dense(t, p["patch"]) + np.concatenate(table, axis=1)
    e = ref.dense(ref.waves(noise, 1e4 ** -(np.arange(128) / 128)), p["noise0"])
    e = ref.dense(ref.silu(e), p["noise1"]) + p["label"]["embedding"][cond["label"]]
    e = ref.silu(e + ref.dense(cond["vector"], p["vector"]))
    for layer in range(o["depth"]):
        q = jax.tree.map(lambda a: a[layer], p["blocks"])  # noqa: B023
        mod = ref.dense(e, q["modulation"])[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(mod, 6, axis=-1)
        y = ref.dense(norm(t, q.get("norm1")) * (1 + scale1) + shift1, q["qkv"])
        y = ref.attend(y[:, None], heads, turned)[:, 0]
        t = t + gate1 * ref.dense(y, q["proj"])
        y = norm(t, q.get("norm2")) * (1 + scale2) + shift2
        up = ref.dense(y, q["up"])
        y = ref.silu(ref.dense(y, q["gate"])) * up if swiglu else gelu(up)
        t = t + gate2 * ref.dense(y, q["down"])
    q = p["final"]
    shift, scale = np.split(ref.dense(e, q["modulation"])[:, None], 2, axis=-1)
    t = ref.dense(norm(t, q.get("norm")) * (1 + scale) + shift, q["out"])
    out = np.empty((b, h, w, t.shape[-1] // patch**2))
    for n, (i, j) in enumerate(places):
        out[cut(i, j)] = t[:, n].reshape(b, patch, patch, -1)
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_that_of_the_formulas(name):
    options = SMALL | CASES[name]
    init, apply = dit.dit(SHAPE, **options)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = ref.filled(shapes, stacked=("blocks",))
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal((3, *shape)).astype(np.float32)
    cond = {"label": np.array([2, -1, 0], np.int32), "vector": draw(5)}
    cond["channels"] = draw(4, 8, 1)
    x, noise = draw(*SHAPE), np.array([0.0, 0.4, 7.0], np.float32)
    found = jax.jit(apply)(params, jnp.asarray(x), jnp.asarray(noise), cond)
    wanted = numpy_dit(ref.wide(params), x, noise, cond, options)
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "lightning"])
def test_a_fresh_network_gives_exactly_zero(name):
    init, apply = dit.dit(SHAPE, **SMALL | CASES[name])
    params = jax.jit(init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    cond = {"label": jnp.array([1, -1], jnp.int32), "vector": jnp.ones((2, 5))}
    out = jax.jit(apply)(params, x, jnp.array([0.3, 9.0]), cond)
    np.testing.assert_array_equal(out, 0)
    assert out.shape == (2, 4, 8, 4 if name == "dit" else 2)
    # The rest is not zero, and every layer has its own numbers.
    kernels = params["blocks"]["qkv"]["kernel"]
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.1


def test_the_start_is_that_of_dit():
    init, _ = dit.dit((8, 8, 4), dim=64, depth=2, heads=2, label_dim=50, activation="swiglu")
    params = jax.jit(init)(jax.random.key(0))
    # Xavier's bound; queries, keys and values are one matrix, and so are gate and up.
    f = 8 * 64 // 3
    fans = {"qkv": (64, 192), "proj": (64, 64), "gate": (64, 2 * f), "down": (f, 64)}
    for name, (into, out) in fans.items():
        kernel = np.abs(np.asarray(params["blocks"][name]["kernel"]))
        bound = np.sqrt(6 / (into + out))
        assert 0.98 * bound < kernel.max() <= bound * (1 + 1e-6), name
    for kernel in (params["label"]["embedding"], params["noise0"]["kernel"]):
        assert abs(float(kernel.std()) / 0.02 - 1) < 6 / np.sqrt(2 * kernel.size)


def test_the_absent_label_is_the_last_row_of_the_table():
    init, apply = dit.dit(SHAPE, **SMALL)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = ref.filled(shapes, stacked=("blocks",))
    x, noise = jnp.ones((1, *SHAPE)), jnp.zeros(1)

    @jax.jit
    def reach(table, label):
        apply_with = lambda t: apply(params | {"label": {"embedding": t}}, x, noise, label)
        return jax.grad(lambda t: jnp.sum(apply_with(t) ** 2))(table)

    table = jnp.asarray(params["label"]["embedding"])
    for label, row in ((-1, 3), (1, 1)):
        grads = np.asarray(reach(table, {"label": jnp.array([label], jnp.int32)}))
        assert np.flatnonzero(np.abs(grads).max(axis=1)).tolist() == [row]


def trained(data, model, placement, options):
    """Three steps on so many devices: losses, and how many leaves are divided."""
    init, apply = dit.dit((4, 4, 2), **options)
    shapes = jax.eval_shape(init, jax.random.key(0))
    start = ref.filled(shapes, stacked=("blocks",))
    tx, mesh = optax.sgd(1e-2), meshes.make(data, model)
    x = np.random.default_rng(2).standard_normal((8, 4, 4, 2)).astype(np.float32)
    noise = np.linspace(0, 2, 8, dtype=np.float32)

    def loss(params, x, noise):
        return jnp.mean((apply(params, x, noise) - x) ** 2)

    @jax.jit
    def step(params, x, noise):
        value, grads = jax.value_and_grad(loss)(params, x, noise)
        updates, _ = tx.update(grads, tx.init(params))
        return optax.apply_updates(params, updates), value

    with jax.set_mesh(mesh):
        placed = meshes.place(start, placement, mesh)
        params = jax.tree.map(lambda a, p: jax.device_put(a, p.sharding), start, placed)
        split = sum(not a.is_fully_replicated for a in jax.tree.leaves(params))
        rows, losses = meshes.to_devices((x, noise), mesh), []
        for _ in range(3):
            params, value = step(params, *rows)
            losses.append(float(value))
        return losses, split


def test_eight_devices_do_what_one_does():
    options = dict(dim=16, depth=1, heads=2, activation="swiglu", mlp=32, norm="rms", rope=True)
    one, whole = trained(1, 1, (), options)
    many, split = trained(4, 2, dit.rules(True), options)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert one[2] < one[0]
    # Six matrices a block, and the biases of those that are split by columns.
    assert (whole, split) == (0, 6 + 4)


@pytest.mark.parametrize(("fsdp", "parts"), [(False, 2), (True, 8)])
def test_where_the_parameters_are(fsdp, parts):
    init, _ = dit.dit(SHAPE, **SMALL)
    shapes = jax.eval_shape(init, jax.random.key(0))
    placed = meshes.place(shapes, dit.rules(fsdp), meshes.make(4, 2))
    found = {
        path: leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in zip(meshes.paths(placed), jax.tree.leaves(placed), strict=True)
    }
    kernels = {f"blocks/{n}/kernel": parts for n in ("qkv", "proj", "up", "down", "modulation")}
    biases = {f"blocks/{n}/bias": 2 for n in ("qkv", "up", "modulation")}
    assert found == dict.fromkeys(found, 1) | kernels | biases
