"""Captions: the names under which they are found."""

from __future__ import annotations

TEXT = ("text", "caption")
"""Names of columns and fields; the first one present is used."""
