"""How `inferfleet up` tells its phases: to a person, with bars on a terminal, or to a program, a JSON object a line."""

import json
import sys
import time

from inferfleet.workers.cli_output import out
from inferfleet.workers.loading import LINE_SECONDS, BarView, Loading, View


class Sparse:
    """Whether a line about a model's loading is due: none while it takes no longer than a moment."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def due(self, model: str) -> bool:
        now = time.monotonic()
        if now - self._last.setdefault(model, now) < LINE_SECONDS:
            return False
        self._last[model] = now
        return True


class LineView:
    """A line now and then, for a person who reads a pipe."""

    def __init__(self) -> None:
        self._sparse = Sparse()

    def show(self, model: str, loading: Loading) -> None:
        if self._sparse.due(model):
            out.print(f"model {model}: {loading}", markup=False, soft_wrap=True)

    def end(self, model: str) -> None:
        """The phase's own line says it."""


class TextReport:
    """Phases for a person."""

    def __init__(self) -> None:
        self._view: View = BarView(out) if out.is_terminal else LineView()

    def phase(self, name: str, seconds: float, detail: str) -> None:
        out.print(f"{name:<16} ready in {seconds:6.2f} s   {detail}", markup=False)

    def note(self, text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)  # addresses are copied from here

    def loading(self, model: str, loading: Loading | None) -> None:
        if loading is None:
            self._view.end(model)
        else:
            self._view.show(model, loading)


class JsonReport:
    """Phases for a program: one JSON object a line."""

    def __init__(self) -> None:
        self._sparse = Sparse()

    def phase(self, name: str, seconds: float, detail: str) -> None:
        self._print({"phase": name, "seconds": round(seconds, 3), "detail": detail})

    def note(self, text: str) -> None:
        self._print({"note": text})

    def loading(self, model: str, loading: Loading | None) -> None:
        if loading is not None and self._sparse.due(model):
            self._print({"loading": model, **loading.to_dict()})

    def _print(self, value: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
