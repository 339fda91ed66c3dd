"""Text files, token stores, and the command that makes them: kills, damage, refusals."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from lm import corpus, prepare, sources, tokenizers

ROOT = Path(__file__).parent.parent.parent
BYTES = tokenizers.tokenizer("bytes")


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing handles it."""


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def novels(tmp_path):
    """Two files, twelve documents, one of them empty."""
    folder = tmp_path / "novels"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["cat", "mat", "Ärger", "sat", "the", "on", "naïve", "a"]
    text = [" ".join(rng.choice(words, 5 + 7 * i)) + "\n" for i in range(11)]
    (folder / "a.txt").write_text("\f".join(text[:5]))
    (folder / "b.txt").write_text("\f".join([text[5], "", *text[6:]]))
    return folder


def run(source, out, *more):
    return prepare.main([f"--source={source}", f"--out={out}", *more])


# Texts in memory.


def test_bytes_of_a_file_are_its_tokens(tmp_path):
    raw = np.random.default_rng(1).integers(0, 256, 5000, np.uint8)
    raw = raw.tobytes().replace(b"\f\f", b"\f.").strip(b"\f")
    (tmp_path / "any.txt").write_bytes(raw)
    found = corpus.from_text(tmp_path / "any.txt", BYTES)
    assert found.tokens.tobytes() == np.frombuffer(raw, np.uint8).astype("<u2").tobytes()
    starts = [0, *(i + 1 for i, b in enumerate(raw) if b == 12), len(raw)]
    np.testing.assert_array_equal(found.offsets, starts)
    assert (found.vocab, found.largest) == (256, max(raw))


def test_a_file_a_folder_and_a_glob(novels):
    whole = corpus.load(str(novels))
    a, b = ((novels / name).read_bytes() for name in ("a.txt", "b.txt"))
    wanted = a + b"\f" + b.replace(b"\f\f", b"\f")
    assert bytes(whole.tokens.tolist()) == wanted
    assert len(whole.offsets) == 12
    for other in (corpus.load(f"{novels}/*.txt"), corpus.from_text([novels], BYTES)):
        np.testing.assert_array_equal(other.tokens, whole.tokens)
        np.testing.assert_array_equal(other.offsets, whole.offsets)
    alone = corpus.load(str(novels / "a.txt"))
    assert bytes(alone.tokens.tolist()) == a


def test_the_shipped_text():
    found = corpus.load("")
    assert len(found.tokens) == 1_115_394
    assert len(np.unique(found.tokens)) == 65
    train, valid = corpus.split(found, 0.1)
    assert (len(train.tokens), len(valid.tokens)) == (1_003_854, 111_540)


def test_documents_end_in_the_end_of_text(novels, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.train_bpe([(novels / "a.txt").read_text()], 280))
    kind = tokenizers.tokenizer(str(path))
    found = corpus.load(str(novels), str(path))
    texts = [t for p in ("a.txt", "b.txt") for t in (novels / p).read_text().split("\f") if t]
    assert len(found.offsets) == len(texts) + 1
    for text, first, last in zip(texts, found.offsets, found.offsets[1:], strict=False):
        ids = found.tokens[first:last]
        assert ids[-1] == kind.eos
        assert kind.decode(ids) == text
    assert (found.pad, found.eos, found.vocab) == (0, 1, kind.vocab_size)


def test_documents_do_not_depend_on_how_the_file_is_read(novels, monkeypatch):
    whole = list(corpus.documents(novels / "b.txt", False))
    assert len(whole) == 6

    class Slow:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def read(self, size):
            return self.stream.read(3)

    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: Slow(original(self, mode)))
    assert list(corpus.documents(novels / "b.txt", False)) == whole


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good\fsome \xff bad")
    bpe = tmp_path / "tokenizer.json"
    bpe.write_text(tokenizers.train_bpe(["good"], 258))
    with pytest.raises(UserError, match=r"bad\.txt is not valid UTF-8 at byte 10;"):
        corpus.load(str(path), str(bpe))
    assert len(corpus.load(str(path)).tokens) == 15


@pytest.mark.parametrize("text", ["", "\f\f", "a"])
def test_an_empty_text_is_named(tmp_path, text):
    (tmp_path / "none.txt").write_text(text)
    said = rf"none\.txt has {text.count('a')} tokens, but needs at least 2 tokens"
    with pytest.raises(UserError, match=said):
        corpus.load(str(tmp_path / "none.txt"))


def test_what_is_not_there_is_named(tmp_path):
    said = r"config\.data\.path is '.*', but must be a token store, a text file, a folder"
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=said):
            corpus.load(str(path))
        with pytest.raises(UserError, match=r"config\.data\.valid is"):
            corpus.load(str(path), field="data.valid")
    with pytest.raises(UserError, match=r"no text file, folder or token store '.*nowhere'"):
        corpus.files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \.txt files"):
        corpus.files(tmp_path)
    with pytest.raises(UserError, match=r"config\.data\.tokenizer is 'gpt2', but must be ''"):
        corpus.load("", "gpt2")
    with pytest.raises(UserError, match="no token store in"):
        corpus.open_store(tmp_path)


# Splitting.


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.5, 0.77, 0.99])
def test_the_parts_of_a_split_are_the_whole(novels, holdout, by_document):
    whole = corpus.load(str(novels))
    train, valid = corpus.split(whole, holdout, by_document)
    np.testing.assert_array_equal(np.append(train.tokens, valid.tokens), whole.tokens)
    cut = len(train.tokens)
    for part in (train, valid):
        assert part.offsets.dtype == np.int64
        assert (part.offsets[0], part.offsets[-1]) == (0, len(part.tokens))
        assert np.all(np.diff(part.offsets) > 0)
    joined = {*train.offsets.tolist(), *(valid.offsets + cut).tolist()}
    assert joined == {*whole.offsets.tolist(), cut}
    if by_document:
        assert cut in whole.offsets
        share = len(whole.tokens) * (1 - holdout)
        assert abs(cut - int(share)) == np.abs(whole.offsets[1:-1] - int(share)).min()
    else:
        assert cut == int(len(whole.tokens) * (1 - holdout))


@pytest.mark.parametrize("holdout", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_out_of_range_is_named(novels, holdout):
    with pytest.raises(UserError, match=r"config\.data\.holdout is"):
        corpus.split(corpus.load(str(novels)), holdout)


def test_a_text_that_cannot_be_split_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    whole = corpus.load(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"data\.holdout is 0\.01, .* 2 of the 6 tokens"):
        corpus.split(whole, 0.01)
    with pytest.raises(UserError, match="one document"):
        corpus.split(whole, 0.5, by_document=True)


# Stores.


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
@pytest.mark.parametrize("shard", [1, 100, 10**6])
def test_a_store_holds_what_the_text_holds(novels, tmp_path, tokenizer, shard, capsys):
    out = tmp_path / "store"
    assert run(novels, out, f"--tokenizer={tokenizer}", f"--shard={shard}") == 0
    assert "11 documents" in capsys.readouterr().out
    found = corpus.load(str(out))
    name = "bytes" if tokenizer == "bytes" else str(out / "tokenizer.json")
    wanted = corpus.load(str(novels), name)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.offsets, wanted.offsets)
    assert found[2:-1] == wanted[2:-1]
    assert isinstance(found.tokens, np.memmap)
    extra = set() if tokenizer == "bytes" else {"tokenizer.json"}
    assert set(contents(out)) == {"meta.json", "offsets.npy", "tokens.bin"} | extra
    before = contents(out)
    assert run(novels, out, f"--tokenizer={tokenizer}", f"--shard={shard}") == 0
    assert contents(out) == before


def die_after(patch, moments):
    """Lets that many flushes, renames and removals pass and dies before the next."""
    left = [moments]

    def guarded(original):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments)

        return call

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, guarded(getattr(os, name)))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
def test_a_kill_at_any_moment_changes_no_byte(novels, tmp_path, tokenizer):
    more = (f"--tokenizer={tokenizer}", "--shard=400")
    assert run(novels, tmp_path / "whole", *more) == 0
    wanted = contents(tmp_path / "whole")
    for moment in itertools.count():
        out = tmp_path / f"torn{moment}"
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, moment)
            try:
                assert run(novels, out, *more) == 0
            except Killed:
                pass
            else:
                break
        if not (out / "meta.json").exists():
            for name in ("tokens.bin", "offsets.partial"):  # A shard half written.
                if (out / name).exists() and moment % 2:
                    (out / name).write_bytes((out / name).read_bytes() + b"torn!")
            with pytest.raises(UserError, match=r"unfinished|no token store"):
                corpus.open_store(out)
        assert run(novels, out, *more) == 0
        assert contents(out) == wanted
    assert moment > 10


def test_sigkill_and_the_same_command_again(tmp_path):
    rng = np.random.default_rng(2)
    texts = [bytes(rng.integers(97, 123, 60, np.uint8)).decode() for _ in range(4000)]
    (tmp_path / "many.txt").write_text("\f".join(texts))
    flags = [f"--source={tmp_path / 'many.txt'}", "--tokenizer=bytes"]
    assert prepare.main([*flags, f"--out={tmp_path / 'whole'}"]) == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "lm.prepare", *flags, f"--out={out}", "--shard=100"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    progress, done = out / "progress.json", 0
    limit = time.monotonic() + 120
    while done < 40 and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.005)
        if progress.exists():
            done = json.loads(progress.read_text())["done"]["documents"]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 40 <= done < 4000
    assert not (out / "meta.json").exists()
    with pytest.raises(UserError, match="unfinished; run the same"):
        corpus.load(str(out))
    assert prepare.main([*flags, f"--out={out}"]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_stream_goes_on_where_it_stopped(tmp_path):
    """C4's path with an iterator in the place of the network, which breaks twice."""
    texts = ["", *(f"document {i} " * (i % 7 + 1) for i in range(300)), ""]
    asked = []

    def stream(split, revision, skip):
        asked.append((split, revision, skip))
        for i in range(skip, len(texts)):
            if len(asked) < 3 and i == 100 * len(asked):
                raise UserError("The network failed.")
            yield texts[i]

    flags = prepare.Flags("allenai/c4:validation", "bytes", str(tmp_path / "store"), 250, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BATCH", 8)
        for _ in range(2):
            with pytest.raises(UserError, match="network"):
                prepare.prepare(flags, stream)
        assert "249 documents" in prepare.prepare(flags, stream)
    splits, _, skips = zip(*asked, strict=True)
    assert set(splits) == {"validation"}
    assert 0 == skips[0] < skips[1] < 100 < skips[2] < 200
    found = corpus.load(str(tmp_path / "store"))
    assert bytes(found.tokens.tolist()).decode() == "\f".join(texts[1:250])
    assert "249 documents" in prepare.prepare(flags, None)  # Finished: no network needed.


def test_a_shuffled_stream_can_be_entered_anywhere(monkeypatch):
    """The real library on a small data set of four shards: skipping finds the same order."""
    datasets = pytest.importorskip("datasets")

    def generate(shards):
        for shard in shards:
            yield from ({"text": f"{shard} {i}"} for i in range(50))

    def load_dataset(name, subset, *, split, streaming, revision):
        assert (name, subset, split, streaming) == ("allenai/c4", "en", "train", True)
        assert revision == "abc"
        return datasets.IterableDataset.from_generator(
            generate, gen_kwargs={"shards": [0, 1, 2, 3]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "BUFFER", 20)
    whole = list(sources.c4("train", "abc", 0))
    assert len(set(whole)) == 200
    assert whole != sorted(whole)
    for skip in (1, 77, 199, 200):
        assert list(sources.c4("train", "abc", skip)) == whole[skip:]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("flag", "field"),
    [("--documents=3", "documents"), ("--tokenizer=bpe:300", "tokenizer"), (None, "source")],
)
def test_other_settings_are_refused(
    novels, tmp_path, capsys, monkeypatch, finished, flag, field
):
    out = tmp_path / "store"
    if not finished:
        monkeypatch.setattr(prepare, "_finish", lambda *a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(novels, out, "--tokenizer=bytes")
        monkeypatch.undo()
    else:
        assert run(novels, out, "--tokenizer=bytes") == 0
    before = contents(out)
    if flag is None:
        (novels / "a.txt").write_text("another text")
    flags = [flag] if flag else []
    if not any(f.startswith("--tokenizer") for f in flags):
        flags.append("--tokenizer=bytes")
    capsys.readouterr()
    assert run(novels, out, *flags) == 2
    message = capsys.readouterr().err.strip()
    assert f"begun with another {field}" in message
    assert "\n" not in message
    assert contents(out) == before
    if finished:
        return
    if flag is not None:  # The right command still goes on.
        assert run(novels, out, "--tokenizer=bytes", "--shard=7") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--source=... is missing"),
        (["--source=x", "--tokenizer=bytes"], "--out=... is missing"),
        (["--sauce=x"], "Unknown argument '--sauce=x'"),
        (["--source=x", "--source=y"], "stands twice"),
        (
            ["--source=x", "--tokenizer=bytes", "--out=o", "--documents=-1"],
            "--documents is '-1'",
        ),
        (["--source=x", "--tokenizer=bytes", "--out=o", "--shard=0"], "--shard is '0'"),
    ],
)
def test_flags_that_cannot_be_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        prepare.parse(flags)


@pytest.mark.parametrize(
    ("source", "tokenizer", "message"),
    [
        ("nowhere", "bytes", "no text file, folder or token store 'nowhere'"),
        ("allenai/c4:test", "bytes", "C4 has train and validation"),
        ("allenai/c4", "bpe:300", "trained on text files only"),
        ("nowhere", "gpt2", "The tokenizer is 'gpt2'"),
        ("nowhere", "bpe:12", "vocabulary from 258 on"),
    ],
)
def test_a_source_that_cannot_be_is_refused(tmp_path, capsys, source, tokenizer, message):
    assert run(source, tmp_path / "out", f"--tokenizer={tokenizer}") == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("allenai/c4", tmp_path / "out", "--tokenizer=bytes") == 2
    assert "uv run --extra c4" in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(novels, capsys):
    before = contents(novels)
    assert run(novels, novels, "--tokenizer=bytes") == 2
    assert "is not empty and holds no store" in capsys.readouterr().err
    assert contents(novels) == before


def test_two_commands_at_once_are_refused(novels, tmp_path, capsys):
    out = tmp_path / "store"
    out.mkdir()
    with prepare._alone(out):
        assert run(novels, out, "--tokenizer=bytes") == 2
    assert "Another process is writing" in capsys.readouterr().err
    assert run(novels, out, "--tokenizer=bytes") == 0


def test_a_store_knows_its_tokenizer(novels, tmp_path):
    out = tmp_path / "store"
    assert run(novels, out, "--tokenizer=bpe:270") == 0
    moved = tmp_path / "moved"
    out.rename(moved)
    found = corpus.load(str(moved), str(moved / "tokenizer.json"))
    text = tokenizers.tokenizer(found.tokenizer).decode(found.tokens)
    assert text.startswith((novels / "a.txt").read_text().partition("\f")[0])
    with pytest.raises(UserError, match=r"data\.tokenizer is 'bytes', .* was made with"):
        corpus.load(str(moved), "bytes")


def set_meta(folder, **fields):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_token(folder, place, value):
    tokens = np.memmap(folder / "tokens.bin", "<u2", "r+")
    tokens[place] = value
    tokens.flush()


DAMAGE = {
    "torn meta": (
        lambda f: (f / "meta.json").write_text('{"version'),
        r"meta\.json is damaged",
    ),
    "list": (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json is damaged"),
    "no count": (lambda f: set_meta(f, tokens=None), r"meta\.json is damaged: tokens is"),
    "pad": (lambda f: set_meta(f, pad=256), r"pad is 256, but must be from -1 \(none\) to 255"),
    "eos": (lambda f: set_meta(f, eos=-2), r"meta\.json is damaged: eos is -2"),
    "version": (lambda f: set_meta(f, version=9), "format version 9, but must have 1"),
    "short": (
        lambda f: os.truncate(f / "tokens.bin", 7),
        r"tokens\.bin is damaged: it has 7 b",
    ),
    "gone": (lambda f: (f / "tokens.bin").unlink(), r"tokens\.bin is damaged: it has 0 bytes"),
    "beyond": (
        lambda f: set_token(f, 3, 256),
        r"tokens\.bin is damaged: its largest token is 256",
    ),
    "no offsets": (
        lambda f: (f / "offsets.npy").unlink(),
        r"offsets\.npy is damaged or missing",
    ),
    "torn offsets": (lambda f: os.truncate(f / "offsets.npy", 90), r"offsets\.npy is damaged"),
    "wrong": (lambda f: np.save(f / "offsets.npy", np.zeros(12)), "does not fit"),
    "falling": (
        lambda f: np.save(
            f / "offsets.npy", np.load(f / "offsets.npy")[[0, *range(10, 0, -1), 11]]
        ),
        "does not fit",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(novels, tmp_path, name):
    damage, message = DAMAGE[name]
    out = tmp_path / "store"
    assert run(novels, out, "--tokenizer=bytes") == 0
    corpus.open_store(out)
    damage(out)
    with pytest.raises(UserError, match=message):
        corpus.open_store(out)
    with pytest.raises(UserError, match=message):
        corpus.load(str(out), "bytes")


def test_a_shard_that_was_lost_is_named(novels, tmp_path, capsys, monkeypatch):
    out = tmp_path / "store"
    monkeypatch.setattr(prepare, "_finish", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(novels, out, "--tokenizer=bytes")
    monkeypatch.undo()
    os.truncate(out / "tokens.bin", 9)
    assert run(novels, out, "--tokenizer=bytes") == 2
    assert "tokens.bin is damaged: 9 bytes of" in capsys.readouterr().err


def test_the_width_of_tokens():
    assert corpus.width(2**16).itemsize == 2
    assert corpus.width(2**16 + 1).itemsize == 4


@pytest.mark.parametrize("tokens", [2, 5, 6, 9])
def test_a_head_is_a_prefix_with_its_documents(tmp_path, tokens):
    (tmp_path / "a.txt").write_bytes(b"abcde\x0cfghi")
    whole = corpus.from_text(str(tmp_path / "a.txt"), tokenizers.tokenizer("bytes"))
    part = corpus.head(whole, tokens)
    assert bytes(np.asarray(part.tokens, np.uint8)) == b"abcde\x0cfghi"[:tokens]
    assert part.offsets[-1] == len(part.tokens) == tokens
    assert list(part.offsets) == [o for o in whole.offsets if o < tokens] + [tokens]
    assert corpus.head(whole, 0) is whole
    for wrong in (-1, 1):
        with pytest.raises(UserError, match=rf"data\.limit is {wrong}, but must be 0"):
            corpus.head(whole, wrong)
