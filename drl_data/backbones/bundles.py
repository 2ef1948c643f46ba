"""What comes with drl: one small trained model, and real configurations without weights.

`drl_data/assets/NAME` holds weights. `drl_data/configs/NAME` is the folder of a named model in its
own layout, less the weights: enough for shapes, FLOPs and plans on the meta device, and for
`init: random`. Its source.json says where the weights are: {"hub": [ids, the living one first],
"alike": [ids of other weights for the same architecture], "image_size": the side in pixels that the
model was trained at}.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path

from drl_data.errors import WeightsError

SOURCE = "source.json"


def bundle_names() -> list[str]:
    """Every NAME of `bundled:NAME`."""
    return sorted(path.name for parent in _parents() for path in parent.iterdir() if path.is_dir())


def bundle_folder(name: str) -> Path:
    """The folder of a bundle.

    Raises:
        WeightsError: if there is none of that name, naming the nearest.
    """
    for parent in _parents():
        if name in bundle_names() and (parent / name).is_dir():
            return parent / name
    near = difflib.get_close_matches(name, bundle_names(), n=3, cutoff=0.3)
    raise WeightsError(f"no model 'bundled:{name}'; nearest: {', '.join(near or bundle_names())}")


def bundle_of(hub_id: str) -> str | None:
    """The bundled configuration of a hub id, or of one of the same architecture; or None."""
    for name in bundle_names():
        root = bundle_folder(name)
        if hub_id in (*hub_ids(root), *_ids(root, "alike")):
            return name
    return None


def is_config_only(root: Path) -> bool:
    """Whether a folder is a configuration without weights."""
    return (root / SOURCE).is_file()


def hub_ids(root: Path) -> tuple[str, ...]:
    """Hub ids that have the weights of a bundled configuration."""
    return _ids(root, "hub")


def bundled_image_size(root: Path) -> int | None:
    """Side in pixels that a bundled model was trained at."""
    size = _source(root).get("image_size")
    return size if isinstance(size, int) else None


def _ids(root: Path, kind: str) -> tuple[str, ...]:
    names = _source(root).get(kind, [])
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _source(root: Path) -> dict[str, object]:
    if not is_config_only(root):
        return {}
    source: dict[str, object] = json.loads((root / SOURCE).read_text(encoding="utf-8"))
    return source


def _parents() -> tuple[Path, Path]:
    package = Path(str(resources.files("drl_data")))
    return package / "assets", package / "configs"
