"""Secrets in URLs and in the environment reach no file, no log and no message.

A real web server asks for them: a password, or a signature in the query of each tar, as presigned
URLs have. Runs that fail and runs that succeed are then searched, byte by byte.
"""

from __future__ import annotations

import base64
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drl_data import cli
from drl_data.answers import describe
from drl_data.errors import DrlDataError, ImageError, InputError, ObjectError, is_redacted, redacted
from drl_data.index import SampleIndex, build_index
from drl_data.objects import join_url, open_folder, open_parent, split_url
from drl_data.pipeline import Pipeline
from drl_data.receipts import TarRecord
from drl_data.runs import extract, prepare
from drl_data.spec import DatasetSpec
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny_ddpm
from tests.conftest import Drl
from tests.test_extract import assert_same_store
from tests.toy_tars import png, write_tar

PASSWORD = "pw-Zx81Qh"
OLD, NEW = "old-Kd93sig%2FA%3D", "new-Pf27sig%2FB%3D"
SECRETS = (PASSWORD, "Kd93sig", "Pf27sig", base64.b64encode(f"me:{PASSWORD}".encode()).decode())


HYPOTHESIS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- redacted -------------------------------------------------------------------------------------

word = st.text("abcXYZ019", min_size=1, max_size=8)
secret = st.text("abcXYZ019-._~%+=:,;!$*()&", min_size=1, max_size=20).map(lambda s: f"S3cr{s}T9")
host = st.builds("{}.{}:80/{}".format, word, word, word)
schemes = st.sampled_from(["https", "http", "s3", "sftp", "simplecache::https", "HTTPS", "abfs"])
parameters = st.sampled_from(
    ["X-Amz-Signature", "sig", "sv=1&sig", "token", "X-Amz-Credential", "X-Goog-Signature", "x"]
)


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A message with several URLs, each with a secret or two, and the secrets."""
    parts, secrets = [], []
    for _ in range(draw(st.integers(1, 4))):
        user, query = draw(secret), draw(secret)
        where = draw(st.sampled_from(["user", "query", "both", "at"]))
        url = f"{draw(schemes)}://"
        if where in ("user", "both"):
            url += f"{draw(word)}:{user}@"
            secrets.append(user)
        if where == "at":  # an @ that nobody has escaped
            url += f"me:{user}@{user}@"
            secrets.append(user)
        url += draw(host)
        if where in ("query", "both"):
            url += f"?{draw(parameters)}={query}"
            secrets.append(query)
        quote = draw(st.sampled_from(["", "'", '"']))
        parts.append(f"{draw(word)} {quote}{url}{quote}")
    return draw(st.sampled_from([" ", ": ", "\n"])).join(parts), secrets


@HYPOTHESIS
@given(texts())
def test_no_secret_of_a_url_is_left(found: tuple[str, list[str]]) -> None:
    text, secrets = found
    shown = redacted(text)
    assert not [each for each in secrets if each in shown]
    assert redacted(shown) == shown
    for kind in (InputError, ObjectError, partial(ImageError, "read")):
        error = kind(text)
        assert not [each for each in secrets if each in f"{error}{error!r}{error.args}"]
    assert not [each for each in secrets if each in describe(RuntimeError(text))]
    assert not [each for each in secrets if each in ImageError("read", text).reason]


@HYPOTHESIS
@given(st.text("abc /:.,'\"=&-{}[]*", max_size=60).filter(lambda s: "sig=" not in s))
def test_text_without_secrets_stays(text: str) -> None:
    assert redacted(text) == text or "://" in text


@pytest.mark.parametrize("name", ["X-Amz-Signature", "sig", "X-Amz-Security-Token", "Signature"])
def test_a_signature_alone_is_hidden(name: str) -> None:
    assert redacted(f"got {name}=abc%2F, want") == f"got {name}=***, want" or "abc" not in redacted(
        f"got {name}=abc%2F, want"
    )


@HYPOTHESIS
@given(schemes.filter(lambda s: s.lower() in ("http", "https")), host, secret, word)
def test_the_query_of_an_object_stays_with_its_folder(
    scheme: str, host: str, secret: str, name: str
) -> None:
    url = f"{scheme.lower()}://{host}/{name}?a/b={secret}/"
    folder, found = split_url(url)
    assert found == name
    assert join_url(folder, found) == url
    assert open_parent(url)[0].url == folder


def test_the_url_of_a_tar_record_has_no_secrets() -> None:
    record = TarRecord(url=f"https://me:{PASSWORD}@h/a.tar?sig={OLD}", size=1, etag="")
    assert record.url == "https://***@h/a.tar?***"
    assert is_redacted(record.url)


# --- a server that wants secrets ------------------------------------------------------------------


@dataclass
class Door:
    """A web server: `signed/` wants a signature that is in force, `locked/` the password."""

    url: str
    in_force: set[str] = field(default_factory=lambda: {OLD})
    n_denied: int = 0

    def allows(self, path: str, authorization: str | None) -> bool:
        place = urlsplit(path)
        if place.path.startswith("/signed/"):
            return place.query in {f"X-Amz-Signature={each}" for each in self.in_force}
        token = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        return authorization == f"Basic {token}"


class _Handler(SimpleHTTPRequestHandler):
    door: Door
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        # As S3: what is signed for GET is signed for nothing else.
        self._answer(allowed=not self.path.startswith("/signed/"), body=False)

    def do_GET(self) -> None:
        self._answer(allowed=True, body=True)

    def _answer(self, *, allowed: bool, body: bool) -> None:
        if not (allowed and self.door.allows(self.path, self.headers.get("Authorization"))):
            self.door.n_denied += 1
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = Path(self.directory) / urlsplit(self.path).path.split("/")[-1]
        data, code, headers = path.read_bytes(), 200, {}
        wanted = self.headers.get("Range")
        if wanted:
            start, stop = map(int, wanted.removeprefix("bytes=").split("-"))
            stop = min(stop + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, code = data[start:stop], 206
        headers |= {
            "Content-Length": str(len(data)),
            "ETag": f'"{path.stat().st_mtime_ns}"',
            "Last-Modified": self.date_time_string(path.stat().st_mtime),
        }
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def door(tars: Path) -> Iterator[Door]:
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tars)))
    handler.door = Door(f"127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.door
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of twelve samples with labels; the last image of each does not decode."""
    folder = tmp_path / "tars"
    for tar in range(2):
        members = []
        for i in range(12):
            key = f"{tar}-{i}"
            image = png(12 * tar + i, 16, 16) if i < 11 else b"\x89PNG\r\n\x1a\n"
            members += [(f"{key}.cls", str(i % 2).encode()), (f"{key}.png", image)]
        write_tar(folder / f"{tar}.tar", members)
    return folder


def content(urls: list[str], ddpm: Path, folder: Path) -> dict[str, object]:
    return {
        "name": "secret",
        "dataset": {"tars": {"train": urls[:1], "test": urls[1:]}},
        "images": {"size": 16},
        "backbone": {"model": str(ddpm)},
        "schedule": {"timesteps": [200]},
        "taps": ["mid_block"],
        "features": {"dtype": "float32", "batch_size": 2, "rows_per_unit": 2},
        "store": {"url": str(folder / "f.zarr")},
        "results": str(folder / "results"),
        "run": {"max_attempts": 1},
        "probe": {"epochs": 1, "seeds": [0], "validation": 0.5},
    }


def signed(door: Door, signature: str) -> list[str]:
    return [f"http://{door.url}/signed/{i}.tar?X-Amz-Signature={signature}" for i in range(2)]


def locked(door: Door) -> list[str]:
    return [f"http://me:{PASSWORD}@{door.url}/locked/{i}.tar" for i in range(2)]


def bytes_below(url: str) -> Iterator[tuple[str, bytes]]:
    """Every object of a folder; of Parquet files also the values, which are compressed."""
    folder = open_folder(url)
    for info in folder.list():
        data = bytes(folder.get(info.path))
        yield info.path, data
        if info.path.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            yield info.path, f"{table.schema.metadata}{table.to_pylist()}".encode()


def leaks(url: str, *printed: str) -> list[tuple[str, str]]:
    """(where, secret) of all that is found."""
    places = [*bytes_below(url), *((f"printed: {text[:40]}", text.encode()) for text in printed)]
    return [(name, s) for name, data in places for s in SECRETS if s.encode() in data]


@pytest.fixture
def drl(drl: Drl) -> Callable[..., str]:
    """Run `drl -v ARGS` in this process: all that it printed, and its exit status at the end."""

    def run(*args: object) -> str:
        status, out, err = drl("-v", *args)
        return f"{out}{err}exit {status}"

    return run


def test_signed_tars_and_a_signature_that_expires(
    door: Door, ddpm: Path, tars: Path, tmp_path: Path, drl: Callable[..., str]
) -> None:
    """Half a run under one signature, which then expires; the rest under another one. The store is
    that of a run on local files, and nothing anywhere knows a signature."""
    file, folder = tmp_path / "p.yaml", tmp_path / "out"
    folder.mkdir()
    file.write_text(yaml.safe_dump(content(signed(door, OLD), ddpm, folder), sort_keys=False))
    printed = [drl("plan", file), drl("extract", file, "--limit", "4"),
               drl("index", *signed(door, OLD), "--out", folder / "index.parquet")]  # fmt: skip
    assert [text[-6:] for text in printed] == ["exit 0"] * 3
    store = FeatureStore.open(str(folder / "f.zarr"))
    assert len(store.receipts()) == 2
    assert [tar.url for tar in store.index.tars] == [
        f"http://{door.url}/signed/{i}.tar?***" for i in range(2)
    ]

    door.in_force = {NEW}
    printed.append(drl("extract", file))
    assert "exit 0" not in printed[-1]
    assert door.n_denied
    assert "/signed/" in printed[-1]
    assert len(store.receipts()) == 2

    file.write_text(yaml.safe_dump(content(signed(door, NEW), ddpm, folder), sort_keys=False))
    printed += [drl("extract", file), drl("status", store.url), drl("verify", store.url, "--deep")]
    assert printed[-3].endswith("exit 1")
    printed += [drl("probe", file), drl("report", file)]
    assert all(text.endswith("exit 0") for text in printed[-3:]), printed[-3:]
    page = (folder / "results" / "report.html").read_text()
    assert page.count("<img") >= 6  # the images were read again, under the new signature
    assert leaks(str(folder), *printed) == []

    local = Pipeline.parse(content([str(tars / f"{i}.tar") for i in range(2)], ddpm, tmp_path))
    assert_same_store(store, extract(local).store)


def test_a_password_in_the_url(
    door: Door, ddpm: Path, tmp_path: Path, drl: Callable[..., str]
) -> None:
    file, folder = tmp_path / "p.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(content(locked(door), ddpm, folder), sort_keys=False))
    printed = [drl("extract", file)]
    assert "22 samples" in printed[0]
    wrong = [url.replace(PASSWORD, PASSWORD + "x") for url in locked(door)]
    file.write_text(yaml.safe_dump(content(wrong, ddpm, folder), sort_keys=False))
    printed.append(drl("extract", file))
    assert "exit 0" not in printed[-1]
    assert "/locked/" in printed[-1]
    assert leaks(str(folder), *printed) == []


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_workers_read_with_secrets_that_the_store_has_not(
    door: Door, ddpm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = {"executor": "ray", "workers": 1, "cpus_per_worker": 0.5, "max_attempts": 1}
    data = {**content(signed(door, OLD), ddpm, tmp_path / "out"), "run": run}
    summary = extract(Pipeline.parse(data), limit=4)
    assert (summary.n_ok, summary.n_invalid, summary.failed) == (4, 0, [])
    prepared = prepare(Pipeline.parse(data))
    door.in_force = set()
    assert prepared.tars is not None
    with pytest.raises(DrlDataError):
        extract(Pipeline.parse(data))
    assert leaks(str(tmp_path / "out"), caplog.text) == []


def test_a_store_alone_cannot_read_its_tars(door: Door, ddpm: Path, tmp_path: Path) -> None:
    """Who opens a store without the pipeline is told what to do."""
    pipeline = Pipeline.parse(content(signed(door, OLD), ddpm, tmp_path / "out"))
    extract(pipeline)
    store = FeatureStore.open(str(tmp_path / "out" / "f.zarr"))
    again = store.index.with_urls(signed(door, OLD))
    assert [tar.url for tar in again.tars] == signed(door, OLD)
    assert store.index.located(pipeline.dataset) == again
    with pytest.raises(InputError, match=r"'none', want '.*1\.tar"):
        store.index.with_urls([*signed(door, OLD)[:1]])
    other = [url.replace("/0.tar", "/9.tar") for url in signed(door, OLD)]
    with pytest.raises(InputError, match=r"9\.tar\?\*\*\*', want '.*0\.tar\?\*\*\*'"):
        store.index.with_urls(other)
    from drl_data.images import read_batches

    batches = read_batches(
        store.units[0], store.index, store.spec.images, batch_size=2, n_threads=1, prefetch_bytes=1
    )
    with pytest.raises(InputError, match=r"without their secrets; give them again: .*with_urls"):
        next(batches)


def test_an_index_is_saved_without_secrets(door: Door, tmp_path: Path) -> None:
    index = build_index(DatasetSpec.model_validate({"tars": locked(door)}))
    index.save(str(tmp_path / "saved" / "i.parquet"))
    assert leaks(str(tmp_path / "saved")) == []
    loaded = SampleIndex.load(str(tmp_path / "saved" / "i.parquet"))
    assert loaded.digest() == index.digest()
    assert loaded.tars == index.public_tars()
    assert loaded.dataset.tars["all"] == tuple(map(redacted, locked(door)))


# --- other ways out -------------------------------------------------------------------------------


def broken(spec: object, device: object) -> object:
    """A factory of a user that fails and says too much."""
    try:
        raise OSError(f"403 for https://me:{PASSWORD}@host/model?X-Amz-Signature={OLD}")
    except OSError as error:
        raise RuntimeError(f"no model at https://me:{PASSWORD}@host/") from error


def test_tracebacks_have_no_secrets(
    ddpm: Path, tars: Path, tmp_path: Path, drl: Callable[..., str]
) -> None:
    """Errors that are nobody's here are printed with their chain, redacted."""
    data = content([str(tars / "0.tar")] * 1, ddpm, tmp_path / "out")
    data |= {"backbone": {"model": "python:tests.test_secrets:broken"}}
    data |= {"dataset": {"tars": str(tars / "0.tar")}}
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    printed = drl("extract", file)
    assert printed.endswith(("exit 1", "exit 2"))
    assert "no model at https://***@host/" in printed
    (tmp_path / "out").mkdir(exist_ok=True)
    assert leaks(str(tmp_path / "out"), printed) == []


def test_log_records_of_others_have_no_secrets(capfd: pytest.CaptureFixture[str]) -> None:
    """A library that logs a URL, and one that logs an exception with one."""
    import logging

    formatter = cli._RedactedFormatter("%(message)s")
    try:
        raise OSError(f"https://me:{PASSWORD}@host/?sig={OLD}")
    except OSError:
        record = logging.LogRecord(
            "x", 30, "f", 1, "GET %s", (f"https://h/?X-Amz-Signature={NEW}",), sys.exc_info()
        )
        text = formatter.format(record)
        assert PASSWORD in traceback.format_exc()
    assert "OSError: https://***@host/?***" in text
    assert not [each for each in SECRETS if each in text]


@pytest.mark.s3
def test_keys_of_object_storage_stay_in_the_environment(
    s3_url: str,
    ddpm: Path,
    tars: Path,
    tmp_path: Path,
    drl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA" + PASSWORD)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("AWS_SESSION_TOKEN", PASSWORD)
    folder = open_folder(s3_url)
    for path in tars.iterdir():
        folder.put(f"tars/{path.name}", [path.read_bytes()])
    data = content([f"{s3_url}/tars/{i}.tar" for i in range(2)], ddpm, tmp_path / "out")
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump({**data, "store": {"url": f"{s3_url}/f.zarr"}}, sort_keys=False))
    printed = [drl("extract", file), drl("status", f"{s3_url}/f.zarr"), drl("report", file)]
    assert "22 samples" in printed[0]
    file.write_text(
        yaml.safe_dump({**data, "store": {"url": "s3://no-such-bucket/f.zarr"}}, sort_keys=False)
    )
    printed.append(drl("extract", file))
    assert "exit 0" not in printed[-1]
    folder.delete("tars/1.tar")
    file.write_text(yaml.safe_dump({**data, "store": {"url": f"{s3_url}/g.zarr"}}, sort_keys=False))
    printed.append(drl("extract", file))
    assert printed[-1].endswith("exit 2")
    assert leaks(s3_url, *printed) == []
    assert leaks(str(tmp_path / "out"), *printed) == []
