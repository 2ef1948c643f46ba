"""Matching: against DIFT's straight lines, known truths, files of pairs; as a task."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from drl_data import matching
from drl_data.bilinear import at_points
from drl_data.cli import app
from drl_data.correspond_spec import CorrespondSpec, FusedTap, WarpCheckSpec
from drl_data.decode import decode_views
from drl_data.errors import InputError, SpecError, TapError
from drl_data.fitting import PixelMap, pixel_map
from drl_data.matching import Side, match
from drl_data.objects import open_folder
from drl_data.pairs import Pair, read_pairs
from drl_data.pck import Distances, PckScore
from drl_data.pipeline import Pipeline
from drl_data.report import write_report
from drl_data.runs import extract
from drl_data.segment_spec import SegmentSpec
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore
from drl_data.tasks.correspond import CorrespondResult, run_correspond
from drl_data.tasks.correspond import _public as public_pairs
from drl_data.tasks.segment import _public as public_labels
from drl_data.warps import EXACT, Warp, computed_warps, view_warp
from tests.digit_scenes import scenes_pipeline, write_scenes
from tests.photo_pairs import (
    CROPS,
    crops_store,
    pair_records,
    photograph,
    write_crops,
    write_jsonl,
)
from tests.task_stores import pipeline_of

SIDES = st.integers(1, 7)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the matcher --------------------------------------------------------------------------------


def side_of(map_chw: Tensor, size: tuple[int, int], *more: Tensor) -> Side:
    """An image of `size`, all of whose pixels are candidates."""
    maps = [map_chw, *more]
    places = [PixelMap((m.shape[1] / size[0], m.shape[2] / size[1]), (0.0, 0.0)) for m in maps]
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
    return Side(size, maps, places, ys, xs)


def dift(src_ft: Tensor, trg_ft: Tensor, points: list[list[int]], sizes: list[tuple[int, int]]):  # type: ignore[no-untyped-def]
    """eval_spair.py of Tang et al.: (y, x) of each match, and the map of cosines."""
    src_ft = nn.Upsample(size=sizes[0], mode="bilinear")(src_ft[None])
    trg_ft = nn.Upsample(size=sizes[1], mode="bilinear")(trg_ft[None])
    h, w = trg_ft.shape[-2:]
    found, maps = [], []
    for src_point in points:
        num_channel = src_ft.size(1)
        src_vec = src_ft[0, :, src_point[1], src_point[0]].view(1, num_channel)
        trg_vec = trg_ft.view(num_channel, -1).transpose(0, 1)
        src_vec = F.normalize(src_vec).transpose(0, 1)
        trg_vec = F.normalize(trg_vec)
        cos_map = torch.mm(trg_vec, src_vec).view(h, w).numpy()
        found.append(np.unravel_index(cos_map.argmax(), cos_map.shape))
        maps.append(cos_map)
    return found, maps


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_matches_are_those_of_dift(
    one: tuple[int, int], two: tuple[int, int], height: int, width: int
) -> None:
    sizes = [(width, height), (height, width)]
    source, target = randn(8, *one), randn(8, *two, seed=1)
    points = [[x, y] for y in range(0, width, 3) for x in range(0, height, 3)]
    want, cosines = dift(source, target, points, sizes)
    found = match(
        side_of(source, sizes[0]),
        side_of(target, sizes[1]),
        torch.tensor([[y + 0.5, x + 0.5] for x, y in points], dtype=torch.float64),
        [(0, 1.0)],
    )
    for i, (y, x) in enumerate(found.points.tolist()):
        at = int(y), int(x)
        assert (y, x) == (at[0] + 0.5, at[1] + 0.5)
        assert float(found.cosine[i]) == pytest.approx(cosines[i][at], abs=1e-5)
        # Another pixel than DIFT's only where the two are equal but for rounding.
        assert at == want[i] or cosines[i].max() - cosines[i][at] < 1e-6


def test_the_first_of_equal_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In reading order, also when rows are searched in blocks."""
    target = torch.ones(3, 1, 1)
    points = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    for block in (1 << 20, 1):
        monkeypatch.setattr(matching, "BLOCK_BYTES", block)
        found = match(side_of(target, (4, 4)), side_of(target, (9, 7)), points, [(0, 1.0)])
        assert found.points.tolist() == [[0.5, 0.5]]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = side_of(randn(4, 5, 5), (20, 20)), side_of(randn(4, 6, 3, seed=3), (23, 17))
    points = torch.rand(30, 2, dtype=torch.float64) * 20
    whole = match(source, target, points, [(0, 1.0)])
    monkeypatch.setattr(matching, "BLOCK_BYTES", 1)
    cut = match(source, target, points, [(0, 1.0)])
    assert torch.equal(whole.points, cut.points)


def test_fused_cells_are_concatenated_unit_vectors() -> None:
    size = (12, 15)
    maps = [(randn(4, 3, 5, seed=i), randn(6, 6, 4, seed=i + 5) * 9) for i in range(2)]
    weights = (0.5, 2.0)
    up = [
        torch.cat(
            [
                w * F.normalize(F.interpolate(m[None], size=size, mode="bilinear")[0], dim=0)
                for w, m in zip(weights, both, strict=True)
            ]
        )
        for both in maps
    ]
    points = [(y, x) for y in range(0, 12, 4) for x in range(0, 15, 4)]
    sides = [side_of(both[0], size, both[1]) for both in maps]
    at = torch.tensor(points, dtype=torch.float64) + 0.5
    found = match(sides[0], sides[1], at, [(0, weights[0]), (1, weights[1])])
    for i, (y, x) in enumerate(points):
        cosine = F.cosine_similarity(up[0][:, y, x, None, None], up[1], dim=0)
        assert float(found.cosine[i]) == pytest.approx(float(cosine.max()), abs=1e-5)
        there = [int(v) for v in found.points[i]]
        assert float(cosine[there[0], there[1]]) == pytest.approx(float(cosine.max()), abs=1e-5)


def test_pck_by_image_and_by_point() -> None:
    pairs = [
        Distances(np.array([0.05, 0.2]), np.array([0.0, 0.3])),
        Distances(np.array([0.1, 0.1, 0.3, 0.0]), np.array([0.2, 0.0, 0.0, 0.0])),
    ]
    score = PckScore.of(pairs, (0.1, 0.25))
    assert (score.n_pairs, score.n_points) == (2, 6)
    assert score.by_image == pytest.approx((np.mean([0.5, 0.75]), np.mean([1, 0.75])))
    assert score.by_point == pytest.approx((4 / 6, 5 / 6))
    assert score.cycle == pytest.approx((4 / 6, 5 / 6))
    assert score.interval[0][0] <= score.by_image[0] <= score.interval[0][1]


# --- warps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_maps_move_as_their_points_do(name: str) -> None:
    size, x = (24, 40), randn(3, 6, 5)
    warp, move = EXACT[name][0](size), EXACT[name][1]
    moved = move(x)
    points = torch.rand(50, 2, dtype=torch.float64) * torch.tensor(size)
    there = warp(points)

    def at(map_chw: Tensor, where: Tensor, of: tuple[int, int]) -> Tensor:
        scale = torch.tensor([map_chw.shape[1] / of[0], map_chw.shape[2] / of[1]])
        y, column = (where * scale).unbind(1)
        return at_points(map_chw, y, column)

    torch.testing.assert_close(at(moved, there, warp.size), at(x, points, size), atol=1e-5, rtol=0)


def smooth(size: int) -> Image.Image:
    """A photograph without detail, so that resampling changes little."""
    part = Image.fromarray(photograph()[100:292, 200:392])
    return part.resize((12, 12)).resize((size, size), Image.Resampling.BICUBIC)


def assert_moves(before: np.ndarray, after: np.ndarray, warp: Warp, tolerance: float) -> None:
    """Values [c, h, w] at points are those at the warped points."""
    size = before.shape[1:]
    y, x = (torch.rand(400, dtype=torch.float64) * (side - 4) + 2 for side in size)
    there = warp(torch.stack([y, x], 1))
    sides = torch.tensor(after.shape[1:])
    inside = ((there > 2) & (there < sides - 2)).all(1)
    assert int(inside.sum()) > 40
    one = at_points(torch.from_numpy(before.astype(np.float32)), y[inside], x[inside])
    two = at_points(torch.from_numpy(after.astype(np.float32)), *there[inside].T)
    assert float((one - two).abs().mean()) < tolerance


@pytest.mark.parametrize("name", ["shift", "rotate", "rotate90", "zoom"])
def test_images_move_as_their_points_do(name: str) -> None:
    image = smooth(64)
    (warp,) = computed_warps(WarpCheckSpec(computed=(name,)), (64, 64)).values()
    before, after = (np.asarray(x).transpose(2, 0, 1) for x in (image, warp.image(image)))
    assert_moves(before, after, warp, 1.0)
    assert np.abs(before.astype(int) - after).mean() > 5  # it does move


@pytest.mark.parametrize("resize", ["shortest", "stretch", "pad"])
def test_views_are_where_their_warp_says(resize: str) -> None:
    spec = ImageSpec.model_validate(
        {
            "size": [60, 72],
            "resize": resize,
            "fill": "edge" if resize == "pad" else [0, 0, 0],
            "views": ["id", "hflip", {"n": 3, "seed": 4}, {"crop": "padded", "n": 3, "padding": 9}],
        }
    )
    image = smooth(90).crop((0, 0, 90, 70))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    views = decode_views(buffer.getvalue(), spec, "key")
    place = pixel_map((70, 90), spec)
    matrix = [[place.scale[0], 0, place.offset[0]], [0, place.scale[1], place.offset[1]]]
    for name, pixels in zip(spec.view_names, views, strict=True):
        warp = view_warp(spec, name, "key", (70, 90), Warp(np.array(matrix), spec.size))
        assert_moves(views[0], pixels, warp, 2.5)


# --- files of pairs -----------------------------------------------------------------------------


def assert_same_pairs(one: list[Pair], two: list[Pair]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.source_points, b.source_points)
        np.testing.assert_array_equal(a.target_points, b.target_points)
        assert (a.category, a.box, a.source[-1:]) == (b.category, b.box, b.source[-1:])


def test_lines_and_tables_are_the_same(tmp_path: Path) -> None:
    records = pair_records()
    records[2]["source_points"] = [None, [1.5, None], *records[2]["source_points"][2:]]  # type: ignore[index]
    one = read_pairs(str(write_jsonl(tmp_path / "p.jsonl", records)))
    plain = [
        {**r, "source_points": [p or [None, None] for p in r["source_points"]]} for r in records
    ]  # type: ignore[attr-defined]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "p.parquet")
    two = read_pairs(str(tmp_path / "p.parquet"))
    assert_same_pairs(one, two)
    assert np.isnan(one[2].source_points[:2]).all()
    assert one[0].name == "crops/0 - crops/1"


def spair_of(records: list[dict[str, object]], folder: Path) -> Path:
    """The same pairs as SPair-71k's annotations."""
    folder.mkdir()
    for i, r in enumerate(records):
        data = {
            "src_imname": str(r["source"]).rpartition("/")[2] + ".jpg",
            "trg_imname": str(r["target"]).rpartition("/")[2] + ".jpg",
            "src_imsize": [1, 1, 3],
            "src_kps": r["source_points"],
            "trg_kps": r["target_points"],
            "category": r["category"],
            "trg_bndbox": r["box"],
            "src_bndbox": r["box"],
        }
        (folder / f"{i:06d}-a-b:cat.json").write_text(json.dumps(data))
    return folder


def test_spair_71k(tmp_path: Path) -> None:
    records = pair_records()
    two = read_pairs(str(spair_of(records, tmp_path / "test")))
    assert [p.name for p in two][:2] == ["000000-a-b:cat", "000001-a-b:cat"]
    assert two[0].source == ("near/0", "0")
    assert two[0].in_folders
    np.testing.assert_array_equal(two[3].target_points, records[3]["target_points"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"source": None}, r"pair 0: lacks source; it has"),
        ({"source": 7}, "want two keys"),
        ({"source_points": [[1, 2]]}, "1 source points and 7 target points"),
        ({"source_points": [], "target_points": []}, "0 source points"),
        ({"source_points": [[1, 2, 3]] * 7}, r"source_points: \[1, 2, 3\]; want \[x, y\]"),
        ({"source_points": [["1", 2]] * 7}, "want .x, y., two numbers"),
        ({"source_points": 5}, r"source_points: 5; want \[x, y\]"),
        ({"box": [1, 2, 3]}, r"want \[left, top, right, bottom\]"),
        ({"box": [5, 5, 5, 9]}, "of some size"),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, change: dict[str, object], match: str) -> None:
    record = {**pair_records()[0], **change}
    with pytest.raises(InputError, match=match):
        read_pairs(str(write_jsonl(tmp_path / "p.jsonl", [record])))


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, data, said in (
        ("a.jsonl", "{}\nno", r"a\.jsonl, pair 0: lacks source"),
        ("b.jsonl", "no", r"b\.jsonl, line 1: not JSON"),
        ("c.jsonl", "[1]", "line 1: list; want an object"),
        ("d.jsonl", "\n", "no pairs in it"),
        ("e.parquet", "no", r"e\.parquet: no pairs to read"),
    ):
        (tmp_path / name).write_text(data)
        with pytest.raises(InputError, match=said):
            read_pairs(str(tmp_path / name))
    with pytest.raises(InputError, match="no pairs to read"):
        read_pairs(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="none: no pairs"):
        read_pairs(str(tmp_path / "none"))


# --- the task -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, Path]:
    folder = tmp_path_factory.mktemp("crops")
    store = crops_store(folder, write_crops(folder), resize="stretch")
    write_jsonl(folder / "pairs.jsonl", pair_records())
    return store, folder


Crops = tuple[FeatureStore, Path]


def spec_of(folder: Path, **more: object) -> CorrespondSpec:
    return CorrespondSpec.model_validate(
        {"pairs": str(folder / "pairs.jsonl"), "alphas": [0.02, 0.05, 0.1], **more}
    )


@pytest.fixture(scope="module")
def run(crops: Crops, tmp_path_factory: pytest.TempPathFactory) -> tuple[CorrespondResult, Path]:
    store, folder = crops
    results = tmp_path_factory.mktemp("matched")
    parts = [{"tap": "fine", "timestep": 1}, {"tap": "coarse", "timestep": 1, "weight": 0.7}]
    spec = spec_of(folder, fuse={"both": parts})
    return run_correspond(pipeline_of(store, results, correspond=spec), device="cpu"), results


Run = tuple[CorrespondResult, Path]


def test_pck_is_that_of_dift(crops: Crops, run: Run) -> None:
    """Their evaluation, line by line, on the same maps; images are stretched, as theirs."""
    store, _ = crops
    for column, (tap, t) in zip(
        run[0].columns, [("fine", 0), ("coarse", 0), ("fine", 1), ("coarse", 1)], strict=False
    ):
        by_image, correct, total = [], 0, 0
        maps = torch.from_numpy(store.read_rows(tap, t, range(4)).copy())
        for record in pair_records():
            i, j = (int(str(record[name])[-1]) for name in ("source", "target"))
            sizes = [CROPS[i][2:], CROPS[j][2:]]
            found, _ = dift(maps[i], maps[j], record["source_points"], sizes)  # type: ignore[arg-type]
            left, top, right, bottom = record["box"]  # type: ignore[misc]
            threshold = max(bottom - top, right - left)
            right_ones = 0
            for max_yx, trg_point in zip(found, record["target_points"], strict=True):  # type: ignore[call-overload]
                dist = math.hypot(max_yx[1] - trg_point[0], max_yx[0] - trg_point[1])
                right_ones += dist / threshold <= 0.1
            by_image.append(right_ones / len(found))
            correct, total = correct + right_ones, total + len(found)
        assert column.score.by_image[2] == pytest.approx(np.mean(by_image))
        assert column.score.by_point[2] == pytest.approx(correct / total)
        assert column.score.n_points == total


def test_points_are_found_and_shuffled_features_find_none(run: Run) -> None:
    result, folder = run
    assert CorrespondResult.load(folder / "correspond.json") == result
    fine, coarse, shuffled_fine, shuffled_coarse, both = result.columns
    assert [c.name for c in result.columns[:3]] == ["fine at 1", "coarse at 1", "fine at 2"]
    assert (both.name, both.tap) == ("both", None)
    assert (result.relative_to, result.n_pairs, result.n_points) == ("box", 12, 84)
    assert fine.score.by_point[2] > 0.7  # the temple has many corners that look alike
    assert both.score.by_point[2] > max(fine.score.by_point[2], coarse.score.by_point[2]) - 0.05
    assert max(c.score.by_point[2] for c in (shuffled_fine, shuffled_coarse)) < 0.2
    assert result.best in (0, 1, 4)
    assert set(fine.categories) == {"far", "near"}
    assert sum(s.n_points for s in fine.categories.values()) == 84
    # Shuffled patches are found where they are now, so that many return: a cycle is no truth.
    assert fine.score.cycle[2] > shuffled_fine.score.cycle[2] + 0.15


def test_the_table_says_the_same(run: Run) -> None:
    result, folder = run
    table = pq.read_table(folder / "correspond.parquet").to_pylist()
    assert len(table) == 84 * 5
    for column in result.columns:
        lines = [line for line in table if line["cell"] == column.name]
        for line in lines:
            distance = math.hypot(
                line["found_x"] - line["truth_x"], line["found_y"] - line["truth_y"]
            )
            assert line["distance"] == pytest.approx(distance)
            assert line["threshold"] == 100
            assert line["found_x"] == int(line["found_x"])  # a pixel's middle
        right = [line["distance"] <= 10 for line in lines]
        assert column.score.by_point[2] == pytest.approx(np.mean(right))
        sides = [max(CROPS[line["source_row"]][2:]) for line in lines]
        back = [line["cycle_distance"] <= 0.1 * s for line, s in zip(lines, sides, strict=True)]
        assert column.score.cycle[2] == pytest.approx(np.mean(back))


@pytest.mark.parametrize("search", ["image", "input", "map"])
def test_keypoints_go_through_a_crop(tmp_path: Path, search: str) -> None:
    """`shortest` cuts off the sides: points there are left out by name, the others are found."""
    store = crops_store(tmp_path, write_crops(tmp_path), resize="shortest")
    records = pair_records(boxes=False)
    records[0]["source_points"] = [[0, 100], None, [-3, 5], *records[0]["source_points"][3:]]  # type: ignore[index]
    write_jsonl(tmp_path / "pairs.jsonl", records)
    spec = spec_of(tmp_path, taps=["fine"], timesteps=[1], search=search)
    pipeline = pipeline_of(store, tmp_path / "r", correspond=spec)
    result = run_correspond(pipeline, device="cpu")
    assert result.left_out["cropped from the source"] >= 1
    assert result.left_out["not visible"] == 1
    assert result.left_out["outside the source image"] == 1
    assert result.named[:3] == (
        "crops/0 - crops/1, point 0: cropped from the source",
        "crops/0 - crops/1, point 1: not visible",
        "crops/0 - crops/1, point 2: outside the source image",
    )
    assert result.relative_to == "image"
    (column,) = result.columns
    assert column.score.n_points == 84 - sum(result.left_out.values())
    # Middles of cells lie up to half a cell away from points, and patches change fast.
    assert column.score.by_point[2] > (0.4 if search == "map" else 0.7)
    table = pq.read_table(tmp_path / "r" / "correspond.parquet").to_pylist()
    assert sum(line["status"] != "ok" for line in table) == sum(result.left_out.values())
    for line in table:
        if line["status"] == "ok":
            height, width = CROPS[line["target_row"]][2:]
            side = min(height, width)
            corner = (width - side) / 2 - 1, (height - side) / 2 - 1
            assert corner[0] <= line["found_x"] <= width - corner[0]
            assert corner[1] <= line["found_y"] <= height - corner[1]


def test_a_mirrored_view_changes_nothing(tmp_path: Path) -> None:
    """Points are mapped into the mirrored maps, so what is found is the same."""
    dataset = write_crops(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", pair_records())
    found = []
    for name, spec in (("a", ImageSpec(size=96)), ("b", ImageSpec(size=96, views=("hflip",)))):
        store = crops_store(tmp_path, dataset, str(tmp_path / f"{name}.zarr"))
        read = {t: store.read_rows("fine", t, range(4)) for t in (0, 1)}
        moved = np.stack([read[0], read[1]])
        if spec.views:
            from tests.stores import RUN, make_spec, make_times

            array = store.array("fine").model_copy(update={"views": 1})
            store = FeatureStore.create(
                str(tmp_path / "flipped.zarr"),
                make_spec(4, 4, images=spec, dataset=store.spec.dataset, dtype="float32"),
                [array],
                make_times(1, 2),
                store.index,
            )
            store.write(store.units[0], {"fine": np.ascontiguousarray(moved[..., ::-1])}, [], RUN)
        told = spec_of(tmp_path, taps=["fine"], cycle=False)
        pipeline = pipeline_of(store, tmp_path / name, correspond=told)
        found.append(run_correspond(pipeline, device="cpu").columns)
    assert [c.score for c in found[0]] == [c.score for c in found[1]]


def test_spair_annotations_as_a_task(crops: Crops, run: Run, tmp_path: Path) -> None:
    """Keys are found by the ends of their names."""
    store, _ = crops
    spair = spair_of(pair_records(), tmp_path / "test")
    spec = CorrespondSpec(pairs=str(spair), alphas=(0.02, 0.05, 0.1), taps=("fine",))
    result = run_correspond(pipeline_of(store, tmp_path / "r", correspond=spec), device="cpu")
    assert result.columns[0].score == run[0].columns[0].score


def test_two_stores_are_fused_by_key(crops: Crops, tmp_path: Path) -> None:
    """The other store has the same maps under another name: a fusion of a cell with itself."""
    store, folder = crops
    other = tmp_path / "other.yaml"
    other.write_text(pipeline_of(store, tmp_path / "o").model_dump_json())
    spec = spec_of(folder, taps=["fine"], timesteps=[1], stores={"other": str(other)},
                   fuse={"twice": [{"tap": "fine", "timestep": 1},
                                   {"tap": "other/fine", "timestep": 1, "weight": 3}]})  # fmt: skip
    result = run_correspond(pipeline_of(store, tmp_path / "r", correspond=spec), device="cpu")
    assert result.columns[0].score.by_point == result.columns[1].score.by_point


@pytest.mark.s3
def test_on_object_storage(crops: Crops, run: Run, s3_url: str, tmp_path: Path) -> None:
    _, folder = crops
    remote = open_folder(s3_url)
    for name in ("crops.tar", "pairs.jsonl"):
        remote.put(name, [memoryview((folder / name).read_bytes())])
    dataset = write_crops(tmp_path).model_copy(update={"tars": {"all": (f"{s3_url}/crops.tar",)}})
    store = crops_store(tmp_path, dataset, f"{s3_url}/crops.zarr", resize="stretch")
    spec = spec_of(folder, pairs=f"{s3_url}/pairs.jsonl", taps=["fine"], timesteps=[1])
    pipeline = pipeline_of(store, tmp_path / "r", correspond=spec)
    result = run_correspond(pipeline.model_copy(update={"dataset": dataset}), device="cpu")
    assert result.columns[0].score == run[0].columns[0].score


def test_what_cannot_be_asked(crops: Crops, tmp_path: Path) -> None:
    store, folder = crops

    def refused(error: type[Exception], match: str, **more: object) -> None:
        pipeline = pipeline_of(store, tmp_path, correspond=spec_of(folder, **more))
        with pytest.raises(error, match=match):
            run_correspond(pipeline, device="cpu")

    refused(TapError, "no array 'none'", taps=["none"])
    refused(TapError, "no timestep 3", timesteps=[3])
    refused(SpecError, "'fine' has the timesteps 1, 2; name one",
            fuse={"x": [{"tap": "fine"}, {"tap": "coarse"}]})  # fmt: skip
    stranger = {**pair_records()[0], "source": "0"}
    path = str(write_jsonl(tmp_path / "s.jsonl", [stranger]))
    refused(InputError, r"no sample of .* is called '0'; keys are as 'crops/0'", pairs=path)
    outside = {**pair_records()[0], "source_points": [[999, 999]] * 7}
    path = str(write_jsonl(tmp_path / "o.jsonl", [outside]))
    refused(SpecError, r"none of the points .*'outside the source image': 7", pairs=path)
    path = str(write_jsonl(tmp_path / "b.jsonl", pair_records(boxes=False)))
    refused(SpecError, "not every pair has one", pairs=path, relative_to="box")
    with pytest.raises(SpecError, match="lacks correspond"):
        run_correspond(pipeline_of(store, tmp_path))
    with pytest.raises(ValueError, match="want two or more"):
        CorrespondSpec(fuse={"one": (FusedTap(tap="fine"),)})
    with pytest.raises(ValueError, match="want each number once"):
        CorrespondSpec(alphas=(0.1, 0.1))


# --- warps as a task ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Views of pictures of digits, through the backbone that comes with the package."""
    folder = tmp_path_factory.mktemp("scenes")
    views = ["id", "hflip", {"n": 1, "area": [0.5, 0.9], "flip": False},
             {"crop": "padded", "padding": 3, "flip": False}]  # fmt: skip
    pipeline = scenes_pipeline(
        folder,
        write_scenes(folder / "data", 4, 4),
        images={"size": 32, "mode": "L", "views": views},
        schedule={"timesteps": [10]},
        taps=["up_blocks.0", "up_blocks.1"],
    )
    extract(pipeline)
    return pipeline


@pytest.fixture(scope="module")
def checked(scenes: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> CorrespondResult:
    check = WarpCheckSpec(images=4, points=6, computed=("shift", "rotate"), degrees=10)
    spec = CorrespondSpec(check=check, alphas=(0.02, 0.1))
    changed = {"correspond": spec, "results": str(tmp_path_factory.mktemp("checked"))}
    return run_correspond(scenes.model_copy(update=changed), device="cpu")


def test_all_is_found_where_nothing_is_computed_anew(checked: CorrespondResult) -> None:
    exact = [c for c in checked.checks if c.warp in EXACT]
    assert len(exact) == 3 * 2
    for check in exact:
        assert set(check.score.by_point) == {1.0}
        assert set(check.score.by_image) == {1.0}
        assert set(check.score.cycle) == {1.0}
        assert check.median_px < 1e-6
        assert check.score.n_points == 4 * 36
    assert (checked.columns, checked.table, checked.best) == ((), None, None)


def test_warped_images_are_found_less(checked: CorrespondResult) -> None:
    """What the backbone makes of warped images: a shift costs little, a turn more."""
    found = {(c.warp, c.cell): c.score for c in checked.checks}
    warps = list(dict.fromkeys(c.warp for c in checked.checks))
    assert warps[3:] == [
        "view hflip",
        "view crop-0-0",
        "view padded-0-0",
        "computed shift",
        "computed rotate",
    ]
    cell = "up_blocks.0 at 10"
    share = {warp: found[warp, cell].by_point[1] for warp in warps}
    assert share["identity"] == 1 > share["computed shift"] > share["computed rotate"]
    assert share["computed shift"] > 0.6
    assert share["view padded-0-0"] > share["view hflip"]
    # Points that leave the picture count nowhere.
    assert found["computed shift", cell].n_points < found["identity", cell].n_points


def test_a_larger_turn_is_found_less(scenes: Pipeline, tmp_path: Path) -> None:
    shares = []
    for degrees in (0, 12, 60):
        check = WarpCheckSpec(images=4, points=6, computed=("rotate",), degrees=degrees)
        spec = CorrespondSpec(check=check, taps=("up_blocks.0",), alphas=(0.1,), cycle=False)
        changed = {"correspond": spec, "results": str(tmp_path)}
        result = run_correspond(scenes.model_copy(update=changed), device="cpu")
        last = result.checks[-1]
        assert last.warp == "computed rotate"
        assert last.score.cycle == ()
        shares.append(last.score.by_point[0])
    assert shares[0] > shares[1] > shares[2]
    assert shares[0] > 0.85  # other noise, as the name of the image is another


def test_command_and_report(crops: Crops, tmp_path: Path) -> None:
    store, folder = crops
    spec = spec_of(folder, check={"images": 2, "points": 3})
    pipeline = pipeline_of(store, tmp_path / "results", correspond=spec)
    file = tmp_path / "p.yaml"
    file.write_text(pipeline.model_dump_json())
    done = CliRunner().invoke(app, ["correspond", str(file), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "PCK of 84 points of 12 pairs, relative to the box" in done.output
    assert "turned map" in done.output
    page = write_report(pipeline).read_text()
    shown = page.split('id="correspond"')[1].split("</section>")[0]
    assert shown.count("<image ") == 2 * 4
    assert shown.count("<line ") == 7 * 4
    for text in ("mirrored map", "near", "alpha 0.05", "fine at 1"):
        assert text in shown


def test_secrets_are_not_written() -> None:
    secret = "https://me:secret@host/p.jsonl?X-Amz-Signature=abc"
    written = public_pairs(CorrespondSpec(pairs=secret)).model_dump_json()
    written += public_labels(SegmentSpec(label_folder=secret)).model_dump_json()
    assert "secret" not in written
    assert "abc" not in written
    assert written.count("https://***@host/p.jsonl") == 2


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    spec = CorrespondSpec(pairs="p.jsonl", stores={"b": "other.yaml"})
    data = {"name": "x", "dataset": {"tars": "a.tar"}, "images": {"size": 8}}
    (tmp_path / "x.yaml").write_text(json.dumps({**data, "correspond": spec.model_dump(mode="json"),
                                                 "segment": {"label_folder": "l"}}))  # fmt: skip
    loaded = Pipeline.load(tmp_path / "x.yaml")
    assert loaded.correspond is not None
    assert loaded.correspond.pairs == str(tmp_path / "p.jsonl")
    assert loaded.correspond.stores == {"b": str(tmp_path / "other.yaml")}
    assert loaded.segment is not None
    assert loaded.segment.label_folder == str(tmp_path / "l")
