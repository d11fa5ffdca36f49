"""A language model behind the engine process: chats in messages, text in news."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from inferfleet.engine.admission import Published
from inferfleet.engine.errors import EngineError, InvalidRequest
from inferfleet.engine.loader import EngineSpec, Loaded, load_engine
from inferfleet.engine.output import StepOutput
from inferfleet.engine.progress import Progress
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.text.chat import ChatTemplateError


class TextService:
    """See services.Service."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded, self._engine = loaded, loaded.engine
        self.card: dict[str, Any] = {"kind": "text", **loaded.card}

    @classmethod
    def load(cls, spec: EngineSpec, progress: Progress) -> TextService:
        return cls(load_engine(spec, progress))

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    @property
    def num_steps(self) -> int:
        return self._engine.num_steps

    @property
    def connections(self) -> Sequence[Connection]:
        followers = self._loaded.followers
        return () if followers is None else followers.connections

    def check(self) -> None:
        if self._loaded.followers is not None:
            self._loaded.followers.check()

    def add(self, message: Mapping[str, Any]) -> None:
        """Turn the messages of an add into a prompt and give it to the engine. EngineError with the field at fault."""
        try:
            sampling = SamplingParams.from_dict(message.get("sampling") or {})
        except (TypeError, ValueError) as error:
            # Its message begins with the field's name.
            raise InvalidRequest(str(error), param=str(error).partition(" ")[0]) from error
        try:
            kwargs = message.get("chat_template_kwargs") or {}
            prompt = self._loaded.prompts.encode_chat(message["messages"], **kwargs)
        except ChatTemplateError as error:
            raise InvalidRequest(str(error), param="messages") from error
        resume = message.get("resume") or {}
        self._engine.add(
            message["id"],
            prompt,
            sampling,
            cache_salt=message.get("cache_salt", ""),
            priority=message.get("priority", 0),
            matformer_slice=message.get("matformer_slice"),
            published={int(i): Published(tuple(told["token_ids"]), told["text"]) for i, told in resume.items()},
        )

    def cancel(self, request_id: str) -> bool:
        return self._engine.cancel(request_id)

    def step(self) -> StepOutput:
        return self._engine.step()

    def news(self, *errors: tuple[str, EngineError]) -> StepOutput:
        return StepOutput(errors=list(errors))

    def stats(self) -> dict[str, Any]:
        return self._engine.stats()
