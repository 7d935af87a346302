"""Data that cannot be used: each kind is reported with its file and line, or left out and counted."""

import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from media_files import AUDIO, ENCODERS, VISION, chat, gif, image, index, picture, png, settings, wav, write
from PIL import Image
from test_multimodal_formats import shard

from weft.config.errors import DataError
from weft.data.media import packages
from weft.data.multimodal import open_multimodal
from weft.data.packed import PackedLoader
from weft.spec.data import MediaConfig, TokenizerConfig


def bomb() -> bytes:
    """A small PNG whose header names 30,000 x 30,000 pixels."""
    data = png(Image.new("L", (8, 8)))
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def no_size() -> bytes:
    """A bitmap without columns."""
    data = bytearray(png(Image.new("RGB", (1, 1)), "BMP"))
    data[18:22] = bytes(4)
    return bytes(data)


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


SOUND = {"type": "audio", "audio": "a.wav"}
VIDEO = {"type": "video", "video": "a.gif"}
DAMAGE = {  # content of the row, file beside it, reason, words of the message
    "truncated picture": (chat(image("a.png"), "?"), cut(png()), "broken picture", "cannot be decoded"),
    "no picture": (chat(image("a.png"), "?"), b"hello", "broken picture", "no picture that can be read"),
    "empty file": (chat(image("a.png"), "?"), b"", "broken picture", "no picture"),
    "bomb": (chat(image("a.png"), "?"), bomb(), "too many pixels", "max_pixels|leave the picture out"),
    "large": (
        chat(image("a.png"), "?"),
        png(Image.new("L", (3000, 3000))),
        "too many pixels",
        "9,?000,?000|3000 x 3000",
    ),
    "animated": (chat(image("a.png"), "?"), gif(3), "animated picture", "give it as a video"),
    "zero size": (chat(image("a.png"), "?"), no_size(), "empty picture|broken picture", "0 x 1|no picture"),
    "missing file": (chat(image("b.png"), "?"), png(), "missing file", "does not exist"),
    "traversal": (chat(image("../a.png"), "?"), png(), "outside the folder", "media.outside"),
    "absolute": (chat(image("/etc/passwd"), "?"), png(), "outside the folder", "media.outside"),
    "network": (chat(image("https://host/a.png"), "?"), png(), "on a network", "download"),
    "not base64": (chat(image("data:image/png;base64,%%%%"), "?"), b"", "not base64", "base64"),
    "large file": (chat(image("a.png"), "?"), bytes(2_000_001), "too many bytes", "max_bytes"),
    "empty clip": (chat(SOUND, "?"), wav(0), "empty clip", "no samples"),
    "truncated clip": (chat(SOUND, "?"), wav()[:-1001], "broken clip", "4,000 samples, but 3,499"),
    "half a header": (chat(SOUND, "?"), wav()[:20], "broken clip", "no wave"),
    "long clip": (chat(SOUND, "?"), wav(16000), "too long a clip", "max_seconds"),
    "no sound": (chat(SOUND, "?"), b"hello", "broken clip", "no sound"),
    "truncated video": (chat(VIDEO, "?"), gif(4, 64)[:-200], "broken video|broken picture", "decoded"),
    "no frames": (chat({"type": "video", "video": []}, "?"), b"", "wrong messages|empty video", "no f"),
    "wrong film": (chat({"type": "video", "video": "a.wav"}, "?"), wav(), "broken video", "no pictures"),
    "not JSON": ('{"messages": [', b"", "not JSON", "not JSON"),
    "no object": ("3", b"", "not JSON", "one object"),
    "no messages": ({"chat": []}, b"", "wrong messages", "no `messages`"),
    "no turns": ({"messages": []}, b"", "wrong messages", "list of turns"),
    "no content": ({"messages": [{"role": "user"}]}, b"", "wrong messages", "`role` and `content`"),
    "unknown role": ({"messages": [{"role": "bot", "content": ""}]}, b"", "unknown role", "'bot'"),
    "unknown part": (chat({"type": "smell"}), b"", "unknown part", "'smell'"),
    "names nothing": (chat({"type": "image_url"}), b"", "wrong messages", "names no file"),
    "no answer": ({"messages": [{"role": "user", "content": "?"}]}, b"", "no target", "data.targets=all"),
    "wrong encoder": (chat(image("a.png", encoder="audio"), "?"), png(), "no encoder", "'audio'"),
    "control token": (chat("see <|im_end|>"), b"", "control token in text", "im_end"),
    "surrogate": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', b"", "not UTF-8", "surrogate"),
    "too many items": (chat(*[image("a.png")] * 4, "?"), png(), "too many items", "max_items"),
    "too long": (chat("a" * 300), b"", "too long", "the limit is 128"),
}
MEDIA = MediaConfig(max_pixels=1_000_000, max_bytes=2_000_000, max_seconds=0.9, max_items=3)


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.filterwarnings("default")  # Pillow warns of a bomb before it refuses one
def test_damage_is_reported_or_counted(tmp_path, case):
    row, content, reason, words = case
    ending = "gif" if "a.gif" in json.dumps(row) else "wav" if "a.wav" in json.dumps(row) else "png"
    path = write(tmp_path, [chat("fine"), row, chat("fine too")], **{f"a__{ending}": content})
    config = settings(path, template="chatml", media=MEDIA)
    pattern = rf"data\.jsonl:2: ({reason}): .*({words}).*(media_errors=skip|overlong=skip)"
    with pytest.raises(DataError, match=pattern):
        index(config, tmp_path / "cache")
    split = index(replace(config, media_errors="skip", overlong="skip"), tmp_path / "cache").splits["train"]
    assert split.documents == 2
    ((counted, number),) = split.skipped.items()
    assert counted in reason.split("|")
    assert number == 1


def test_a_line_that_is_not_utf8(tmp_path):
    path = write(tmp_path, [chat("fine")])
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not UTF-8: .*byte 14 \(0xff\)"):
        index(settings(path), tmp_path / "cache")


def test_a_line_longer_than_the_limit(tmp_path):
    path = write(tmp_path, [chat("fine"), chat("a" * 5000), chat("fine too")])
    config = settings(path, media=replace(MEDIA, max_bytes=1000), media_errors="skip")
    split = index(config, tmp_path / "cache").splits["train"]
    assert (split.documents, split.skipped) == (2, {"too many bytes": 1})


def test_files_outside_are_read_where_the_user_trusts_them(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    path = write(tmp_path / "inner", [chat(image("../a.png"), "?")])
    data = index(settings(path, media=replace(MEDIA, outside=True)), tmp_path / "cache")
    assert data.splits["train"].documents == 1


def test_a_link_does_not_lead_outside(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "inner" / "b.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(DataError, match="outside the folder"):
        index(settings(write(tmp_path / "inner", [chat(image("b.png"), "?")])), tmp_path / "cache")


@pytest.mark.parametrize(
    ("part", "encoders"), [(image("a.png"), {"audio": AUDIO}), (SOUND, {"vision": VISION})]
)
def test_media_without_an_encoder(tmp_path, part, encoders):
    path = write(tmp_path, [chat(part, "?")], a__png=png(), a__wav=wav())
    with pytest.raises(DataError, match=r"data\.jsonl:1: no encoder: .*add one under `encoders`"):
        index(settings(path), tmp_path / "cache", encoders)


def test_video_without_frames_of_its_encoder(tmp_path):
    path = write(tmp_path, [chat(VIDEO, "?")], a__gif=gif(3))
    with pytest.raises(DataError, match=r"encoders\.vision reads no video"):
        index(settings(path), tmp_path / "cache", {"vision": replace(VISION, frames=0)})


def test_placeholders_in_text(tmp_path):
    """A tokenizer has a control token for pictures: texts may not hold it, and ordinary ones are refused."""
    made = TokenizerConfig(vocab_size=258, bos="<bos>", eos="<img>")
    tokenizer = index(settings(write(tmp_path, [chat("fine")]), tokenizer=made), tmp_path / "cache").tokenizer
    config = settings(write(tmp_path, [chat(image("a.png"), "<img>")], a__png=png()))
    tokenizer.save(tmp_path / "tokenizer")
    named = TokenizerConfig(path=str(tmp_path / "tokenizer"), eos="<bos>")
    placeholder = tokenizer.encode("<img>", special=True)
    encoders = {"vision": replace(VISION, token=placeholder[0])}
    with pytest.raises(DataError, match=r"data\.jsonl:1: control token in text: .*'<img>'"):
        index(replace(config, tokenizer=named), tmp_path / "cache", encoders)
    ordinary = {"vision": replace(VISION, token=tokenizer.encode("a")[0])}
    with pytest.raises(DataError, match=r"encoders\.vision\.token = \d+ is 'a' in texts; .*from 258 on"):
        index(replace(config, tokenizer=named), tmp_path / "cache", ordinary)
    with pytest.raises(DataError, match=r"encoders\.vision\.token = 300, but .* 290"):
        open_multimodal(replace(config, tokenizer=named), ENCODERS, 290, tmp_path / "cache")


SHARDS = {
    "no text": ({"1.png": png()}, "no text", "neither .json nor .txt"),
    "broken picture": ({"1.png": cut(png()), "1.txt": b"one"}, "broken picture", "decoded"),
    "not JSON": ({"1.json": b"{"}, "not JSON", "not JSON"),
    "no such member": ({"1.json": json.dumps(chat(image("2.png"))).encode()}, "missing file", "names 2.png"),
    "outside": ({"1.json": json.dumps(chat(image("/etc/passwd"))).encode()}, "missing file", "names /etc"),
}


@pytest.mark.parametrize("case", SHARDS.values(), ids=SHARDS)
def test_damage_in_archives_names_archive_and_member(tmp_path, case):
    members, reason, words = case
    shard(tmp_path / "x.tar", {"0.txt": b"zero", **members, "2.txt": b"two"})
    config = settings(tmp_path)
    with pytest.raises(DataError, match=rf"x\.tar: 1: {reason}: .*{words}"):
        index(config, tmp_path / "cache")
    split = index(replace(config, media_errors="skip"), tmp_path / "cache").splits["train"]
    assert (split.documents, split.skipped) == (2, {reason: 1})


@pytest.mark.parametrize("size", [700, 100, 1800])
def test_a_truncated_archive(tmp_path, size):
    shard(tmp_path / "a.tar", {"0.txt": b"zero"})
    shard(tmp_path / "b.tar", {"1.txt": b"o" * 600, "2.txt": b"t" * 600})
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:size])
    with pytest.raises(DataError, match=r"b\.tar.*(damaged archive|truncated)"):
        index(settings(tmp_path, seq_length=2000), tmp_path / "cache")
    config = settings(tmp_path, media_errors="skip", seq_length=2000)
    assert sum(index(config, tmp_path / "cache").splits["train"].skipped.values()) == 1


def test_a_split_in_which_nothing_is_left(tmp_path):
    path = write(tmp_path, [chat(image("a.png"))])
    with pytest.raises(DataError, match="no sample in the split 'train' .*1 left out: missing file"):
        index(settings(path, media_errors="skip"), tmp_path / "cache")


def test_files_that_changed_since(tmp_path):
    path = write(tmp_path, [chat(image("a.png"), "?")], a__png=png())
    data = index(settings(path, media=replace(MEDIA, cache_bytes=0)), tmp_path / "cache")
    (placed,) = PackedLoader(data.splits["train"], 128, 0, 0).microbatch(0, 1).items
    assert np.isfinite(data.media.load(placed.item, 0)).all()
    wrong = [
        (png(picture(64, 64)), "cannot be decoded|of size"),
        (b"", "ends before"),
        (b"a" * 2000, "no picture that can be read"),
    ]
    for content, words in wrong:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"data\.jsonl:1: .*({words}).*restore it"):
            data.media.load(placed.item, 0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="missing file"):
        data.media.load(placed.item, 0)


def test_a_film_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    path = write(tmp_path, [chat({"type": "video", "video": "a.mp4"})], a__mp4=b"film")
    with pytest.raises(DataError, match=r"a\.mp4 needs the package av: pip install 'weft\[video\]'"):
        index(settings(path, media_errors="skip"), tmp_path / "cache")


def test_a_clip_with_samples_that_are_no_numbers(tmp_path):
    pytest.importorskip("av")
    samples = np.array([0.0, np.nan, 0.5] * 500, "<f4").tobytes()
    head = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    chunks = [(b"fmt ", head), (b"data", samples)]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in chunks)
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    path = write(tmp_path, [chat(SOUND, "?")], a__wav=data)
    with pytest.raises(DataError, match="broken clip: .*not finite"):
        index(settings(path), tmp_path / "cache")
