"""Texts as one array of tokens: a token store on disk, or small text files in memory.

A store is a folder that `python -m lm.prepare` makes:

    meta.json     tokenizer, vocabulary, counts, sources with their sha256, version
    tokens.bin    all documents one after the other, uint16 or uint32, little-endian
    offsets.npy   int64 [documents + 1]: where each document starts, and the end of the last
    tokenizer.*   a copy of the tokenizer's file, so that a store can be read without it

`tokens.bin` is memory-mapped: a store may be larger than memory, and opening costs nothing.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError, reject
from lm import tokenizers

VERSION = 1
SHIPPED = Path(__file__).parent / "text" / "tinyshakespeare.txt"
# Up to here a store's contents are checked when it is opened; beyond, batch by batch.
CHECKED = 2**26
COUNTS = ("tokens", "documents", "vocab", "largest", "pad", "eos")


class Corpus(NamedTuple):
    """Documents end to end.

    Document i is `tokens[offsets[i]:offsets[i + 1]]`, its end-of-text token (or, for
    tokenizers without one, the separator before the next document) included.
    """

    tokens: np.ndarray  # uint16 or uint32 [tokens]; a memory map for a store
    offsets: np.ndarray  # int64 [documents + 1]
    vocab: int  # of the tokenizer
    largest: int  # largest token that occurs; below `vocab`
    pad: int  # -1 where the tokenizer has none
    eos: int  # -1 where the tokenizer has none
    tokenizer: str  # for `lm.tokenizers.tokenizer`
    path: str  # where it came from, for messages


def load(path: str, tokenizer: str = "", field: str = "data.path") -> Corpus:
    """A token store, text files or the text that ships with the project.

    Args:
      path: a store's folder; or a text file, a folder of `.txt` or a glob, tokenised here
        and now; or "" for the shipped tinyshakespeare.
      tokenizer: as in `lm.tokenizers.tokenizer`; "" is a store's own, and bytes for text.
      field: of the config, that the path comes from; for messages.

    Raises:
      UserError: whatever is missing, damaged, empty or does not fit together.
    """
    if tokenizer and not tokenizers.exists(tokenizer):
        raise reject("data.tokenizer", tokenizer, f"'' or {tokenizers.ALLOWED}")
    if path and is_store(Path(path)):
        found = open_store(path)
        if tokenizer and tokenizers.digest(tokenizer) != tokenizers.digest(found.tokenizer):
            allowed = (
                f"'' or the tokenizer (vocabulary {found.vocab}) that {path} was made with"
            )
            raise reject("data.tokenizer", tokenizer, allowed)
        return found
    if path and not _files(path):
        raise reject(field, path, "a token store, a text file, a folder of .txt or a glob")
    return from_text(path or SHIPPED, tokenizers.tokenizer(tokenizer or "bytes"))


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store, finished or not."""
    return any(
        (folder / name).exists() for name in ("meta.json", "progress.json", "tokens.bin")
    )


def open_store(folder: str | Path) -> Corpus:
    """A token store; nothing is read but what is needed to see that it is whole.

    Raises:
      UserError: it is missing, unfinished, damaged or of another version.
    """
    folder = Path(folder)
    if not is_store(folder):
        raise UserError(f"There is no token store in {folder}.")
    if not (folder / "meta.json").exists():
        raise UserError(
            f"The store {folder} is unfinished; run the same python -m lm.prepare again."
        )
    meta = read_meta(folder / "meta.json")
    tokens = _tokens(folder / "tokens.bin", meta)
    offsets = _offsets(folder / "offsets.npy", meta)
    name = meta["tokenizer"]["name"]
    where = name if name == "bytes" else str(folder / name)
    counts = {k: meta[k] for k in ("vocab", "largest", "pad", "eos")}
    return Corpus(tokens, offsets, **counts, tokenizer=where, path=str(folder))


def read_meta(path: Path) -> dict[str, Any]:
    """The fields of a store's meta.json.

    Raises:
      UserError: it is damaged, incomplete or of another version.
    """
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"The file {path} is damaged: {error}.") from error
    if not isinstance(meta, dict) or "version" not in meta:
        raise UserError(f"The file {path} is damaged: it is no description of a store.")
    if meta["version"] != VERSION:
        raise UserError(
            f"The store {path.parent} has format version {meta['version']!r}, but must have "
            f"{VERSION}: prepare it again."
        )
    missing = [k for k in COUNTS if type(meta.get(k)) is not int]
    if (
        missing
        or not isinstance(meta.get("tokenizer"), dict)
        or "name" not in meta["tokenizer"]
    ):
        raise UserError(f"The file {path} is damaged: {(*missing, 'tokenizer')[0]} is missing.")
    for name in ("pad", "eos"):
        if not -1 <= meta[name] < meta["vocab"]:
            raise UserError(
                f"The file {path} is damaged: {name} is {meta[name]}, but must be from -1 "
                f"(none) to {meta['vocab'] - 1}."
            )
    return meta


def width(vocab: int) -> np.dtype:
    """The smallest of the two types that holds a vocabulary."""
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def from_text(paths: str | Path | Sequence[str | Path], kind: tokenizers.Tokenizer) -> Corpus:
    """Small text files, tokenised in memory.

    Each file is one document or several with form feeds between; empty ones are left out.
    With `bytes` the tokens are the file's bytes.

    Raises:
      UserError: no such file, no text, or bytes that are no UTF-8 (unless `bytes`).
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    found = [file for path in listed for file in files(path)]
    texts = (text for file in found for text in documents(file, kind.name == "bytes"))
    separator, end = tokenizers.ends(kind)
    pieces, offsets, total = [], [0], 0
    for ids in kind.encode_all(list(texts)):
        if not ids.size:
            continue
        if pieces and separator.size:
            pieces.append(separator)
            offsets[-1] = total = total + separator.size
        pieces += [ids, end]
        total += ids.size + end.size
        offsets.append(total)
    name = ", ".join(map(str, listed))
    if total < 2:
        raise UserError(f"The text {name} has {total} tokens, but needs at least 2 tokens.")
    tokens = np.concatenate(pieces)
    return Corpus(
        tokens=tokens.astype(width(kind.vocab_size)),
        offsets=np.array(offsets, np.int64),
        vocab=kind.vocab_size,
        largest=int(tokens.max()),
        pad=kind.pad,
        eos=kind.eos,
        tokenizer=kind.name,
        path=name,
    )


def files(path: str | Path) -> list[Path]:
    """The text files behind a path, in alphabetical order.

    Args:
      path: a file, a folder (all `.txt` in it, at any depth) or a glob.

    Raises:
      UserError: there are none.
    """
    found = _files(path)
    if not found and Path(path).is_dir():
        raise UserError(f"The folder {path} holds no .txt files.")
    if not found:
        raise UserError(f"There is no text file, folder or token store {str(path)!r}.")
    return found


def _files(path: str | Path) -> list[Path]:
    plain = Path(path)
    if plain.is_file():
        return [plain]
    inside = plain.rglob("*.txt") if plain.is_dir() else glob.glob(str(path), recursive=True)
    return sorted(p for p in map(Path, inside) if p.is_file())


def documents(file: Path, any_bytes: bool) -> Iterator[str]:
    """The documents of a text file, form feeds between them; empty ones are left out.

    Args:
      file: read in pieces: only one document has to fit into memory.
      any_bytes: let bytes that are no UTF-8 pass, as lone surrogates.

    Raises:
      UserError: the file cannot be read, or is no UTF-8.
    """
    start, parts = 0, []

    def text():
        raw = b"".join(parts)
        try:
            return raw.decode("utf-8", "surrogateescape" if any_bytes else "strict")
        except UnicodeDecodeError as error:
            raise UserError(
                f"The text {file} is not valid UTF-8 at byte {start + error.start}; only the "
                "tokenizer 'bytes' takes that."
            ) from error

    try:
        with file.open("rb") as stream:
            while piece := stream.read(2**22):
                head, *rest = piece.split(b"\f")
                parts.append(head)
                for following in rest:
                    size = sum(map(len, parts))
                    if size:
                        yield text()
                    start, parts = start + size + 1, [following]
            if any(parts):
                yield text()
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from error


def split(corpus: Corpus, holdout: float, by_document: bool = False) -> tuple[Corpus, Corpus]:
    """Training and validation parts of one source: the last share is held out.

    Args:
      corpus: with two tokens or more on either side of the cut.
      holdout: share of the tokens, between 0 and 1.
      by_document: cut between two documents, at the boundary nearest to the share: for
        documents as rows. Otherwise at the exact token, and a document may lie in both
        parts.

    Returns:
      Views of the same tokens, nothing is copied.

    Raises:
      UserError: the share is out of range or leaves a part empty.
    """
    if not 0 < holdout < 1:
        raise reject("data.holdout", holdout, "above 0 and below 1")
    total = len(corpus.tokens)
    cut = int(total * (1 - holdout))
    if by_document:
        inner = np.asarray(corpus.offsets)[1:-1]
        if not inner.size:
            raise UserError(
                f"The text {corpus.path} is one document and cannot be split by them, as "
                "config.data.pack=False does; form feeds separate the documents of a text."
            )
        cut = int(inner[np.argmin(np.abs(inner - cut))])
    if min(cut, total - cut) < 2:
        allowed = f"a share that leaves 2 of the {total} tokens of {corpus.path} on either side"
        raise reject("data.holdout", holdout, allowed)
    last = int(np.searchsorted(corpus.offsets, cut))  # The first start at or after the cut.
    before = np.append(corpus.offsets[:last], cut)
    after = np.append(cut, corpus.offsets[last:]) - cut
    after = after[1:] if corpus.offsets[last] == cut else after
    return (
        corpus._replace(tokens=corpus.tokens[:cut], offsets=before.astype(np.int64)),
        corpus._replace(tokens=corpus.tokens[cut:], offsets=after.astype(np.int64)),
    )


def pair(
    path: str, valid: str, holdout: float, limit: int, tokenizer: str, pack: bool, **rest: Any
) -> tuple[Corpus, Corpus]:
    """Training and validation text: `valid`, or the last `holdout` of the first.

    Raises:
      UserError: they cannot be read, or have different tokenizers.
    """
    del rest
    train = load(path, tokenizer)
    if not valid:
        # One document can only be cut.
        by_document = not pack and len(train.offsets) > 2
        train, held_out = split(train, holdout, by_document)
        return head(train, limit), held_out
    held_out = load(valid, tokenizer or train.tokenizer, "data.valid")
    return head(train, limit), held_out


def head(corpus: Corpus, tokens: int) -> Corpus:
    """The first `tokens` tokens, a view; the whole corpus if it has no more. 0: all.

    Raises:
      UserError: fewer than two tokens are asked for.
    """
    if tokens < 0 or tokens == 1:
        raise reject("data.limit", tokens, "0 (all) or at least 2")
    if not 0 < tokens < len(corpus.tokens):
        return corpus
    last = int(np.searchsorted(corpus.offsets, tokens))
    offsets = np.append(corpus.offsets[:last], tokens).astype(np.int64)
    return corpus._replace(tokens=corpus.tokens[:tokens], offsets=offsets)


def check(corpus: Corpus, tokens: np.ndarray) -> None:
    """Refuses tokens beyond the vocabulary.

    Raises:
      UserError: naming the corpus and the token.
    """
    largest = int(tokens.max(initial=0))
    if largest >= corpus.vocab:
        raise UserError(
            f"The store {corpus.path} is damaged: token {largest} is beyond its vocabulary of "
            f"{corpus.vocab}."
        )


def _tokens(path: Path, meta: dict) -> np.ndarray:
    dtype, count = width(meta["vocab"]), meta["tokens"]
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize or not count:
        raise UserError(
            f"The file {path} is damaged: it has {size} bytes, but must have "
            f"{count * dtype.itemsize}."
        )
    tokens = np.memmap(path, dtype, "r", shape=(count,))
    largest = int(tokens.max()) if count <= CHECKED else meta["largest"]
    if largest >= meta["vocab"] or largest != meta["largest"]:
        raise UserError(
            f"The file {path} is damaged: its largest token is {largest}, but must be "
            f"{meta['largest']}, below the vocabulary of {meta['vocab']}."
        )
    return tokens


def _offsets(path: Path, meta: dict) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The file {path} is damaged or missing: {error}.") from error
    right = offsets.dtype == np.int64 and offsets.shape == (meta["documents"] + 1,)
    right = right and offsets[0] == 0 and offsets[-1] == meta["tokens"]
    if right and offsets.size <= CHECKED:
        right = bool(np.all(offsets[1:] > offsets[:-1]))
    if not right:
        raise UserError(f"The file {path} is damaged: it does not fit tokens.bin.")
    return offsets
