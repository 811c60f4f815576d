"""What was found out about a device, kept in the user's cache for the processes to come."""

import hashlib
import json
import os
import pathlib
import warnings
from typing import Any

from effkernels import _build


def load(kind: str, *key: str) -> dict[str, Any] | None:
    """What an earlier process kept; None where there is nothing, or nothing legible."""
    try:
        content = json.loads(_file(kind, *key).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def save(content: dict[str, Any], what: str, kind: str, *key: str) -> None:
    """Keep it, or warn that `what` it is cannot be kept."""
    file = _file(kind, *key)
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1))
        partial.rename(file)
    except OSError as error:
        warnings.warn(f"effkernels cannot keep {what}: {error}", stacklevel=3)


def _file(kind: str, *key: str) -> pathlib.Path:
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return _build.CACHE / kind / f"{name}.json"
