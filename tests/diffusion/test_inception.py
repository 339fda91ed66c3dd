"""The Inception network of FID: shapes, blocks against NumPy, the whole against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import UserError
from diffusion.inception import BLOCKS, SHAPES, apply, block_apply, convert, inception

EPS = 1e-3


def random_layer(rng, shape):
    """Tensors of one layer that keep the scale of what goes through it."""
    fan_in = np.prod(shape[1:])
    return {
        "conv.weight": (rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32),
        "bn.weight": rng.uniform(0.8, 1.2, shape[0]).astype(np.float32),
        "bn.bias": rng.normal(0, 0.1, shape[0]).astype(np.float32),
        "bn.running_mean": rng.normal(0, 0.1, shape[0]).astype(np.float32),
        "bn.running_var": rng.uniform(0.8, 1.2, shape[0]).astype(np.float32),
    }


def random_tensors(prefix="", seed=0, fc=False):
    rng = np.random.default_rng(seed)
    found = {
        f"{name}.{part}": array
        for name, shape in SHAPES.items()
        if name.startswith(prefix)
        for part, array in random_layer(rng, shape).items()
    }
    if fc:
        found["fc.weight"] = rng.normal(0, 0.02, (1008, 2048)).astype(np.float32)
    return found


def zero_tensors():
    """All names and shapes, without memory behind them."""
    found = {}
    for name, shape in SHAPES.items():
        found[f"{name}.conv.weight"] = np.zeros(shape, np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{part}"] = np.ones(shape[0], np.float32)
    return found


def test_there_are_as_many_parameters_as_published():
    # 27,161,264 of the port, less 3,326,696 of the auxiliary and 2,049,000 of the last layer.
    assert len(SHAPES) == 94
    assert sum(np.prod(s) + 2 * s[0] for s in SHAPES.values()) == 21_785_568


@pytest.mark.parametrize("shape", [(299, 299, 3), (32, 32, 3), (8, 8, 1)])
def test_features_are_2048_wide(shape):
    params = jax.eval_shape(lambda: convert(zero_tensors()))
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    assert jax.eval_shape(apply, params, images).shape == (2, 2048)


def padded(x, h, w, value=0.0):
    return np.pad(x, ((h, h), (w, w), (0, 0)), constant_values=value)


def conv(x, tensors, name, stride=1, same=True):
    """Convolution, normalisation, ReLU of one image [H, W, C], in float64."""
    kernel = tensors[f"{name}.conv.weight"].astype(np.float64)
    h, w = kernel.shape[2:]
    x = padded(x, h // 2, w // 2) if same else x
    windows = np.lib.stride_tricks.sliding_window_view(x, (h, w), (0, 1))[::stride, ::stride]
    y = np.einsum("pqchw,ochw->pqo", windows, kernel)
    part = lambda which: tensors[f"{name}.bn.{which}"].astype(np.float64)
    y = (y - part("running_mean")) / np.sqrt(part("running_var") + EPS)
    return np.maximum(y * part("weight") + part("bias"), 0)


def pool(x, function, value, stride=1, same=True):
    x = padded(x, 1, 1, value) if same else x
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))[::stride, ::stride]
    return function(windows, axis=(-2, -1))


def block_a(x, t, n):
    return [
        conv(x, t, n + "branch1x1"),
        conv(conv(x, t, n + "branch5x5_1"), t, n + "branch5x5_2"),
        conv(
            conv(conv(x, t, n + "branch3x3dbl_1"), t, n + "branch3x3dbl_2"),
            t,
            n + "branch3x3dbl_3",
        ),
        conv(pool(x, np.nanmean, np.nan), t, n + "branch_pool"),
    ]


def block_b(x, t, n):
    double = conv(conv(x, t, n + "branch3x3dbl_1"), t, n + "branch3x3dbl_2")
    return [
        conv(x, t, n + "branch3x3", 2, same=False),
        conv(double, t, n + "branch3x3dbl_3", 2, same=False),
        pool(x, np.max, 0, 2, same=False),
    ]


def block_e(x, t, n):
    three = conv(x, t, n + "branch3x3_1")
    double = conv(conv(x, t, n + "branch3x3dbl_1"), t, n + "branch3x3dbl_2")
    return [
        conv(x, t, n + "branch1x1"),
        conv(three, t, n + "branch3x3_2a"),
        conv(three, t, n + "branch3x3_2b"),
        conv(double, t, n + "branch3x3dbl_3a"),
        conv(double, t, n + "branch3x3dbl_3b"),
        conv(pool(x, np.max, -np.inf), t, n + "branch_pool"),
    ]


@pytest.mark.parametrize(
    ("name", "reference"),
    [("Mixed_5b", block_a), ("Mixed_6a", block_b), ("Mixed_7c", block_e)],
)
def test_blocks_are_those_written_out_in_numpy(name, reference):
    tensors = random_tensors(name)
    width = tensors[f"{name}.{BLOCKS[name][0][0].name}.conv.weight"].shape[1]
    x = np.random.default_rng(1).normal(size=(5, 5, width))
    params = convert(zero_tensors() | tensors)
    got = block_apply(params, name, BLOCKS[name], jnp.asarray(x[None], jnp.float32))[0]
    want = np.concatenate(reference(x, tensors, f"{name}."), axis=-1)
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_wrong_files_are_one_sentence(tmp_path):
    tensors = zero_tensors()
    tensors.pop("Mixed_6e.branch_pool.bn.bias")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"lacks the tensor Mixed_6e\.branch_pool\.bn\.bias\."):
        inception(str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=r"eval\.inception"):
        inception(str(tmp_path / "a.safetensors"), variant="torch")
    wrong = zero_tensors() | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    with pytest.raises(UserError, match=r"fc\.weight .*\(1000, 2048\).*\(1008, 2048\)"):
        convert(wrong)


def test_the_head_comes_with_its_weights(tmp_path):
    save_file(zero_tensors(), tmp_path / "a.safetensors")
    features = inception(str(tmp_path / "a.safetensors"))
    assert (features.name, features.dim, features.logits) == ("inception", 2048, None)
    fc = {"fc.weight": np.ones((1008, 2048), np.float32)}
    save_file(zero_tensors() | fc, tmp_path / "b.safetensors")
    features = inception(str(tmp_path / "b.safetensors"))
    logits = features.logits(features.params, jnp.ones((2, 2048)))
    np.testing.assert_allclose(logits, np.full((2, 1008), 2048.0))


def torch_features(torch, tensors, x):
    """The network written out once more, on [B, 3, 299, 299]; -> [B, 2048]."""
    f = torch.nn.functional
    t = {name: torch.from_numpy(array) for name, array in tensors.items()}

    def c(x, name, stride=1, padding=0):
        y = f.conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=padding)
        stats = [t[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return torch.relu(f.batch_norm(y, *stats, eps=EPS))

    mean = lambda x: f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    largest = lambda x: f.max_pool2d(x, 3, 1, 1)
    half = lambda x: f.max_pool2d(x, 3, 2)

    def a(x, n):
        five = c(c(x, n + "branch5x5_1"), n + "branch5x5_2", padding=2)
        three = c(c(x, n + "branch3x3dbl_1"), n + "branch3x3dbl_2", padding=1)
        three = c(three, n + "branch3x3dbl_3", padding=1)
        pooled = c(mean(x), n + "branch_pool")
        return torch.cat([c(x, n + "branch1x1"), five, three, pooled], 1)

    def b(x, n):
        three = c(c(x, n + "branch3x3dbl_1"), n + "branch3x3dbl_2", padding=1)
        three = c(three, n + "branch3x3dbl_3", 2)
        return torch.cat([c(x, n + "branch3x3", 2), three, half(x)], 1)

    def seven(x, n):
        y = c(x, n + "branch7x7_1")
        y = c(c(y, n + "branch7x7_2", padding=(0, 3)), n + "branch7x7_3", padding=(3, 0))
        z = c(x, n + "branch7x7dbl_1")
        for i, pad in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            z = c(z, f"{n}branch7x7dbl_{i}", padding=pad)
        return torch.cat([c(x, n + "branch1x1"), y, z, c(mean(x), n + "branch_pool")], 1)

    def d(x, n):
        three = c(c(x, n + "branch3x3_1"), n + "branch3x3_2", 2)
        z = c(c(x, n + "branch7x7x3_1"), n + "branch7x7x3_2", padding=(0, 3))
        z = c(c(z, n + "branch7x7x3_3", padding=(3, 0)), n + "branch7x7x3_4", 2)
        return torch.cat([three, z, half(x)], 1)

    def e(x, n, pool):
        y = c(x, n + "branch3x3_1")
        z = c(c(x, n + "branch3x3dbl_1"), n + "branch3x3dbl_2", padding=1)
        parts = [
            c(x, n + "branch1x1"),
            c(y, n + "branch3x3_2a", padding=(0, 1)),
            c(y, n + "branch3x3_2b", padding=(1, 0)),
            c(z, n + "branch3x3dbl_3a", padding=(0, 1)),
            c(z, n + "branch3x3dbl_3b", padding=(1, 0)),
            c(pool(x), n + "branch_pool"),
        ]
        return torch.cat(parts, 1)

    x = c(c(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = half(c(x, "Conv2d_2b_3x3", padding=1))
    x = half(c(c(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"))
    for name in ("5b", "5c", "5d"):
        x = a(x, f"Mixed_{name}.")
    x = b(x, "Mixed_6a.")
    for name in ("6b", "6c", "6d", "6e"):
        x = seven(x, f"Mixed_{name}.")
    x = e(d(x, "Mixed_7a."), "Mixed_7b.", mean)
    return e(x, "Mixed_7c.", largest).mean((2, 3)).numpy()


def torch_input(torch, x, variant):
    """[B, H, W, 3] in [-1, 1] -> [B, 3, 299, 299] as the port and as EDM's copy have it."""
    f = torch.nn.functional
    y = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if variant == "pytorch":
        return f.interpolate(y, (299, 299), mode="bilinear", align_corners=False)
    # A sampling grid shifted by half a pixel of each size: corners at pixel 0.
    h, w = y.shape[2:]
    theta = torch.eye(2, 3)
    theta[0, 2] += 1 / w - 1 / 299
    theta[1, 2] += 1 / h - 1 / 299
    theta = theta.repeat(len(y), 1, 1)
    grid = f.affine_grid(theta, (len(y), 3, 299, 299), align_corners=False)
    y = f.grid_sample(
        y * 127.5 + 127.5, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return (y - 128) / 128


@pytest.mark.parametrize("variant", ["pytorch", "tensorflow"])
def test_the_network_is_the_one_in_pytorch(variant):
    torch = pytest.importorskip("torch")
    tensors = random_tensors()
    rng = np.random.default_rng(1)
    for shape in ((2, 32, 32, 3), (1, 400, 320, 3)):
        x = rng.uniform(-1, 1, shape).astype(np.float32)
        with torch.no_grad():
            want = torch_features(torch, tensors, torch_input(torch, x, variant))
        got = np.asarray(apply(convert(tensors), jnp.asarray(x), variant))
        difference = np.abs(got - want).max() / np.abs(want).max()
        print(f"inception {variant} {shape}: {difference:.2e} of {np.abs(want).max():.3g}")
        assert difference < 2e-5
