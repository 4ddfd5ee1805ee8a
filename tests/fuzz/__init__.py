"""Odd inputs by the thousand, each judged, each replayed by its seed: see `tests/fuzz/__main__.py`."""
