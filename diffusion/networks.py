"""Every network behind one interface, by name: of a kind, or of a published size.

    net = network("ddpmpp-32", shape=(32, 32, 3), label_dim=10, dropout=0.13)
    params = jax.jit(net.init)(key)
    y = net.apply(params, x, noise, {"label": label}, key)

A size is a kind with options; options that are given as well replace its own. Kinds:

    unet       diffusion.unet    DDPM++, NCSN++, ADM
    edm2       diffusion.edm2    the magnitude-preserving U-Net
    dit        diffusion.dit     DiT, SiT, LightningDiT
    mlp, tiny_unet               diffusion.small, for tests and laptops
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from common.errors import reject
from diffusion import dit, edm2, unet
from diffusion.small import mlp, tiny_unet

Params = Any

KINDS = {
    "unet": unet.unet,
    "edm2": edm2.edm2,
    "dit": dit.dit,
    "mlp": mlp,
    "tiny_unet": tiny_unet,
}


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: key -> params, float32.
      apply: (params, x [B, H, W, C], noise [B], cond = None, key = None) -> [B, H, W, C_out],
        float32. `noise` is c_noise of the preconditioning. `key` switches dropout on.
        `cond` may hold, where the network has the width for it (`label_dim` and so on):
        label, int32 [B], -1 = absent; vector [B, V], an embedding made elsewhere; augment
        [B, A], EDM's description of an augmentation; channels [B, H, W, K], joined to x.
        What is not given is absent: label -1, the others zeros.
      normalized: params -> params, to be applied after each step of training; only EDM2
        changes anything.
      uncertainty: (params, noise [B]) -> u [B], the log variance of the loss; None but for
        EDM2.
      rules: (fsdp: bool) -> placements for `Experiment.rules`.
    """

    init: Callable[..., Params]
    apply: Callable[..., Array]
    normalized: Callable[[Params], Params]
    uncertainty: Callable[..., Array] | None
    rules: Callable[[bool], tuple]


_NCSNPP = dict(
    embedding="fourier", encoder="residual", resample_filter=(1, 3, 3, 1), channel_mult_noise=2
)
_ADM = dict(
    style="adm",
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attn_resolutions=(32, 16, 8),
    decoder_attention="all",
    channels_per_head=64,
    resample_proj=False,
    adaptive_scale=True,
    skip_scale=1.0,
    zero_init=0.0,
    norm_eps=1e-5,
)
_SMALL_SIDES = dict(model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, augment_dim=9)
_LARGE_SIDES = _SMALL_SIDES | dict(channel_mult=(1, 2, 2, 2))
_EDM2 = dict(xxs=64, xs=128, s=192, m=256, l=320, xl=384, xxl=448)
_DIT = dict(
    s=dict(dim=384, depth=12, heads=6),
    b=dict(dim=768, depth=12, heads=12),
    l=dict(dim=1024, depth=24, heads=16),
    xl=dict(dim=1152, depth=28, heads=16),
)
_LIGHTNING = dict(patch=1, norm="rms", activation="swiglu", rope=True, label_dim=1000)

# Name -> (kind, options). EDM's networks have the input of its augmentation; labels of the
# first four are off, label_dim=10 is CIFAR-10. The others are of ImageNet's 1000 classes.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp-32": ("unet", _SMALL_SIDES),
    "ncsnpp-32": ("unet", _SMALL_SIDES | _NCSNPP),
    "ddpmpp-64": ("unet", _LARGE_SIDES),
    "ncsnpp-64": ("unet", _LARGE_SIDES | _NCSNPP),
    "adm-64": ("unet", _ADM | dict(label_dim=1000)),
}
SIZES |= {
    f"edm2-{size}": ("edm2", dict(model_channels=channels, label_dim=1000))
    for size, channels in _EDM2.items()
}
SIZES |= {
    f"{name}-{size}/{patch}": (
        "dit",
        widths | dict(patch=patch, learn_variance=name == "dit", label_dim=1000),
    )
    for name in ("dit", "sit")
    for size, widths in _DIT.items()
    for patch in (2, 4, 8)
}
SIZES["lightningdit-xl/1"] = ("dit", _DIT["xl"] | _LIGHTNING)


def network(name: str, *, shape: Sequence[int], **options: Any) -> Network:
    """The network of a config.

    Args:
      name: of `KINDS` or of `SIZES`.
      shape: (H, W, C) of the images or latents.
      options: of the kind's function; for a size, those that differ from its own.

    Returns:
      the network. With dtype float32 its products are float32 on any device.

    Raises:
      UserError: unknown name or option, or options that do not fit the shape.
    """
    if name not in KINDS and name not in SIZES:
        raise reject("model.name", name, f"one of {', '.join([*KINDS, *SIZES])}")
    kind, preset = SIZES.get(name, (name, {}))
    settings = dict(preset) | options
    _known(kind, settings)
    if len(shape) != 3 or min(shape) < 1:
        raise reject("data.shape", tuple(shape), "(height, width, channels), each from 1 up")
    init, inner = KINDS[kind](tuple(shape), **settings)
    exact = settings.get("dtype", "float32") == "float32"

    def apply(
        params: Params,
        x: Float[Array, "b h w c"],
        noise: Float[Array, " b"],
        cond: dict[str, Any] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "b h w d"]:
        # Float32 is float32: no TF32 on GPUs, no bfloat16 passes on TPUs.
        with jax.default_matmul_precision("highest") if exact else nullcontext():
            return inner(params, x, noise, cond, key)

    return Network(
        init=init,
        apply=apply,
        normalized=edm2.normalized if kind == "edm2" else lambda params: params,
        uncertainty=edm2.uncertainty if kind == "edm2" else None,
        rules={"edm2": edm2.rules, "dit": dit.rules, "unet": unet.rules}.get(
            kind, lambda fsdp: ()
        ),
    )


def parameters(name: str, *, shape: Sequence[int], **options: Any) -> int:
    """How many a network has, without making them. Arguments as for `network`."""
    init = network(name, shape=shape, **options).init
    shapes = jax.eval_shape(init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _known(kind: str, settings: dict[str, Any]) -> None:
    """Rejects options that no argument of the kind's function takes."""
    kinds = [KINDS[kind], *([unet.unet] if kind == "tiny_unet" else [])]
    names = {
        name
        for function in kinds
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name, value in settings.items():
        if name not in names:
            allowed = f"left out: {kind} takes {', '.join(sorted(names))}"
            raise reject(f"model.{name}", value, allowed)
