"""Native checkpoints: what is saved is what is read, on any ranks, in any boxes, in every dtype."""

import ast
import os
import random
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import check_equal, check_step, pieces, raw, same, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from weft.checkpoint import disk, shard, steps
from weft.checkpoint.load import match, open_checkpoint
from weft.checkpoint.manifest import DTYPES
from weft.checkpoint.save import AsyncSaver, save
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError, RunError
from weft.parallel.comm import SingleComm
from weft.parallel.threads import run_threads
from weft.plan.box import Box, tiles
from weft.spec.hybrid import HybridConfig

ONE = SingleComm()
FIXTURES = Path(__file__).parent / "fixtures"


def of_dtype(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix, a transposed view, a scalar, empty tensors; also with extreme bytes."""
    if dtype is torch.bool:
        matrix = torch.arange(35).reshape(5, 7) % 3 == 0
    else:
        count = 35 * dtype.itemsize
        matrix = (torch.arange(count) * 37 % 256).to(torch.uint8).view(dtype).reshape(5, 7)
    return {
        "matrix": matrix,
        "view": matrix.t(),
        "scalar": matrix[2, 3],
        "empty": matrix[:0],
        "hollow": matrix[:, :0].reshape(5, 0, 2),
    }


def everything() -> dict[str, torch.Tensor]:
    return {f"{name}/{kind}": t for name, dtype in DTYPES.items() for kind, t in of_dtype(dtype).items()}


def test_every_dtype_and_shape(tmp_path):
    """Bit for bit, NaN payloads included, and each shard is a safetensors file like any other."""
    state = everything()
    path = save(tmp_path / "run" / "checkpoints", 7, pieces(state), {"a": [1, 2.5, None], "b": (True,)}, ONE)
    assert path == tmp_path / "run" / "checkpoints" / "step_0000007"
    for place in (path, path.parent, path.parent.parent):
        checkpoint = open_checkpoint(place)
        assert (checkpoint.step, checkpoint.path) == (7, path)
    assert checkpoint.meta == {"a": [1, 2.5, None], "b": [True]}
    assert checkpoint.names() == list(state)
    check_equal(checkpoint, state)
    for name, tensor in state.items():
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.shape(name) == tensor.shape
    checkpoint.verify()
    with safe_open(path / "rank_00000_000.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)
        assert all(same(file.get_tensor(name), tensor) for name, tensor in state.items())


def test_version_1_stays_readable():
    """The kept file: written by the first version of this format and never again."""
    checkpoint = open_checkpoint(FIXTURES / "v1")
    checkpoint.verify()
    assert checkpoint.step == 12
    assert checkpoint.meta == {"config": {"model": {"pattern": "ME*-"}}, "data": {"sample": 96}, "loss": 0.1}
    expected = everything() | {"grid": torch.arange(63, dtype=torch.int32).reshape(7, 9)}
    check_equal(checkpoint, expected)
    assert same(checkpoint.read("grid", Box((2, 3), (4, 5))), expected["grid"][2:6, 3:8])


def cut(name: str, tensor: torch.Tensor, *boxes: Box) -> list[Piece]:
    whole = Box.whole(tuple(tensor.shape))
    return [Piece(name, tensor[box.within(whole)], tuple(tensor.shape), box.start) for box in boxes]


ROWS = torch.arange(77, dtype=torch.float32).reshape(11, 7)
COLUMNS = ROWS.to(torch.bfloat16).reshape(7, 11)
GRID = torch.arange(7 * 5 * 3, dtype=torch.int64).reshape(7, 5, 3)
SHARED = torch.arange(6, dtype=torch.float64)
SPLIT = {"rows": ROWS, "columns": COLUMNS, "grid": GRID, "shared": SHARED, "alone": ROWS[0]}


def of_rank(rank: int) -> list[Piece]:
    """Two ranks with uneven boxes: rows 3 + 8, columns 10 + 1, an uneven 2 x 2 grid, a replica."""
    if rank == 0:
        mine = cut("rows", ROWS, Box((0, 0), (3, 7))) + cut("columns", COLUMNS, Box((0, 0), (7, 10)))
        mine += cut("grid", GRID, Box((0, 0, 0), (2, 4, 3)), Box((2, 4, 0), (5, 1, 3)))
    else:
        mine = cut("rows", ROWS, Box((3, 0), (8, 7))) + cut("columns", COLUMNS, Box((0, 10), (7, 1)))
        mine += cut("grid", GRID, Box((2, 0, 0), (5, 4, 3)), Box((0, 4, 0), (2, 1, 3)))
        mine += [Piece.whole("alone", ROWS[0])]
    return [*mine, Piece.whole("shared", SHARED)]


@pytest.mark.parametrize("limits", [(2 << 30, 256 << 20), (150, 40)])
def test_two_ranks_and_any_box(tmp_path, monkeypatch, limits):
    """Also when every file and piece is cut as small as a huge tensor's would be."""
    monkeypatch.setattr(shard, "FILE_BYTES", limits[0])
    monkeypatch.setattr(shard, "PIECE_BYTES", limits[1])
    paths = run_threads(2, lambda comm: save(tmp_path, 1, of_rank(comm.rank), {"rank": comm.rank}, comm))
    assert paths == [tmp_path / "step_0000001"] * 2
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.verify()
    assert checkpoint.meta == {"rank": 0}
    check_equal(checkpoint, SPLIT)
    sizes = [file.stat().st_size for file in paths[0].glob("*.safetensors")]
    assert len(sizes) == 2 if limits[0] > 150 else len(sizes) > 8
    held = [(name, piece) for name, record in checkpoint._tensors.items() for piece in record.pieces]
    assert all(piece.end - piece.begin <= max(limits[1], 8) for _, piece in held)
    assert {piece.file[:10] for name, piece in held if name == "shared"} == {"rank_00000"}
    rng = random.Random(3)
    for _ in range(150):
        name = rng.choice(list(SPLIT))
        start = tuple(rng.randint(0, size) for size in SPLIT[name].shape)
        shape = tuple(
            rng.randint(0, size - first) for size, first in zip(SPLIT[name].shape, start, strict=True)
        )
        box = Box(start, shape)
        expected = SPLIT[name][box.within(Box.whole(tuple(SPLIT[name].shape)))]
        assert same(checkpoint.read(name, box), expected), (name, box)


def test_ranks_that_do_not_fit_together(tmp_path):
    def error(make) -> str:
        def work(comm) -> str:
            with pytest.raises(CheckpointError) as found:
                save(tmp_path, 1, make(comm.rank), {}, comm)
            return str(found.value)

        first, second = run_threads(2, work)
        assert first == second
        return first

    gap = lambda rank: cut("w", ROWS, Box((rank * 6, 0), (5, 7)))  # noqa: E731
    assert "'w': the boxes of all ranks do not tile (11, 7)" in error(gap)
    overlap = lambda rank: cut("w", ROWS, Box((rank * 5, 0), (6, 7)))  # noqa: E731
    assert "'w': the boxes of all ranks do not tile" in error(overlap)
    dtype = lambda rank: [Piece.whole("w", ROWS.double() if rank else ROWS)]  # noqa: E731
    assert "'w' is F32 (11, 7), but F64 (11, 7) on rank 1" in error(dtype)
    shape = lambda rank: [Piece.whole("w", ROWS[: 11 - rank])]  # noqa: E731
    assert "'w' is F32 (11, 7), but F32 (10, 7) on rank 1" in error(shape)
    twice = lambda rank: [Piece.whole("w", ROWS)] * (1 + rank)  # noqa: E731
    assert "rank 1 gives a box of a tensor twice" in error(twice)
    outside = lambda rank: [Piece("w", ROWS, (11, 7), (rank, 0))]  # noqa: E731
    assert "rank 1: tensor 'w': Box(start=(1, 0), shape=(11, 7)) does not lie in (11, 7)" in error(outside)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (
            Piece.whole("w", torch.zeros(2, dtype=torch.complex64)),
            "complex64 is not a checkpoint dtype",
        ),
        (Piece.whole("", ROWS), "'' is not a tensor name"),
        (Piece.whole("__metadata__", ROWS), "is not a tensor name"),
        (Piece.whole("w[0]", ROWS), "is not a tensor name"),
        (Piece("w", ROWS, (77,), (0,)), "does not lie in"),
    ],
)
def test_pieces_refused(tmp_path, piece, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save(tmp_path, 1, [piece], {}, ONE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"a": {3: 1}}, "meta.a: the key 3 is not text"),
        ({"a": [0, float("nan")]}, "meta.a[1]: nan is not a JSON number"),
        ({"a": torch.zeros(1)}, "meta.a: a Tensor is not JSON; tensors belong in pieces"),
    ],
)
def test_meta_refused(tmp_path, meta, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save(tmp_path, 1, [], meta, ONE)
    assert list(tmp_path.iterdir()) == []


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_background_equals_foreground_even_if_tensors_change_after_the_call(tmp_path, monkeypatch):
    gate, write = threading.Event(), shard.write
    monkeypatch.setattr(shard, "write", lambda *args: gate.wait(30) and write(*args))
    state = values(3)
    saver = AsyncSaver()
    meta = {"step": 3, "data": {"samples": [1]}}
    saver.save(tmp_path / "background", 3, pieces(state), meta, ONE)
    assert steps.latest(tmp_path / "background") is None
    assert len(steps.torn(tmp_path / "background")) == 1
    for tensor in state.values():
        tensor.zero_()
    meta["data"]["samples"].append(2)
    gate.set()
    assert saver.wait() == tmp_path / "background" / "step_0000003"
    save(tmp_path / "foreground", 3, pieces(values(3)), {"step": 3, "data": {"samples": [1]}}, ONE)
    assert contents(steps.latest(tmp_path / "background")) == contents(steps.latest(tmp_path / "foreground"))


def test_background_on_two_ranks(tmp_path):
    def work(comm) -> list[int]:
        saver = AsyncSaver()
        for step in (1, 2, 3):
            state = [piece for i, piece in enumerate(pieces(values(step))) if i % 2 == comm.rank]
            saver.save(tmp_path, step, state, {"step": step}, comm, keep=2)
        saver.wait()
        return [check_step(path) for path in steps.committed(tmp_path)]

    assert run_threads(2, work) == [[2, 3]] * 2


def test_background_failure_is_raised_at_the_next_call(tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    saver = AsyncSaver()
    saver.save(tmp_path, 1, pieces(values(1)), {"step": 1}, ONE)
    saver.wait()
    monkeypatch.setattr(disk, "write", fail)
    saver.save(tmp_path, 2, pieces(values(2)), {"step": 2}, ONE)
    with pytest.raises(RunError, match="Input/output error"):
        saver.save(tmp_path, 3, pieces(values(3)), {"step": 3}, ONE)
    assert "step_0000002 in the background failed: cannot save" in caplog.text
    monkeypatch.undo()
    assert saver.wait() == tmp_path / "step_0000001"  # raised once, and step 3 was not begun
    saver.save(tmp_path, 3, pieces(values(3)), {"step": 3}, ONE)
    assert check_step(saver.wait()) == 3


def test_a_committed_step_is_never_overwritten(tmp_path):
    path = save(tmp_path, 5, pieces(values(5)), {"step": 5}, ONE)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert save(tmp_path, 5, pieces(values(5)), {"step": 5}, ONE) == path
    for state, meta in ((values(6), {"step": 5}), (values(5), {"step": 5, "more": 1})):
        with pytest.raises(CheckpointError, match="step_0000005 exists and differs .* never overwritten"):
            save(tmp_path, 5, pieces(state), meta, ONE)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_keep(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 10_000_000, 3):
        save(root, step, pieces(values(step)), {"step": step}, ONE, keep=2)
        (root / "step_0000000").mkdir(exist_ok=True)  # not ours: it has no manifest
    # numbers and not names decide, and the step just committed stays though two are higher
    assert [steps.number(path) for path in steps.committed(root)] == [3, 10_000_000]
    save(root, 4, pieces(values(4)), {"step": 4}, ONE, keep=1)
    assert [check_step(path) for path in steps.committed(root)] == [4, 10_000_000]
    assert (root / "step_0000000").is_dir()
    assert steps.latest(root) == root / "step_10000000"
    steps.check_free(root, 10_000_000)
    with pytest.raises(CheckpointError, match="already holds step 10000000, but .* starts after step 4"):
        steps.check_free(root, 4)
    steps.check_free(tmp_path / "new", 0)


def test_torn_directories_are_reported_and_removed(tmp_path, caplog):
    for name in ("step_0000009.saving", "step_0000001.removing", "mine.saving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000_000.safetensors").write_bytes(b"torn")
    assert [path.name for path in steps.torn(tmp_path)] == ["step_0000001.removing", "step_0000009.saving"]
    assert steps.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"only saves that did not finish: .*step_0000009\.saving"):
        open_checkpoint(tmp_path)
    save(tmp_path, 2, pieces(values(2)), {"step": 2}, ONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.saving", "step_0000002"]
    assert "removing" in caplog.text
    assert "step_0000009.saving, left by a save that did not finish" in caplog.text


def test_nothing_to_open(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such directory \(looked for manifest.json and step_N"):
        open_checkpoint(tmp_path / "typo")
    with pytest.raises(CheckpointError, match="no committed checkpoint there"):
        open_checkpoint(tmp_path)


def test_no_such_tensor_or_box(tmp_path):
    save(tmp_path, 1, [Piece.whole("w", ROWS)], {}, ONE)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no tensor 'v'"):
        checkpoint.read("v")
    for box in (Box((0, 0), (12, 7)), Box((-1, 0), (2, 7)), Box((0,), (7,))):
        with pytest.raises(CheckpointError, match=r"tensor 'w' of shape \(11, 7\) has no Box"):
            checkpoint.read("w", box)


def test_checkpoint_of_another_model_lists_every_difference(tmp_path):
    config = HybridConfig(pattern="M-", hidden_size=16, vocab_size=32, mamba_num_heads=8)
    specs = config.params()
    state = {f"model/{spec.name}": torch.zeros(spec.shape) for spec in specs}
    save(tmp_path, 1, pieces(state | {"optimizer/x": ROWS}), {}, ONE)
    checkpoint = open_checkpoint(tmp_path)
    match(checkpoint, specs, "model/")
    other = replace(config, vocab_size=48, pattern="M*")
    with pytest.raises(
        CheckpointError, match="is a checkpoint of another model; 6 tensors that do not"
    ) as found:
        match(checkpoint, other.params(), "model/")
    lines = str(found.value).splitlines()
    for line in (
        "  model/layers.1.mixer.qkv_proj.weight: missing, the model has it with shape ",
        "  model/layers.1.mixer.o_proj.weight: missing, the model has it with shape ",
        "  model/layers.1.mixer.up_proj.weight: surplus, the model has no such tensor",
        "  model/layers.1.mixer.down_proj.weight: surplus, the model has no such tensor",
        "  model/embed.weight: has shape (32, 16), the model has (48, 16)",
        "  model/head.weight: has shape (32, 16), the model has (48, 16)",
    ):
        assert any(found.startswith(line) for found in lines), line


def test_nothing_is_ever_unpickled():
    banned = {"pickle", "marshal", "shelve", "load", "eval", "exec"}
    for source in Path(shard.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(source.read_text())))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imports for alias in node.names}
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        names |= {call.id for call in calls if isinstance(call, ast.Name)}
        names |= {call.attr for call in calls if isinstance(call, ast.Attribute)}
        assert not banned & names, source


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_boxes_against_masks(data):
    """``tiles`` and ``overlap`` against painting each element."""
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    start = st.tuples(*(st.integers(0, size) for size in shape))
    boxes = []
    for _ in range(data.draw(st.integers(0, 4))):
        first = data.draw(start)
        size = tuple(data.draw(st.integers(0, end - low)) for low, end in zip(first, shape, strict=True))
        boxes.append(Box(first, size))
    whole, paint = Box.whole(shape), torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        assert box.inside(shape)
        paint[box.within(whole)] += 1
    assert tiles(shape, boxes) == bool((paint == 1).all())
    for one in boxes:
        for two in boxes:
            mask = torch.zeros(shape, dtype=torch.int64)
            mask[one.within(whole)] += 1
            mask[two.within(whole)] += 1
            both = one.overlap(two)
            assert (both.numel if both else 0) == int((mask == 2).sum())
            if both:
                assert bool((mask[both.within(whole)] == 2).all())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_cut_up_tensors_tile(shape, rng):
    """Recursive guillotine cuts tile; without one of them they do not."""
    boxes = [Box.whole(tuple(shape))]
    for _ in range(4):
        box = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        at = rng.randint(0, box.shape[axis])
        low = (*box.shape[:axis], at, *box.shape[axis + 1 :])
        high = (*box.shape[:axis], box.shape[axis] - at, *box.shape[axis + 1 :])
        moved = (*box.start[:axis], box.start[axis] + at, *box.start[axis + 1 :])
        boxes += [Box(box.start, low), Box(moved, high)]
    rng.shuffle(boxes)
    assert tiles(tuple(shape), boxes)
    full = [box for box in boxes if box.numel]
    assert not tiles(tuple(shape), full[1:])
    assert not tiles(tuple(shape), [*full, full[0]])


def test_sizes_for_people():
    shown = {
        0: "0 bytes",
        999: "999 bytes",
        1000: "1 kB",
        999_600: "1 MB",
        1_600_000: "1.6 MB",
        5 * 10**12: "5 TB",
    }
    assert {count: disk.size(count) for count in shown} == shown


def test_a_link_to_a_step_opens(tmp_path):
    path = save(tmp_path, 1, pieces(values(1)), {"step": 1}, ONE)
    os.symlink(path, tmp_path / "best")
    check_step(tmp_path / "best")
    assert raw(open_checkpoint(tmp_path / "best").read("rng")) == raw(values(1)["rng"])
