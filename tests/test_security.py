"""What docs/security.md says of Ray's tokens and of the audit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import drl_data

ROOT = Path(__file__).parents[1]


# --- Ray's token authentication -------------------------------------------------------------------

PROGRAM = """
import os
from drl_data.executors import Workers, run_ray
from drl_data.plan import plan_units
from work import make

if __name__ == "__main__":
    outcomes = run_ray(make, plan_units(3, 1), workers=Workers(gpus=0))
    print(sorted(o.result for o in outcomes))
    print(os.environ.get("RAY_AUTH_MODE"))
"""
WORK = """
import os

def make():
    return lambda lease, stop: (lease.unit.id, os.environ.get("RAY_AUTH_MODE"))
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets have names of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.parametrize("given", ["none", "file"])
def test_a_local_ray_has_tokens_on(given: str, short_folder: Path) -> None:
    """Started without a word about authentication, it makes a token, or takes the one there is."""
    home = short_folder / "home"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(short_folder), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{short_folder}"
    secret = "0123456789abcdef" * 3
    if given == "file":
        token.write_text(secret)
    script = short_folder / "program.py"
    script.write_text(PROGRAM)
    (short_folder / "work.py").write_text(WORK)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["[(0, 'token'), (1, 'token'), (2, 'token')]", "token"]
    assert len(token.read_text()) >= 32
    assert (token.read_text() == secret) == (given == "file")
    assert secret not in done.stdout + done.stderr


def test_nothing_of_ours_speaks_of_authentication() -> None:
    sources = [*Path(drl_data.__file__).parent.rglob("*.py"), ROOT / "Makefile"]
    assert not [path for path in sources if "RAY_AUTH" in path.read_text(encoding="utf-8")]


# --- the audit ------------------------------------------------------------------------------------


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "benchmarks" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*vulnerabilities: dict[str, object]) -> str:
    packages = [
        {"name": "good", "version": "1", "vulns": []},
        {"name": "bad", "version": "2", "vulns": list(vulnerabilities)},
        {"name": "ours", "skip_reason": "not found"},
    ]
    return json.dumps({"dependencies": packages, "fixes": []})


def test_what_has_a_fix_fails_and_what_has_none_does_not(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_one = {"id": "CVE-1", "fix_versions": [], "aliases": []}
    closed = {"id": "CVE-2", "fix_versions": ["3"], "aliases": ["GHSA-2"]}
    last = ["audit: 2 of 3 packages checked", "audit: not checked: ours"]
    assert audit.verdict(report()) == (last, False)
    assert audit.verdict(report(open_one)) == (["no fix yet: CVE-1: bad 2", *last], False)
    both = audit.verdict(report(open_one, closed))
    lines = ["no fix yet: CVE-1: bad 2", "UPDATE: CVE-2: bad 2, fixed in 3", *last]
    assert both == (lines, True)
    monkeypatch.setitem(audit.ACCEPTED, "GHSA-2", "we never call it")
    accepted = "accepted: CVE-2: bad 2: we never call it"
    assert audit.verdict(report(closed)) == ([accepted, *last], False)


def test_an_audit_without_a_network_says_so_and_passes(audit: ModuleType) -> None:
    nowhere = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_PROXY": "", "no_proxy": ""}
    environment |= {name.lower(): value for name, value in nowhere.items()}
    done = subprocess.run(
        [sys.executable, audit.__file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("audit: NOT DONE: the service cannot be reached")


def test_every_package_of_the_audit_is_pinned(audit: ModuleType) -> None:
    pins = [line for line in audit.CONSTRAINTS.read_text().splitlines() if line[:1] != "#"]
    assert pins
    assert all("==" in pin for pin in pins)
