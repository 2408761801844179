"""docs/doctor.md says what the checks say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_its_tool_makes():
    made = runpy.run_path(str(ROOT / "tools" / "doctor_docs.py"))["text"]()
    assert (ROOT / "docs" / "doctor.md").read_text() == made, "run: python tools/doctor_docs.py"
