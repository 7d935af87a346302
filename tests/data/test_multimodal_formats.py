"""Conversations with media, as users write them: spellings, archives, templates, targets."""

import io
import json
import tarfile
from base64 import b64encode

import numpy as np
import pytest
from media_files import AUDIO, ENCODERS, VISION, chat, gif, image, index, picture, png, settings, wav, write

from weft.config.errors import DataError
from weft.data.inspect_samples import describe_samples
from weft.data.messages import parse, render
from weft.data.multimodal import check_multimodal, is_multimodal
from weft.data.packed import PackedLoader

B64 = b64encode(png()).decode()
SPELLINGS = {
    "nested": image("a.png"),
    "plain name": {"type": "image_url", "image_url": "a.png"},
    "image": {"type": "image", "image": "a.png"},
    "path": {"type": "image", "path": "a.png"},
    "input_image": {"type": "input_image", "image_url": "a.png"},
    "data": image(f"data:image/png;base64,{B64}"),
}


def loaded(data, document=0, split="train"):
    """What encoders read of all items of a document."""
    items = [found.item for found in data.splits[split].items(document)]
    return items, [[data.media.load(item, i) for i in range(len(item.sizes))] for item in items]


@pytest.mark.parametrize("part", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_a_picture_is_the_same(tmp_path, part):
    data = index(settings(write(tmp_path, [chat(part, "?")], a__png=png())), tmp_path / "cache")
    (item,), ((patches,),) = loaded(data)
    assert (item.encoder, item.sizes, item.rows) == ("vision", ((1, 4, 4),), 4)
    pixels = np.asarray(picture(), np.float64) / 255
    normal = ((pixels - VISION.mean) / VISION.std).transpose(2, 0, 1)
    cells = [(r, c) for br in (0, 2) for bc in (0, 2) for r in (br, br + 1) for c in (bc, bc + 1)]
    want = [normal[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(-1) for r, c in cells]
    np.testing.assert_allclose(patches, want, atol=1e-6)


def test_file_addresses_and_escaped_slashes(tmp_path):
    line = json.dumps(chat(image(f"data:image/png;base64,{B64}"), "?")).replace("/", "\\/")
    path = write(tmp_path, [chat(image(f"file://{tmp_path}/a%20b.png"), "?"), line])
    (tmp_path / "a b.png").write_bytes(png())
    data = index(settings(path), tmp_path / "cache")
    ((_, [[one]]), (_, [[two]])) = loaded(data, 0), loaded(data, 1)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": b64encode(wav()).decode(), "format": "wav"}},
        {"type": "audio", "audio": "a.wav"},
        {"type": "audio_url", "audio_url": {"url": "a.wav"}},
    ],
)
def test_sound(tmp_path, part):
    data = index(settings(write(tmp_path, [chat(part, "?")], a__wav=wav())), tmp_path / "cache")
    (item,), ((frames,),) = loaded(data)
    assert (item.encoder, item.sizes, item.rows) == ("audio", ((26,),), 4)
    assert frames.shape == (AUDIO.mel_frames(4000), AUDIO.mels)


def test_videos_of_every_form(tmp_path):
    files = {f"f{i}__png": png(picture(seed=i)) for i in range(3)}
    rows = [
        chat({"type": "video", "video": ["f0.png", "f1.png", "f2.png"]}, "?"),
        chat({"type": "video_url", "video_url": {"url": "frames"}}, "?"),
        chat({"type": "video", "video": "a.gif"}, "?"),
    ]
    path = write(tmp_path, rows, a__gif=gif(5), **files)
    (tmp_path / "frames").mkdir()
    for i in range(3):
        (tmp_path / "frames" / f"{i}.png").write_bytes(files[f"f{i}__png"])
    data = index(settings(path), tmp_path / "cache")
    (item,), ((first, second),) = loaded(data)
    assert (item.sizes, item.rows) == (((2, 4, 4),) * 2, 8)
    stills = [
        index(settings(write(tmp_path, [chat(image(f"f{i}.png"), "?")])), tmp_path / "c") for i in (0, 1, 2)
    ]
    one, two, last = (loaded(still)[1][0][0] for still in stills)
    np.testing.assert_array_equal(first, np.concatenate([one, two], axis=1))
    np.testing.assert_array_equal(second, np.concatenate([last, last], axis=1))  # the last frame again
    assert all((a == b).all() for a, b in zip(loaded(data, 1)[1][0], (first, second), strict=True))
    (item,), (groups,) = loaded(data, 2)
    assert len(item.sizes) == 3
    bright = [part.mean() for group in groups for part in np.split(group, 2, axis=1)]
    assert sorted(bright) == bright
    assert bright[-1] == bright[-2]


def test_of_a_long_video_some_frames_are_read(tmp_path):
    path = write(tmp_path, [chat({"type": "video", "video": "a.gif"}, "?")], a__gif=gif(12))
    config = settings(path)
    config = settings(path, media=type(config.media)(max_frames=4))
    data = index(config, tmp_path / "cache")
    assert len(data.splits["train"].items(0)[0].item.sizes) == 2


def test_a_film(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        for i in range(5):
            grey = np.full((16, 16, 3), 40 * i + 20, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        film.mux(stream.encode())
    data = index(
        settings(write(tmp_path, [chat({"type": "video", "video": "a.mp4"}, "?")])), tmp_path / "cache"
    )
    (item,), (groups,) = loaded(data)
    assert len(item.sizes) == 3
    means = [group[:, :48].mean() for group in groups]
    assert sorted(means) == means


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_archives_are_read_by_offset(tmp_path):
    pictures = {i: png(picture(seed=i)) for i in range(4)}
    asked = json.dumps(chat(image("png"), "?", {"type": "audio", "audio": "s/2.wav"})).encode()
    shard(
        tmp_path / "x-00.tar", {"0.png": pictures[0], "0.txt": b"zero", "1.txt": b"one", "1.png": pictures[1]}
    )
    shard(tmp_path / "x-01.tar", {"s/2.json": asked, "s/2.png": pictures[2], "s/2.wav": wav()})
    shard(
        tmp_path / "x-02.tar",
        {"3.json": json.dumps(chat(image("3.png"), "?")).encode(), "3.png": pictures[3]},
    )
    for source in (
        tmp_path,
        tmp_path / "x-{00..02}.tar",
        tmp_path / "x-*.tar",
        tmp_path / "x-{00,01,02}.tar",
    ):
        data = index(settings(source), tmp_path / "cache")
        split = data.splits["train"]
        assert split.documents == 4
        for number in range(4):
            items, (content, *_) = loaded(data, number)
            _, _, _, path, offset, size, text = items[0].ref[:7]
            with open(path, "rb") as stream:
                stream.seek(offset)
                assert stream.read(size) == pictures[number]
            with tarfile.open(path) as archive:
                member = next(m for m in archive if m.name.endswith(".png") and m.offset_data == offset)
                assert archive.extractfile(member).read() == pictures[number]
            assert not text
        assert len(split.items(2)) == 2
    text = data.tokenizer.decode(data.splits["train"].document(0, 0).future[0], special=True)
    assert text == "\nzero<|endoftext|>"


def test_text_of_the_templates():
    turns = parse(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
            {"role": "assistant", "content": "C"},
            {"role": "user", "content": "D"},
            {"role": "assistant", "content": "E"},
        ]
    )
    plain, chatml = (list(render(turns, template)) for template in ("plain", "chatml"))
    assert "".join(span.text for span in plain) == "S\nAB\nC\nD\nE"
    assert "".join(span.text for span in plain if span.counted) == "C\nE"
    assert "".join(span.text for span in chatml) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nAB<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
        "<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\nE<|im_end|>\n"
    )
    assert "".join(span.text for span in chatml if span.counted) == "C<|im_end|>E<|im_end|>"


@pytest.mark.parametrize("targets", ["answers", "all"])
def test_targets_that_count(tmp_path, targets):
    path = write(tmp_path, [chat("see ", image("a.png"), " well?", answer="no")], a__png=png())
    data = index(settings(path, targets=targets), tmp_path / "cache")
    batch, eos = data.splits["train"].document(0, 1), data.tokenizer.eos_id
    counted = data.tokenizer.decode(batch.future[0][batch.mask[0]], special=True)
    assert counted == ("see  well?\nno" if targets == "all" else "no") + "<|endoftext|>"
    assert batch.tokens[0] == data.tokenizer.bos_id
    assert batch.future[0][-1] == eos
    (placed,) = batch.items
    (run,) = placed.places
    assert (batch.tokens[run.start : run.stop] == VISION.token).all()
    assert (batch.tokens == VISION.token).sum() == run.length == placed.item.rows
    assert batch.tokens[run.start - 1] == VISION.start_token
    assert batch.tokens[run.stop] == VISION.end_token
    reserved = {VISION.token, VISION.start_token, VISION.end_token}
    assert not reserved & set(batch.future[batch.mask].tolist())


def test_rows_of_text_alone(tmp_path):
    data = index(settings(write(tmp_path, [{"text": "hello"}, chat("a", answer="b")])), tmp_path / "cache")
    batch = data.splits["train"].document(0, 0)
    assert data.tokenizer.decode(batch.future[0][batch.mask[0]], special=True) == "hello<|endoftext|>"
    loader = PackedLoader(data.splits["train"], 128, 0, 0)
    assert loader.microbatch(0, 1).items == ()


def test_parts_choose_among_encoders(tmp_path):
    encoders = ENCODERS | {"wide": VISION}
    path = write(tmp_path, [chat(image("a.png"), image("a.png", encoder="wide"), "?")], a__png=png())
    items, _ = loaded(index(settings(path), tmp_path / "cache", encoders))
    assert [item.encoder for item in items] == ["vision", "wide"]


def test_samples_are_held_out_by_name(tmp_path):
    path = write(tmp_path, [chat(f"question {i}", answer=str(i)) for i in range(200)])
    splits = index(settings(path, valid_fraction=0.2), tmp_path / "cache").splits
    assert splits["train"].documents + splits["valid"].documents == 200
    assert 20 < splits["valid"].documents < 60


def test_a_blend_names_files_for_each_split(tmp_path):
    path = write(tmp_path, [chat("a"), chat("b")])
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"train": ["data.jsonl", "data.jsonl"], "valid": "data.jsonl"}))
    splits = index(settings(path, blend=str(blend)), tmp_path / "cache").splits
    assert (splits["train"].documents, splits["valid"].documents) == (4, 2)
    blend.write_text(json.dumps({"train": [1.0, "data.jsonl"]}))
    with pytest.raises(DataError, match="has weights"):
        index(settings(path, blend=str(blend)), tmp_path / "cache")


def test_what_is_indexed_is_not_indexed_again(tmp_path):
    path = write(tmp_path, [chat(image("a.png"), "?")], a__png=png())
    first, again, changed = [], [], []
    index(settings(path), tmp_path / "cache", notes=first)
    index(settings(path), tmp_path / "cache", notes=again)
    write(tmp_path, [chat(image("a.png"), "?"), chat("more")])
    data = index(settings(path), tmp_path / "cache", notes=changed)
    assert [len(n) for n in (first, again, changed)] == [2, 0, 2]
    assert data.splits["train"].documents == 2


def test_which_data_is_read_as_samples(tmp_path):
    chats, texts = write(tmp_path, [chat("a")]), tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n')
    assert is_multimodal(settings(chats), {})
    assert not is_multimodal(settings(texts), {})
    assert is_multimodal(settings(texts), ENCODERS)
    assert not is_multimodal(settings("stdlib"), {})
    assert is_multimodal(settings("digits"), {})


def test_missing_files_are_found_before_any_work(tmp_path):
    (problem,) = check_multimodal(settings(tmp_path / "none.jsonl"), 300)
    assert "none.jsonl" in str(problem)
    (problem,) = check_multimodal(settings(tmp_path / "x-{0..3}.tar"), 300)
    assert "x-0.tar" in str(problem)
    assert not list(check_multimodal(settings(write(tmp_path, [chat("a")])), 300))


def test_what_is_shown_of_samples(tmp_path):
    path = write(tmp_path, [chat("see ", image("a.png"), " well?", answer="no"), chat(image("b.png"))])
    (tmp_path / "a.png").write_bytes(png())
    config = settings(path, media_errors="skip")
    shown = describe_samples(index(config, tmp_path / "cache"), config, 0)
    assert "1 samples, " in shown
    assert "1 left out (missing file)" in shown
    assert f"picture ({path}:1): 1x4x4 for vision, 4 tokens" in shown
    assert "see [4] well?\nno" in shown
