"""What a run depended on, as hashes and versions: enough to say whether another run could have had the same bytes."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("opd", "torch", "transformers", "peft", "tokenizers", "safetensors", "datasets", "numpy")
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")  # weights, configuration, tokenizer, chat template


def lock(
    *,
    seed: int,
    threads: int,
    device: str = "cpu",
    models: Mapping[str, Path] | None = None,
    data: Iterable[Path] = (),
    template: str | None = None,
) -> dict[str, Any]:
    """The content of lock.json. `models` maps a role to the local folder it was loaded from; `template` is the chat
    template as text. Packages that are not installed are null."""
    return {
        "seed": seed,
        "threads": threads,
        "device": device,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": hash_files(sorted(Path(__file__).parent.rglob("*.py")), Path(__file__).parent),
        "models": {role: {"path": str(path), "sha256": hash_model(path)} for role, path in (models or {}).items()},
        "data": {str(path): hash_file(path) for path in data},
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "command": sys.argv[0].rsplit("/", 1)[-1:] + sys.argv[1:],
    }


def hash_model(folder: Path) -> str:
    """sha256 over a model folder's weights, configuration, tokenizer and template; where it lies does not matter."""
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return hash_files(sorted(files), folder)


def hash_files(files: Iterable[Path], base: Path) -> str:
    """sha256 over (path relative to `base`, content) of the files, in the order given."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(base).as_posix()}\0{hash_file(path)}\n".encode())
    return total.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(left: Any, right: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested documents differ, by dotted key: {"packages.torch": ("2.12.0", "2.13.0")}. Absent is None."""
    if isinstance(left, Mapping | None) and isinstance(right, Mapping | None) and (left or right):
        left, right = left or {}, right or {}
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys((*left, *right)):
            found |= differences(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return {} if left == right else {prefix: (left, right)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
