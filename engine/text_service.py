"""A language model behind the engine process: chats in messages, text in news."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from inferfleet.engine.admission import Published
from inferfleet.engine.engine import Engine
from inferfleet.engine.errors import EngineError, InvalidRequest
from inferfleet.engine.loader import EngineSpec, Loaded, load_engine
from inferfleet.engine.output import StepOutput
from inferfleet.engine.progress import Progress
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.services import Service
from inferfleet.engine.text.chat import ChatTemplateError


class TextService(Service[Engine]):
    """A language model, perhaps split over several processes."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded.engine, {"kind": "text", **loaded.card})
        self._prompts, self._followers = loaded.prompts, loaded.followers

    @classmethod
    def load(cls, spec: EngineSpec, progress: Progress) -> TextService:
        return cls(load_engine(spec, progress))

    @property
    def connections(self) -> Sequence[Connection]:
        return () if self._followers is None else self._followers.connections

    def check(self) -> None:
        if self._followers is not None:
            self._followers.check()

    def add(self, message: Mapping[str, Any]) -> None:
        """Turn the messages of an add into a prompt and give it to the engine. EngineError with the field at fault."""
        try:
            sampling = SamplingParams.from_dict(message.get("sampling") or {})
        except (TypeError, ValueError) as error:
            # Its message begins with the field's name.
            raise InvalidRequest(str(error), param=str(error).partition(" ")[0]) from error
        try:
            kwargs = message.get("chat_template_kwargs") or {}
            prompt = self._prompts.encode_chat(message["messages"], **kwargs)
        except ChatTemplateError as error:
            raise InvalidRequest(str(error), param="messages") from error
        resume = message.get("resume") or {}
        self.engine.add(
            message["id"],
            prompt,
            sampling,
            cache_salt=message.get("cache_salt", ""),
            priority=message.get("priority", 0),
            matformer_slice=message.get("matformer_slice"),
            published={int(i): Published(tuple(told["token_ids"]), told["text"]) for i, told in resume.items()},
        )

    def news(self, *errors: tuple[str, EngineError]) -> StepOutput:
        return StepOutput(errors=list(errors))
