"""Tokenises a large text once, into the store that `lm.corpus` opens.

    python -m lm.prepare --source=allenai/c4 --tokenizer=t5/spiece.model --out=data/c4
    python -m lm.prepare --source=allenai/c4:validation --tokenizer=t5/spiece.model \\
        --out=data/c4_validation --documents=100000
    python -m lm.prepare --source='novels/*.txt' --tokenizer=bpe:4096 --out=data/novels

    --source     text file, folder of .txt, glob (documents between form feeds), or
                 allenai/c4[:train|:validation], streamed and shuffled with seed 42
    --tokenizer  bytes, a tokenizer.json, a SentencePiece .model, or bpe:VOCAB to train one
    --out        folder of the store
    --documents  stop after so many (0: all)
    --shard      bytes of tokens between two savings (67108864)

Stopped by whatever, the same command goes on at the last shard, and what it leaves is bitwise
what an undisturbed run leaves: tokens are appended to `tokens.bin` and flushed to the disk
before `progress.json` counts them, and what is not counted is cut off on the next start.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common import flags, metrics
from common.errors import UserError
from lm import corpus, tokenizers
from lm.sources import Source, open_source

# A batch for the tokenizer: enough to keep all cores busy.
BATCH, LETTERS = 1024, 2**22


class Flags(NamedTuple):
    """The command line."""

    source: str
    tokenizer: str
    out: str
    documents: int = 0
    shard: int = 2**26


class Done(NamedTuple):
    """What `progress.json` counts."""

    read: int = 0  # Documents of the source, those without a token included.
    documents: int = 0
    tokens: int = 0
    largest: int = 0


def parse(arguments: list[str]) -> Flags:
    """The flags, in the form `--name=value`.

    Raises:
      UserError: a flag is unknown, missing, stands twice or has no proper value.
    """
    found = flags.parse(
        arguments, Flags._fields, ("source", "tokenizer", "out"), dict(documents=0, shard=1)
    )
    return Flags(**found)


def main(arguments: list[str]) -> int:
    """Runs the command. Returns the exit code: 0 done, 2 the user's input, 130 Ctrl-C."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    try:
        print(prepare(parse(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from the last shard.", file=sys.stderr)
        return 130
    return 0


def prepare(
    flags: Flags, stream: Callable[[str, str, int], Iterator[str]] | None = None
) -> str:
    """Makes the store, or goes on with it.

    Args:
      flags: the command line.
      stream: (split, revision, documents to skip) -> texts, in the place of C4.

    Returns:
      One line that says what is there now.

    Raises:
      UserError: see the module; also a folder that holds other things.
    """
    folder = Path(flags.out)
    _identity(flags.tokenizer)  # Before anything is made.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _prepare(flags, folder, stream)
    except OSError as error:
        raise UserError(f"Cannot write the store {folder}: {error.strerror}.") from error


def _prepare(flags: Flags, folder: Path, stream) -> str:
    meta_path, progress_path = folder / "meta.json", folder / "progress.json"
    for torn in folder.glob(".*.tmp"):
        torn.unlink()
    old = None
    if meta_path.exists():
        old = corpus.read_meta(meta_path)
    elif progress_path.exists():
        old = _read(progress_path)
    elif any(folder.iterdir()):
        raise UserError(f"The folder {folder} is not empty and holds no store.")
    before = (old or {}).get("settings", {})
    source = open_source(flags.source, flags.tokenizer, before.get("source"), stream)
    settings = dict(source=source.identity, tokenizer=_identity(flags.tokenizer))
    settings["documents"] = flags.documents
    for name, value in settings.items():
        if old and before.get(name) != value:
            raise UserError(
                f"The store {folder} was begun with another {name}: "
                f"{_short(before.get(name))}, not {_short(value)}; choose another --out."
            )
    if not meta_path.exists():
        done = Done(**old["done"]) if old else Done()
        if not old:
            _journal(progress_path, settings, done)
        kind, name = _tokenizer(flags, folder, source)
        done = _tokenise(flags, folder, source, kind, settings, done)
        _finish(folder, kind, name, settings, done)
    for left in (progress_path, folder / "offsets.partial"):
        left.unlink(missing_ok=True)
    made = corpus.open_store(folder)
    return (
        f"{folder}: {len(made.offsets) - 1} documents, {len(made.tokens)} tokens, "
        f"vocabulary {made.vocab}"
    )


def _tokenise(flags, folder, source, kind, settings, done: Done) -> Done:
    """Appends what is left of the source, shard by shard."""
    width = corpus.width(kind.vocab_size)
    separator, end = tokenizers.ends(kind)
    limit = max(0, flags.documents - done.read) if flags.documents else None
    total = min(filter(None, (flags.documents, source.documents)), default=None)
    bar = tqdm(total=total, initial=done.read, desc=folder.name, unit=" docs", disable=None)
    saved, tokens, starts = done, [], []

    def save():
        _append(folder / "tokens.bin", saved.tokens * width.itemsize, tokens, width)
        _append(folder / "offsets.partial", saved.documents * 8, [starts], np.dtype("<i8"))
        _journal(folder / "progress.json", settings, done)
        tokens.clear()
        starts.clear()
        bar.set_postfix_str(f"{done.tokens:.4g} tokens", refresh=False)
        if bar.disable:
            print(
                f"{folder.name}: {done.read} documents, {done.tokens} tokens", file=sys.stderr
            )
        return done

    with bar:
        for texts in _batches(islice(source.texts(done.read), limit)):
            for ids in kind.encode_all(texts):
                done = done._replace(read=done.read + 1)
                if ids.size:
                    # The separator belongs to the document before; see tokenizers.ends.
                    gap = separator if done.documents else separator[:0]
                    starts.append(done.tokens + gap.size)
                    new = np.concatenate([gap, ids, end])
                    tokens.append(new.astype(width))
                    done = Done(
                        done.read,
                        done.documents + 1,
                        done.tokens + new.size,
                        max(done.largest, int(new.max())),
                    )
                if (done.tokens - saved.tokens) * width.itemsize >= flags.shard:
                    saved = save()
            bar.update(len(texts))
        if done != saved or not done.tokens:
            save()
    return done


def _append(path: Path, size: int, arrays: list, dtype: np.dtype) -> None:
    """Makes the file `size` bytes long, whatever a kill left, and appends to it."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        there = file.seek(0, os.SEEK_END)
        if there < size:
            raise UserError(f"The file {path} is damaged: {there} bytes of {size} are left.")
        file.truncate(size)
        file.seek(size)
        for array in arrays:
            file.write(np.asarray(array, dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _finish(folder: Path, kind, name: str, settings: dict, done: Done) -> None:
    """Cuts off what was not counted and writes offsets and, last, meta.json."""
    if done.tokens < 2:
        raise UserError(
            f"The source of {folder} has {done.tokens} tokens, but needs at least 2."
        )
    width = corpus.width(kind.vocab_size)
    _append(folder / "tokens.bin", done.tokens * width.itemsize, [], width)
    _append(folder / "offsets.partial", done.documents * 8, [], np.dtype("<i8"))
    temporary = folder / ".offsets.npy.tmp"
    starts = np.memmap(folder / "offsets.partial", "<i8", "r")
    offsets = np.lib.format.open_memmap(temporary, "w+", np.int64, (done.documents + 1,))
    offsets[:-1], offsets[-1] = starts, done.tokens
    offsets.flush()
    os.replace(temporary, folder / "offsets.npy")
    sha = tokenizers.digest(name if name == "bytes" else str(folder / name))
    counts = dict(tokens=done.tokens, documents=done.documents, largest=done.largest)
    meta = dict(
        version=corpus.VERSION,
        tokenizer=dict(name=name, sha256=sha),
        vocab=kind.vocab_size,
        pad=kind.pad,
        eos=kind.eos,
        dtype=width.name,
        **counts,
        settings=settings,
    )
    metrics.write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")


def _tokenizer(flags: Flags, folder: Path, source: Source) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer and its name in meta.json; its file is copied into the store."""
    if flags.tokenizer == "bytes":
        return tokenizers.tokenizer("bytes"), "bytes"
    if flags.tokenizer.startswith("bpe:"):
        name = "tokenizer.json"
        if not (folder / name).exists():
            vocab = int(flags.tokenizer.removeprefix("bpe:"))
            text = tokenizers.train_bpe(source.texts(0), vocab)
            metrics.write(folder / name, text)
    else:
        path = tokenizers.find(flags.tokenizer)
        name = f"tokenizer{path.suffix}"
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(path.read_bytes())
        os.replace(temporary, folder / name)
    return tokenizers.tokenizer(str(folder / name)), name


def _identity(name: str) -> str:
    if not name.startswith("bpe:"):
        return tokenizers.digest(name)
    vocab = name.removeprefix("bpe:")
    if not (vocab.isascii() and vocab.isdigit() and int(vocab) >= 258):
        raise UserError(
            f"--tokenizer is {name!r}, but bpe: takes a vocabulary from 258 on, as bpe:4096."
        )
    return name


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists for the tokenizer, by number and by letters."""
    batch, letters = [], 0
    for text in texts:
        batch.append(text)
        letters += len(text)
        if len(batch) == BATCH or letters >= LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _journal(path: Path, settings: dict, done: Done) -> None:
    metrics.write(path, json.dumps(dict(settings=settings, done=done._asdict())) + "\n")


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        Done(**found["done"]), found["settings"]["source"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"The file {path} is damaged; delete its folder.") from error
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands at once would mix their shards."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another process is writing the store {folder}.") from error
    else:
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
