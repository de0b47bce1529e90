"""Progress bars, where tqdm is installed."""

from types import TracebackType
from typing import Any


class Bar:
    """A bar that fills up, or nothing at all.

    Args:
        description: what is going on.
        total: how many units there are.
        shown: whether to show it.
        unit: what is counted.
    """

    def __init__(self, description: str, *, total: int | None, shown: bool, unit: str = "sample") -> None:
        self.bar: Any = None
        if not shown:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=total, desc=description, unit=unit, leave=False)

    def advance(self, count: int = 1, **numbers: str) -> None:
        """Count on, and show numbers beside the bar."""
        if self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(count)
            if not count:
                self.bar.refresh()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
