"""Documents to tokenise: local text files, or C4 from the network, from the n-th on."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from lm import corpus

C4 = "allenai/c4"
SPLITS = ("train", "validation")
# As in the release: the default buffer of `datasets`.
SEED, BUFFER = 42, 1000
Stream = Callable[[str, str, int], Iterator[str]]  # (split, revision, documents to skip)


class Source(NamedTuple):
    """Where documents come from."""

    identity: list  # What must not change between two starts, for JSON.
    texts: Callable[[int], Iterator[str]]  # Documents from the n-th on.
    documents: int | None  # At most so many, where that is known.


def open_source(spec: str, tokenizer: str, begun: Any, stream: Stream | None = None) -> Source:
    """The documents that `--source` names.

    Args:
      spec: text file, folder of `.txt`, glob, or allenai/c4[:split].
      tokenizer: only "bytes" takes files that are no UTF-8.
      begun: the identity on the first start, which keeps its revision of C4; or None.
      stream: in the place of `c4`.

    Raises:
      UserError: there is no such source.
    """
    if spec.partition(":")[0] == C4 and not Path(spec).exists():
        split = spec.partition(":")[2] or "train"
        if split not in SPLITS:
            raise UserError(f"--source is {spec!r}, but C4 has {' and '.join(SPLITS)}.")
        if tokenizer.startswith("bpe:"):
            raise UserError("bpe:VOCAB is trained on text files only; give C4 a tokenizer.")
        # The revision of the first start holds for all: the stream must not change.
        old = begun[3] if isinstance(begun, list) and begun[:2] == [C4, split] else None
        revision = old if old is not None else ("" if stream else newest())
        texts = lambda skip: (stream or c4)(split, revision, skip)
        return Source([C4, split, [SEED, BUFFER], revision], texts, None)
    found = corpus.files(spec)
    shas = [_sha(path) for path in found]
    any_bytes = tokenizer == "bytes"

    def texts(skip):
        every = (text for path in found for text in corpus.documents(path, any_bytes))
        return islice(every, skip, None)

    identity = [[path.name, sha] for path, (sha, _) in zip(found, shas, strict=True)]
    return Source(identity, texts, sum(n for _, n in shas))


def c4(split: str, revision: str, skip: int) -> Iterator[str]:
    """Documents of C4 `en` from the network, shuffled with seed 42, from the n-th on.

    Skipping reads what it skips: the order of a shuffled stream has no other entry.

    Raises:
      UserError: `datasets` is not installed, or the network failed.
    """
    datasets = _datasets()
    read = skip
    try:
        found = datasets.load_dataset(
            C4, "en", split=split, streaming=True, revision=revision or None
        )
        for row in found.shuffle(seed=SEED, buffer_size=BUFFER).skip(skip):
            yield row["text"]
            read += 1
    except Exception as error:  # Several libraries, no common ancestor.
        raise UserError(
            f"Reading {C4} failed after {read} documents ({type(error).__name__}: {error}); "
            "the same command goes on from the last shard."
        ) from error


def newest() -> str:
    """The commit of C4 that is newest now, on the network."""
    _datasets()
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(C4).sha or ""
    except Exception as error:
        raise UserError(f"{C4} cannot be reached ({type(error).__name__}: {error}).") from error


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{C4} needs the package datasets, which is in the extra 'c4': "
            "uv run --extra c4 python -m lm.prepare ..., or pip install datasets."
        ) from error
    return datasets


def _sha(path: Path) -> tuple[str, int]:
    """sha256 of a file, and how many documents it can have."""
    found, breaks = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(2**22):
            found.update(piece)
            breaks += piece.count(b"\f")
    return found.hexdigest(), breaks + 1
