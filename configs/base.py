"""The fields that every experiment shares, and the three sizes."""

from ml_collections import ConfigDict


def base(experiment: str) -> ConfigDict:
    """The shared fields, unlocked, for a config file to add its own.

    Args:
      experiment: module with `make(config)`, for instance `nqs.hubbard`.
    """
    config = ConfigDict()
    config.experiment = experiment
    config.size = "small"  # Set by `at_size` from the command's `:SIZE`; a record only.
    config.seed = 0  # The first seed; a run's every random number follows from its own.
    config.n_seeds = 1  # Repeats every run with seed, seed + 1, ...
    config.steps = 100
    config.log_every = 10  # Steps between rows of metrics.jsonl.
    config.eval_every = 0  # Steps between evaluations; 0: only at the end.
    config.save_every = 100  # Steps between checkpoints.
    config.keep = 2  # Checkpoints kept; the newest is always among them.
    config.x64 = False  # Whether JAX may use 64-bit numbers at all.
    config.mesh = ConfigDict(dict(data=-1, model=1))  # -1: all devices that remain.
    config.init_from = ""  # A run's folder whose weights start this one.
    # Variants to compare: name -> changed fields. They run in alphabetical order, but after
    # the one they start from: `init_from` may name another's run, such as "warm-seed0".
    config.runs = ConfigDict()
    return config


def at_size(config: ConfigDict, size: str, sizes: dict[str, dict]) -> ConfigDict:
    """Locks `config` and applies the changes of one size.

    Args:
      config: the fields at their default size.
      size: a key of `sizes`.
      sizes: size -> changed fields; `runs` replaces, everything else is merged.

    Raises:
      ValueError: the size is not known; the message lists those that are.
    """
    if size not in sizes:
        raise ValueError(f"unknown size {size!r}; the sizes are {', '.join(sizes)}.")
    changes = dict(sizes[size])
    if "runs" in changes:
        config.runs = ConfigDict(changes.pop("runs"))
    config.size = size
    config.lock()
    config.update(changes)
    return config
