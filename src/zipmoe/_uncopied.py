"""Parts of a loaded model that nothing can copy, pickle or save."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["Uncopied"]


class Uncopied:
    """Refuses to be copied and pickled, and says why."""

    _why_not = "its weights are packed"

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(f"a model loaded by zipmoe cannot be copied: {self._why_not}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a model loaded by zipmoe cannot be pickled or saved: {self._why_not}; "
            "`zipmoe unpack` restores the checkpoint"
        )
