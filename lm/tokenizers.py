"""Text to token numbers and back: bytes, Hugging Face `tokenizer.json`, SentencePiece.

A tokenizer is a tuple of functions. Documents are told apart by what `ends` returns: the
tokenizer's own end-of-text token, or a form feed between two documents where it has none
(bytes). Text never yields control tokens: a document that spells "</s>" gets the letters.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

ALLOWED = "'bytes', the path of a Hugging Face tokenizer.json or of a SentencePiece .model"
SEPARATOR = "\f"
# Names in use for the two control tokens, the first found counts.
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "[SEP]")


class Tokenizer(NamedTuple):
    """Pure functions of text.

    `encode` adds no begin, end or padding token. `decode` leaves out control tokens and
    numbers that are no tokens, and undoes `encode` exactly for `bytes` and byte-level BPE;
    SentencePiece models may normalise (T5 joins white space).
    """

    name: str  # What `tokenizer` was called with.
    vocab_size: int  # One more than the largest number a token can have.
    encode: Callable[[str], np.ndarray]  # -> int32 [tokens]
    decode: Callable[[Sequence[int]], str]
    pad: int  # -1 where there is none.
    eos: int  # -1 where there is none.
    encode_all: Callable[[list[str]], list[np.ndarray]]  # In parallel where that helps.


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Args:
      name: "bytes" (256 values and nothing else: no padding, no end), the path of a
        `tokenizer.json` or of a folder with one, or the path of a SentencePiece `.model`.

    Raises:
      UserError: there is no such tokenizer, its file is damaged, or SentencePiece is not
        installed.
    """
    if name == "bytes":
        return _bytes()
    path = find(name)
    return _sentencepiece(name, path) if path.suffix == ".model" else _huggingface(name, path)


def find(name: str) -> Path:
    """The file behind the name of a tokenizer other than "bytes".

    Raises:
      UserError: there is none.
    """
    path = Path(name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not name or path.suffix not in (".json", ".model"):
        raise UserError(f"The tokenizer is {name!r}, but must be {ALLOWED}.")
    if not path.is_file():
        raise UserError(f"There is no tokenizer file {name!r}; a tokenizer is {ALLOWED}.")
    return path


def exists(name: str) -> bool:
    """Whether a tokenizer has that name; its file may still be damaged."""
    try:
        return name == "bytes" or bool(find(name))
    except UserError:
        return False


def digest(name: str) -> str:
    """What tells tokenizers apart wherever they lie: "bytes", or the file's sha256."""
    if name == "bytes":
        return name
    return hashlib.sha256(find(name).read_bytes()).hexdigest()


def ends(kind: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens between two documents, and those at the end of every one.

    Returns:
      Two int32 arrays: the separator belongs to the document before it and does not
      follow the last one; one of the two is empty.
    """
    nothing = np.zeros(0, np.int32)
    if kind.eos >= 0:
        return nothing, np.array([kind.eos], np.int32)
    return kind.encode(SEPARATOR), nothing


def control(path: Path, pad: int, eos: int) -> dict[str, str]:
    """How a `tokenizer.json` spells its control tokens, by their names in `transformers`."""
    import tokenizers as hf

    spelt = hf.Tokenizer.from_file(str(path)).id_to_token
    return {k: spelt(n) for k, n in (("pad_token", pad), ("eos_token", eos)) if n >= 0}


def train_bpe(texts: Iterable[str], vocab: int) -> str:
    """A byte-level BPE for those who have text only.

    Args:
      texts: documents, or parts of them.
      vocab: tokens in all: <pad> is 0, </s> is 1, then 256 bytes, then what is learned;
        little text may give fewer.

    Returns:
      The contents of a `tokenizer.json`.

    Raises:
      UserError: the vocabulary has no room for the bytes.
    """
    import tokenizers as hf

    if vocab < 258:
        raise UserError(f"The BPE vocabulary is {vocab}, but must be at least 258.")
    model = hf.Tokenizer(hf.models.BPE())
    # Digits and words are kept apart as in GPT-2; no byte is ever unknown.
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model.to_str(pretty=True)


def _bytes() -> Tokenizer:
    def encode(text):
        # Bytes that are no UTF-8 came in as lone surrogates and leave as themselves.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def decode(ids):
        # What a model generates need not be UTF-8, yet must be printable.
        return bytes(_known(ids, 256)).decode("utf-8", "replace")

    return Tokenizer("bytes", 256, encode, decode, -1, -1, lambda ts: [encode(t) for t in ts])


def _huggingface(name: str, path: Path) -> Tokenizer:
    import tokenizers as hf

    try:
        model = hf.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"The tokenizer file {path} cannot be read: {error}.") from error
    pad = (model.padding or {}).get("pad_id", _first(model, PAD))
    model.no_padding()
    model.no_truncation()
    model.encode_special_tokens = True

    def encode(text):
        return np.array(model.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(texts):
        found = model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def decode(ids):
        return model.decode(_known(ids, size), skip_special_tokens=True)

    size = 1 + max(model.get_vocab(with_added_tokens=True).values(), default=-1)
    if not size:
        raise UserError(f"The tokenizer file {path} has an empty vocabulary.")
    if pad >= size:
        raise UserError(
            f"The tokenizer file {path} pads with the token {pad}, but must with one from 0 to "
            f"{size - 1}."
        )
    return Tokenizer(name, size, encode, decode, pad, _first(model, EOS), encode_all)


def _known(ids: Any, size: int) -> list[int]:
    """Those that are tokens: a model's vocabulary may be the larger one."""
    return [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < size]


def _first(model, names: Sequence[str]) -> int:
    found = (model.token_to_id(name) for name in names)
    return next((number for number in found if number is not None), -1)


def _sentencepiece(name: str, path: Path) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"The tokenizer {name!r} needs SentencePiece, which is in the extra 'c4': "
            "uv run --extra c4 ..., or pip install sentencepiece."
        ) from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"The tokenizer file {path} is no SentencePiece model.") from error

    def encode(text):
        return np.array(model.encode(text, out_type=int), np.int32)

    def encode_all(texts):
        return [np.array(ids, np.int32) for ids in model.encode(texts, out_type=int)]

    def decode(ids):
        return model.decode([i for i in _known(ids, size) if not model.is_control(i)])

    size, pad, eos = model.vocab_size(), model.pad_id(), model.eos_id()
    return Tokenizer(name, size, encode, decode, pad, eos, encode_all)
