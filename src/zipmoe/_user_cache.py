"""Where zipmoe keeps what it has made or measured for this user."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """Return the folder `zipmoe` in the user's cache; a relative XDG_CACHE_HOME counts nothing."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "zipmoe"
