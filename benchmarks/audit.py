"""Known vulnerabilities of the packages that constraints.txt pins: `make audit`.

Exit status 1 if there is one that an update would end; those without a fix are listed. Where the
service that knows them cannot be reached (a machine without a network), it says so, and that is no
failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
TIMEOUT_S = 90
ACCEPTED: dict[str, str] = {}
"""Identifier of a vulnerability -> why it does not concern this project."""


def verdict(report: str) -> tuple[list[str], bool]:
    """Lines about the JSON that pip-audit printed, and whether something must be updated."""
    packages = json.loads(report)["dependencies"]
    unknown = [each["name"] for each in packages if "skip_reason" in each]
    lines, must_update = [], False
    for package in packages:
        for found in package.get("vulns", []):
            name = f"{found['id']}: {package['name']} {package['version']}"
            reason = next((ACCEPTED[i] for i in (found["id"], *found.get("aliases", []))
                           if i in ACCEPTED), None)  # fmt: skip
            if reason is not None:
                lines.append(f"accepted: {name}: {reason}")
            elif found["fix_versions"]:
                must_update = True
                lines.append(f"UPDATE: {name}, fixed in {', '.join(found['fix_versions'])}")
            else:
                lines.append(f"no fix yet: {name}")
    n_checked = len(packages) - len(unknown)
    lines.append(f"audit: {n_checked} of {len(packages)} packages checked")
    if unknown:
        state = "not checked" if n_checked else "NOT DONE, the service knows none of them"
        lines.append(f"audit: {state}: {', '.join(unknown[:5])}{' ...' if unknown[5:] else ''}")
    return lines, must_update


def main() -> int:
    """Run pip-audit over the pinned versions; nothing is installed or resolved."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps"]
    command += ["--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"audit: NOT DONE: no answer within {TIMEOUT_S} s")
        return 0
    if not done.stdout.startswith("{"):
        lines = done.stderr.strip().splitlines() or ["no output"]
        print(f"audit: NOT DONE: the service cannot be reached: {lines[-1][:200]}")
        return 0
    lines, must_update = verdict(done.stdout)
    print("\n".join(lines))
    return 1 if must_update else 0


if __name__ == "__main__":
    sys.exit(main())
