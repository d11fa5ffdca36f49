"""The models of one worker, each in an engine process of its own. Knows no Redis, no Celery."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inferfleet.tasks.settings import ModelSpec
from inferfleet.workers.child import ENGINE_COMMAND
from inferfleet.workers.flight import Flight
from inferfleet.workers.publisher import Publisher
from inferfleet.workers.resident import LOAD_SECONDS, Resident

#: What of a model's settings the engine process needs; the rest is the worker's.
SPEC_FIELDS = set(ModelSpec.model_fields) - {"eager"}


def engine_spec(spec: ModelSpec) -> dict[str, Any]:
    """A model's settings as the engine process reads them; `image` is there only where it was set."""
    values = spec.model_dump(include=SPEC_FIELDS)
    return values if spec.image is not None else {name: value for name, value in values.items() if name != "image"}


class Host:
    """Starts, finds and ends residents."""

    def __init__(
        self,
        models: Mapping[str, ModelSpec],
        *,
        publisher: Publisher,
        on_change: Callable[[Resident], None],
        on_progress: Callable[[Resident], None] = lambda resident: None,
        command: Sequence[str] = ENGINE_COMMAND,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        self._specs = dict(models)
        self._residents = {
            model: Resident(
                model,
                engine_spec(spec),
                command=command,
                publisher=publisher,
                on_change=on_change,
                on_progress=on_progress,
                load_seconds=load_seconds,
            )
            for model, spec in models.items()
        }

    def __getitem__(self, model: str) -> Resident:
        return self._residents[model]

    def get(self, model: str) -> Resident | None:
        return self._residents.get(model)

    def residents(self) -> list[Resident]:
        return list(self._residents.values())

    def start(self) -> None:
        """Bring up the engines of the eager models; the others come with their first turn."""
        for model, resident in self._residents.items():
            if self._specs[model].eager:
                resident.start()

    def flights(self) -> list[tuple[Resident, Flight]]:
        """All that is under way."""
        return [(resident, flight) for resident in self.residents() for flight in resident.flights()]

    def stop(self) -> None:
        """End every engine process."""
        for resident in self.residents():
            resident.stop()
