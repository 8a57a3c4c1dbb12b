"""Which language a text is in: the same answer for the same text, every time.

langdetect draws n-grams at random and is unseeded as it comes, so that one text can get several
answers; the detector here has its own seed and leaves the library's global state alone.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import langdetect
from langdetect import LangDetectException
from langdetect.detector_factory import DetectorFactory

SEED = 0


def detect(text: str) -> str | None:
    """Return the code of the likeliest language, such as `en`; None if there is nothing to see."""
    detector = _factory().create()
    try:
        detector.append(text)
        return str(detector.detect())
    except LangDetectException:
        return None


@cache
def _factory() -> Any:
    factory: Any = DetectorFactory()
    factory.set_seed(SEED)
    folder = Path(langdetect.__file__).parent / "profiles"
    # Sorted: the order of profiles must not depend on the file system.
    factory.load_json_profile([p.read_text("utf-8") for p in sorted(folder.iterdir())])
    return factory
