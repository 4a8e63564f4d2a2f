"""Results on disk, each known by all that decides it, so that what was made once is not made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s3lab.files import write


def recall(folder: str | Path, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Return what was kept in a folder under a key, made now and kept if it is not there; JSON holds both.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     [recall(folder, {"seed": 0}, lambda: {"made": n}) for n in range(2)]
    [{'made': 0}, {'made': 0}]
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    kept = Path(folder) / "rows" / f"{digest}.json"
    if not kept.exists():
        write(kept, json.dumps(make()).encode())
    return json.loads(kept.read_bytes())
