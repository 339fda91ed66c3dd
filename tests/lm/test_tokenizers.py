"""Tokenizers: round trips, control tokens, errors."""

import json

import numpy as np
import pytest

from common.errors import UserError
from lm import tokenizers
from lm.corpus import SHIPPED

TEXT = 'Ünïcode, "quotes"\n\n  spaces\tand 12345 emoji 🙂 </s> <pad> and so on. ' * 3


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(tokenizers.train_bpe([TEXT, "the cat sat on the mat " * 20], 300))
    return path


@pytest.mark.parametrize("seed", range(20))
def test_bytes_pass_any_bytes(seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, rng.integers(0, 300), np.uint8).tobytes()
    kind = tokenizers.tokenizer("bytes")
    ids = kind.encode(raw.decode("utf-8", "surrogateescape"))
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == raw
    # What is printed is printable, and the text itself where there was one.
    assert kind.decode(ids).encode("utf-8").decode() == raw.decode("utf-8", "replace")


def test_bytes_of_text():
    kind = tokenizers.tokenizer("bytes")
    assert kind.decode(kind.encode(TEXT)) == TEXT
    assert (kind.vocab_size, kind.pad, kind.eos) == (256, -1, -1)
    between, after = tokenizers.ends(kind)
    assert (between.tolist(), after.tolist()) == ([12], [])


def test_bpe_of_text(bpe):
    kind = tokenizers.tokenizer(str(bpe))
    assert (kind.pad, kind.eos) == (0, 1)
    assert kind.vocab_size == len(json.loads(bpe.read_text())["model"]["vocab"])
    assert 258 < kind.vocab_size <= 300
    ids = kind.encode(TEXT)
    assert ids.dtype == np.int32
    assert 0 <= ids.min() <= ids.max() < kind.vocab_size
    assert len(ids) < len(TEXT.encode())
    assert kind.decode(ids) == TEXT
    assert kind.decode([*ids, kind.eos, kind.pad]) == TEXT
    between, after = tokenizers.ends(kind)
    assert (between.tolist(), after.tolist()) == ([], [1])


def test_numbers_that_are_no_tokens_are_left_out(bpe):
    for name in ("bytes", str(bpe)):
        kind = tokenizers.tokenizer(name)
        ids = kind.encode(TEXT).tolist()
        assert kind.decode([-1, kind.vocab_size, *ids, 511, 10**6]) == TEXT


def test_control_tokens_are_spelt_as_in_the_file(bpe):
    assert tokenizers.control(bpe, 0, 1) == {"pad_token": "<pad>", "eos_token": "</s>"}
    assert tokenizers.control(bpe, -1, 1) == {"eos_token": "</s>"}


def test_padding_beyond_the_vocabulary_is_refused(bpe, tmp_path):
    fields = json.loads(bpe.read_text())
    fields["padding"] = dict(
        strategy="BatchLongest",
        direction="Right",
        pad_to_multiple_of=None,
        pad_id=9999,
        pad_type_id=0,
        pad_token="x",
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"pads with the token 9999, but must with one from 0"):
        tokenizers.tokenizer(str(tmp_path))


def test_a_name_exists_or_not(bpe, tmp_path):
    assert tokenizers.exists("bytes")
    assert tokenizers.exists(str(bpe))
    assert not tokenizers.exists("gpt2")
    assert not tokenizers.exists(str(tmp_path / "none.json"))


@pytest.mark.parametrize("seed", range(10))
def test_bpe_never_lacks_a_letter_and_text_makes_no_control_token(bpe, seed):
    rng = np.random.default_rng(seed)
    points = [int(p) for p in rng.integers(0, 0x11000, 60) if not 0xD800 <= p < 0xE000]
    text = "".join(map(chr, points)) + "</s><pad>"
    kind = tokenizers.tokenizer(str(bpe))
    ids = kind.encode(text)
    assert kind.decode(ids) == text
    assert not np.isin(ids, [kind.pad, kind.eos]).any()


def test_a_batch_is_its_texts(bpe):
    texts = [TEXT, "", "a", TEXT[::-1]]
    for name in ("bytes", str(bpe)):
        kind = tokenizers.tokenizer(name)
        for got, text in zip(kind.encode_all(texts), texts, strict=True):
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, kind.encode(text))


def test_training_is_repeatable():
    texts = [TEXT, "the cat sat on the mat " * 20]
    assert tokenizers.train_bpe(texts, 290) == tokenizers.train_bpe(texts, 290)


def test_a_files_own_cutting_and_padding_are_off(bpe, tmp_path):
    fields = json.loads(bpe.read_text())
    fields["truncation"] = dict(
        direction="Right", max_length=4, strategy="LongestFirst", stride=0
    )
    fields["padding"] = dict(
        strategy={"Fixed": 512},
        direction="Right",
        pad_to_multiple_of=None,
        pad_id=7,
        pad_type_id=0,
        pad_token="x",
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    kind = tokenizers.tokenizer(str(tmp_path))
    assert kind.pad == 7
    assert kind.decode(kind.encode(TEXT)) == TEXT


def test_sentencepiece_of_text(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [l for l in SHIPPED.read_text()[:60_000].splitlines() if l]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=200,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    kind = tokenizers.tokenizer(str(tmp_path / "sp.model"))
    assert (kind.vocab_size, kind.pad, kind.eos) == (200, 0, 1)
    ids = kind.encode(lines[0])
    assert ids.dtype == np.int32
    assert kind.decode(np.append(ids, [1, 0])) == lines[0]
    for got, text in zip(kind.encode_all([lines[1], ""]), (lines[1], ""), strict=True):
        np.testing.assert_array_equal(got, kind.encode(text))
    assert not np.isin(kind.encode("</s> <pad>"), [0, 1]).any()
    assert kind.decode([*ids, 200, 10**6, -1]) == lines[0]


def test_the_digest_is_of_the_contents(bpe, tmp_path):
    copy = tmp_path / "other.json"
    copy.write_bytes(bpe.read_bytes())
    assert tokenizers.digest(str(copy)) == tokenizers.digest(str(bpe))
    assert tokenizers.digest("bytes") == "bytes"


@pytest.mark.parametrize("name", ["", "byte", "t5-base", "missing.json", "missing.model"])
def test_an_unknown_tokenizer_is_refused_with_what_is_allowed(name):
    with pytest.raises(UserError, match="'bytes', the path"):
        tokenizers.tokenizer(name)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        tokenizers.tokenizer(str(path))


def test_sentencepiece_that_is_missing_or_damaged_is_named(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"extra 'c4'|no SentencePiece model"):
        tokenizers.tokenizer(str(path))


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(UserError, match="at least 258"):
        tokenizers.train_bpe(["text"], 257)
