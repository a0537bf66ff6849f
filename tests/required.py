"""Parts that a machine may lack: a test that needs one is skipped without it, and fails where OPD_REQUIRE names it."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

WORLD = Path(os.environ.get("OPD_WORLD", Path(__file__).parents[2] / "shared" / "world"))  # small real models and texts


def required(part: str) -> bool:
    """Whether this part must not be missing: OPD_REQUIRE=browser,disk,world."""
    return part in os.environ.get("OPD_REQUIRE", "").split(",")


def lacking(part: str, why: str) -> NoReturn:
    """Skip the test, or fail it where the part is required."""
    if required(part):
        pytest.fail(f"{why}, and OPD_REQUIRE names it")
    pytest.skip(why)


needs_world = pytest.mark.skipif(
    not (WORLD / "models").is_dir() and not required("world"), reason="the small real world is not beside the checkout"
)
