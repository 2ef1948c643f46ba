"""The report: what is in it, what is left out, that it stands alone; pictures and charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from drl_data.charts import Series, heat_colour, line_chart
from drl_data.distill_spec import DistillSpec, StudentSpec
from drl_data.errors import InputError, UserError
from drl_data.index import SampleIndex
from drl_data.job_specs import AttentiveSpec, ClusterSpec, KnnSpec, ProbeSpec, RetrieveSpec
from drl_data.pictures import pca_colours, png_uri, shrunk
from drl_data.pipeline import Pipeline
from drl_data.plan import InvalidRow
from drl_data.report import human_bytes, write_report
from drl_data.shards import Array
from drl_data.store import FeatureStore
from drl_data.tasks.cluster import run_cluster
from drl_data.tasks.distill import run_distill
from drl_data.tasks.probe import ProbeResult, run_probe
from drl_data.tasks.retrieve import run_retrieve
from tests.stores import RUN, make_array, make_spec, make_times
from tests.task_stores import digits_index, noise, pipeline_of, store_of

VOID = {"meta", "img", "line", "circle", "polyline"}
MAX_BYTES = 3_000_000
FUSION = AttentiveSpec(width=8, heads=2, epochs=1)
PROBE = ProbeSpec(epochs=2, seeds=(0, 1), knn=KnnSpec(k=(7,)), attentive=FUSION)
DISTILL = DistillSpec(
    tap="map",
    timestep=10,
    student=StudentSpec(config={"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}),
    epochs=2,
    finetune_epochs=1,
    labels_per_class=(1, 2),
    seeds=(0, 1),
)


@dataclass
class Page(HTMLParser):
    """A page taken apart; refuses tags that do not close, as browsers would guess."""

    text: str = ""
    ids: list[str] = field(default_factory=list)
    tags: list[tuple[str, Mapping[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        HTMLParser.__init__(page)
        page.feed(path.read_text(encoding="utf-8"))
        page.close()
        assert not page.open
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[Mapping[str, str | None]]:
        return [
            found
            for name, found in self.tags
            if name == tag and all(found.get(k) == v for k, v in attributes.items())
        ]


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return digits_index(tmp_path_factory.mktemp("digits") / "tars")


def features_of(index: SampleIndex) -> dict[str, Array]:
    n = index.n_samples
    return {"map": noise(2, n, 5, 4, 4), "tokens": noise(2, n, 9, 4), "vector": noise(2, n, 6)}


@pytest.fixture(scope="module")
def full(
    index: SampleIndex, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeatureStore, ProbeResult, Page, Path]:
    """A report with every section."""
    folder = tmp_path_factory.mktemp("report")
    store = store_of(folder / "store", features_of(index), index, invalid=[3, 500])
    pipeline = pipeline_of(store, folder / "results", probe=PROBE, distill=DISTILL)
    result = run_probe(pipeline)
    run_distill(pipeline)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "samples.png")
    path = write_report(pipeline, samples=folder / "samples.png")
    assert path == folder / "results" / "report.html"
    return store, result, Page.read(path), path


def test_a_full_report_has_every_section(
    full: tuple[FeatureStore, ProbeResult, Page, Path],
) -> None:
    store, _, page, _ = full
    assert page.ids == ["run", "input", "backbone", "features", "probe", "student", "cost"]
    assert store.fingerprint in page.text
    n = store.spec.n_samples
    assert f"{n - 2} images ok, 2 invalid, {n} in all" in page.text


def test_the_page_stands_alone(full: tuple[FeatureStore, ProbeResult, Page, Path]) -> None:
    _, _, page, path = full
    text = path.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    for _, attributes in page.tags:
        source = attributes.get("src")
        assert source is None or source.startswith("data:image/png;base64,")
        assert not attributes.keys() & {"href", "srcset", "xlink:href", "onclick"}
    for forbidden in ("http://", "https://", "<script", "<link", "@import", "url(", "@font-face"):
        assert forbidden not in text
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'")


def test_pictures_of_inputs_and_features(
    full: tuple[FeatureStore, ProbeResult, Page, Path],
) -> None:
    store, _, page, _ = full
    keys = set(store.index.table["key"].to_pylist())
    assert len([img for img in page.all("img") if img["alt"] in keys]) == 24
    # 5 images x 2 timesteps of the map and of the 3 x 3 tokens; a vector has no picture.
    assert len(page.all("img", alt="")) == 5 * 2 * 2


def test_heat_map_has_every_cell_and_frames_the_best_by_validation(
    full: tuple[FeatureStore, ProbeResult, Page, Path],
) -> None:
    store, result, page, _ = full
    cells = [td for td in page.all("td") if td.get("title")]
    assert len(cells) == len(store.arrays) * len(store.times)
    best = result.sources[0].best
    (framed,) = page.all("td", **{"class": "best"})
    assert str(framed["title"]).startswith(f"{best.tap} at {best.timestep:g}: test")
    for cell in result.sources[0].cells:
        assert f"{100 * cell.mean_test:.1f}" in page.text
    assert f"{result.sources[1].best.mean_test:.1%}".replace("%", " %") in page.text  # pixels


def test_votes_and_fusion_have_their_lines(
    full: tuple[FeatureStore, ProbeResult, Page, Path],
) -> None:
    _, result, page, _ = full
    (source, _) = result.sources
    assert source.best_knn is not None
    assert source.attentive is not None
    assert "toy, 7 neighbours" in page.text
    assert f"{source.best_knn.test:.1%}".replace("%", " %") in page.text
    assert "6 cells fused" in page.text
    assert f"{source.attentive.mean_test:.1%}".replace("%", " %") in page.text


def test_results_of_another_store_are_left_out(index: SampleIndex, tmp_path: Path) -> None:
    one = store_of(tmp_path / "one", {"x": noise(1, index.n_samples, 6)}, index)
    two = store_of(tmp_path / "two", {"y": noise(1, index.n_samples, 6)}, index, dataset="e" * 64)
    jobs = {"cluster": ClusterSpec(tap="x", k=3), "retrieve": RetrieveSpec(tap="x", k=3)}
    run_cluster(pipeline_of(one, tmp_path, **jobs))
    run_retrieve(pipeline_of(one, tmp_path, **jobs))
    assert {"clusters", "neighbours"} <= set(
        Page.read(write_report(pipeline_of(one, tmp_path))).ids
    )
    assert not {"clusters", "neighbours"} & set(
        Page.read(write_report(pipeline_of(two, tmp_path))).ids
    )


def test_invalid_rows_are_listed(full: tuple[FeatureStore, ProbeResult, Page, Path]) -> None:
    store, _, page, _ = full
    for row in (3, 500):
        assert store.index.table["key"][row].as_py() in page.text
    assert page.text.count("decodebad") == 2


def test_seconds_and_bytes_are_sums_of_receipts(
    full: tuple[FeatureStore, ProbeResult, Page, Path],
) -> None:
    store, _, page, _ = full
    receipts = store.receipts().values()
    assert f"denoise{1.5 * len(receipts):.1f}" in page.text.replace("\n", "")
    for array in store.arrays:
        total = sum(
            record.n_bytes
            for receipt in receipts
            for record in receipt.objects
            if record.path.startswith(f"{array.name}/")
        )
        assert total >= array.bytes_per_row * 2 * store.spec.n_samples
        assert human_bytes(total) in page.text


def test_sections_without_inputs_are_left_out(index: SampleIndex, tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", {"vector": noise(1, index.n_samples, 6)}, index)
    page = Page.read(write_report(pipeline_of(store, tmp_path / "results")))
    assert page.ids == ["run", "input", "cost"]


def test_an_unfinished_store_says_so(index: SampleIndex, tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", features_of(index), index, n_units=2)
    page = Page.read(write_report(pipeline_of(store, tmp_path / "results")))
    n_pending = index.n_samples - 2 * 128
    assert f"{n_pending} of {index.n_samples} samples are not computed yet" in page.text
    assert "features" in page.ids
    empty = store_of(tmp_path / "e", features_of(index), index, n_units=0)
    page = Page.read(write_report(pipeline_of(empty, tmp_path / "results")))
    assert page.ids == ["run", "cost"]


def test_tars_that_are_gone_cost_the_thumbnails_only(tmp_path: Path) -> None:
    index = digits_index(tmp_path / "tars")
    store = store_of(tmp_path / "s", features_of(index), index)
    for tar in (tmp_path / "tars").iterdir():
        tar.unlink()
    page = Page.read(write_report(pipeline_of(store, tmp_path / "results")))
    assert page.ids == ["run", "input", "features", "cost"]
    assert len(page.all("img")) == 5 * 2 * 2


def test_text_from_outside_is_escaped(index: SampleIndex, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    store = FeatureStore.create(
        str(tmp_path / "s"),
        make_spec(index.n_samples, 1024),
        [make_array("map", (3, 2, 2), "float16")],
        make_times(1),
        index,
    )
    (unit,) = store.units
    features = noise(1, unit.n_rows, 3, 2, 2).astype(np.float16)
    store.write(unit, {"map": features}, [InvalidRow(0, "k", "decode", evil)], RUN)
    pipeline = pipeline_of(store, tmp_path / "r").model_copy(update={"description": evil})
    path = write_report(pipeline)
    assert Page.read(path).text.count(evil) == 2
    assert "<script" not in path.read_text(encoding="utf-8")


def test_large_maps_do_not_make_a_large_page(index: SampleIndex, tmp_path: Path) -> None:
    """Noise does not compress: the worst case, with more taps and timesteps than are shown."""
    n_taps, n_times = 9, 8
    arrays = [make_array(f"map{i}", (3, 64, 64), "float16") for i in range(n_taps)]
    spec = make_spec(index.n_samples, 16)
    store = FeatureStore.create(
        str(tmp_path / "s"), spec, arrays, make_times(*range(n_times)), index
    )
    values = np.random.default_rng(0).standard_normal((n_times, 16, 3, 64, 64)).astype(np.float16)
    store.write(store.units[0], {a.name: values for a in arrays}, [], RUN)
    sheet = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    path = write_report(pipeline_of(store, tmp_path / "r"), samples=tmp_path / "sheet.png")
    assert path.stat().st_size < MAX_BYTES
    page = Page.read(path)
    assert len(page.all("img", alt="")) == 5 * 8 * 6
    assert "Shown: 8 of 9 taps and 6 of 8 timesteps" in page.text


def test_bfloat16_features_have_the_same_pictures(index: SampleIndex, tmp_path: Path) -> None:
    values = (noise(1, 128, 3, 2, 2).view(np.uint32) >> 16).astype(np.uint16)
    exact = (values.astype(np.uint32) << 16).view(np.float32)
    pages = []
    for dtype, stored in (("bfloat16", values), ("float32", exact)):
        store = FeatureStore.create(
            str(tmp_path / dtype),
            make_spec(index.n_samples, 128, dtype=dtype),
            [make_array("map", (3, 2, 2), dtype)],  # type: ignore[arg-type]
            make_times(1),
            index,
        )
        store.write(store.units[0], {"map": stored}, [], RUN)
        pages.append(Page.read(write_report(pipeline_of(store, tmp_path / dtype / "results"))))
    first, second = ([img["src"] for img in page.all("img", alt="")] for page in pages)
    assert first == second
    assert len(first) == 5


def test_errors(full: tuple[FeatureStore, ProbeResult, Page, Path], tmp_path: Path) -> None:
    store = full[0]
    pipeline = pipeline_of(store, tmp_path)
    with pytest.raises(UserError, match="make it with `drl extract` first"):
        write_report(pipeline.model_copy(update={"store": None}))
    elsewhere = pipeline.model_dump() | {"store": {"url": str(tmp_path / "nowhere")}}
    with pytest.raises(UserError, match=r"no store at .*nowhere"):
        write_report(Pipeline.parse(elsewhere))
    with pytest.raises(InputError, match="no image to put into the report"):
        write_report(pipeline, samples=tmp_path / "nothing.png")
    (tmp_path / "probe.json").write_text("{}")
    with pytest.raises(InputError, match="not a result of `drl probe`"):
        write_report(pipeline)


# --- pictures -----------------------------------------------------------------------------------


def test_colours_are_principal_components() -> None:
    x = noise(6, 7, 4, 5) * np.array([1, 9, 2, 5, 1, 7, 3], np.float32)[:, None, None] + 3
    got = pca_colours(x)
    assert got.shape == (6, 4, 5, 3)
    places = x.transpose(0, 2, 3, 1).reshape(-1, 7)
    reference = PCA(3).fit_transform(places.astype(np.float64))
    for k in range(3):
        colour = got[..., k].reshape(-1).astype(np.float64)
        inside = (colour > 0) & (colour < 255)
        correlation = np.corrcoef(colour[inside], reference[inside, k])[0, 1]
        assert abs(correlation) > 0.9999
        assert inside.mean() == pytest.approx(0.98, abs=0.02)  # 1st to 99th percentile


def test_colours_have_a_stable_sign_and_ignore_scale() -> None:
    x = noise(8, 4, 4, 4) * np.array([8, 4, 2, 1], np.float32)[:, None, None]
    whole = pca_colours(x)
    assert np.abs(whole.astype(int) - pca_colours(1000 * x + 7).astype(int)).max() <= 1
    # Channel 0 is nearly the first component: brighter red is more of it, never less.
    assert np.corrcoef(whole[..., 0].ravel(), x[:, 0].ravel())[0, 1] > 0.9


def test_few_or_constant_channels_are_grey() -> None:
    two = pca_colours(noise(4, 2, 3, 3))
    assert set(two[..., 2].ravel().tolist()) == {128}
    constant = pca_colours(np.ones((4, 3, 2, 2), np.float32))
    assert set(constant.ravel().tolist()) == {128}


def test_shrinking_keeps_the_aspect_and_small_images() -> None:
    assert shrunk(np.zeros((100, 50, 3), np.uint8), 40).shape == (40, 20, 3)
    small = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert shrunk(small, 40) is small
    assert png_uri(small).startswith("data:image/png;base64,iVBOR")


def test_heat_colours_are_viridis_and_read_well() -> None:
    from matplotlib import colormaps

    def luminance(hexadecimal: str) -> float:
        channels = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for i in range(10):  # the steps that it is interpolated between
        background, _ = heat_colour(i / 9)
        want = np.array(colormaps["viridis"](i / 9)[:3]) * 255
        got = [int(background[k : k + 2], 16) for k in (1, 3, 5)]
        assert np.abs(got - want).max() < 1
    for value in np.linspace(0, 1, 41):
        background, ink = heat_colour(float(value))
        low, high = sorted([luminance(background), 1.0 if ink == "#fff" else 0.0])
        assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG AA


def test_line_chart_places_points_between_its_ticks() -> None:
    chart = line_chart(
        [str(i) for i in range(1, 31)],
        [Series("loss", [1.0, *[0.5] * 28, 0.0])],
        x_label="epoch",
        y_label="loss",
        y_max=1.0,
    )
    (line,) = chart.lines
    assert line.points[0] == (chart.left, chart.top)
    assert line.points[-1] == (chart.width - chart.right, chart.height - chart.bottom)
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert line.points[1][1] == chart.y_ticks[2].at
    assert [tick.text for tick in chart.x_ticks] == ["1", "5", "9", "13", "17", "21", "25", "29"]
    one = line_chart(["1"], [Series("a", [2.0], [1.0])], x_label="", y_label="", y_max=4.0)
    ((x, y),) = one.lines[0].points
    assert one.lines[0].spans == ((x, pytest.approx(y - 46), pytest.approx(y + 46)),)


def test_bytes_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 45_600_000, 7 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "45.6 MB",
        "7 TB",
    ]
