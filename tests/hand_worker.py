"""A worker without an engine: claims jobs from a real ledger and answers as the user's message says. For API tests.

    say A B C        the words as one delta each, then the end
    hold [words]     says the words, then runs until the job is cancelled
    fail CODE        fails with that error code
An image job obeys the same verbs in its prompt; any other prompt is painted. Jobs wait while `paused` is set.
"""

import json
import threading
import uuid
from typing import Any

from hand_painter import CARD as PAINTER
from hand_painter import paint

from inferfleet.tasks import errors
from inferfleet.tasks.contracts import ChatCompletionRequest, JobRequest, ResponseRequest
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import Claim
from inferfleet.tasks.response_object import response_object, usage_object

CARD = {
    "kind": "text",
    "max_model_len": 4096,
    "vocab_size": 1000,
    "max_token_bytes": 8,
    "family": "paper",
    "matformer_slices": [],
}
CARDS = {"paper": CARD, "flux": PAINTER}


class HandWorker(threading.Thread):
    """`ring` is what the API calls; every ring carries jobs until none waits."""

    def __init__(self, redis_url: str, namespace: str, models: tuple[str, ...] = ("paper",)) -> None:
        super().__init__(daemon=True)
        self.ledger = Ledger.from_url(redis_url, namespace)
        self.models = models
        self.paused = False
        self.cancelled: list[str] = []
        self.cancel_seen = threading.Event()
        self._rung = threading.Semaphore(0)
        self._stopping = False
        self._carriers: list[threading.Thread] = []
        self.renew()

    def renew(self) -> None:
        """As new: serving, nothing cancelled."""
        self.paused = False
        self.cancelled.clear()
        self.cancel_seen.clear()
        for model in self.models:
            self.ledger.put_card(model, CARDS[model] | {"id": model, "state": "ready"}, "hand", 600)

    def ring(self, model: str, times: int) -> None:
        if times:
            self._rung.release(times)

    def stop(self) -> None:
        self._stopping = True
        self._rung.release()
        self.join()
        for carrier in self._carriers:
            carrier.join()
        self.ledger.close()

    def run(self) -> None:
        while True:
            self._rung.acquire()
            if self._stopping:
                return
            for model in self.models:
                while not self.paused and (claim := self._claim(model)) is not None:
                    carrier = threading.Thread(target=self._carry, args=(claim,), daemon=True)
                    self._carriers.append(carrier)
                    carrier.start()

    def _claim(self, model: str) -> Claim | None:
        return self.ledger.claim(model, worker="hand", token=uuid.uuid4().hex, lease_ms=60_000)

    def _carry(self, claim: Claim) -> None:
        job = JobRequest.model_validate_json(claim.envelope)
        chat = self._chat_of(job)
        verb, *words = (job.body.prompt if chat is None else str(chat.messages[-1].content)).split(" ")
        if verb == "fail":
            error = errors.BY_CODE[words[0]]("it broke").to_dict()
            self.ledger.complete(claim.job_id, claim.fence, state="failed", error=error)
            return
        if chat is None:
            paint(self.ledger, claim, job.body, until_cancelled=self._wait_for_cancel if verb == "hold" else None)
            return
        choices = range(chat.n or 1)
        for number, word in enumerate(words):
            last = verb == "say" and number == len(words) - 1
            events = [self._delta(chat, index, word, number, last) for index in choices]
            self.ledger.publish(claim.job_id, claim.fence, events, f"{claim.fence}.{number}")
        if verb == "hold":
            self._wait_for_cancel(claim)
            return
        text, usage = " ".join(words), self._usage(len(words))
        if isinstance(job.body, ResponseRequest):
            self._respond(claim, job.body, text, len(words))
            return
        body = json.dumps(self._completion(claim, chat, text, len(words))).encode()
        self.ledger.complete(claim.job_id, claim.fence, state="completed", response=body, usage=usage)

    @staticmethod
    def _chat_of(job: JobRequest) -> ChatCompletionRequest | None:
        """None for an image job."""
        if isinstance(job.body, ResponseRequest):
            return job.body.chat()
        return job.body if isinstance(job.body, ChatCompletionRequest) else None

    def _respond(self, claim: Claim, asked: ResponseRequest, text: str, tokens: int) -> None:
        """An answer of as many tokens as were allowed counts as cut."""
        status = "incomplete" if tokens == asked.max_output_tokens else "completed"
        usage, created = usage_object(3, 0, tokens), claim.created_ms // 1000
        made = response_object(asked, claim.job_id, created, status, text=text, usage=usage, completed_at=created)
        body = json.dumps(made).encode()
        self.ledger.complete(claim.job_id, claim.fence, state=status, response=body, usage=usage)

    def _wait_for_cancel(self, claim: Claim) -> None:
        pause = threading.Event()
        while not self._stopping:
            if self.ledger.beat("hand", [(claim.job_id, claim.fence)], 60_000)[claim.job_id] != "ok":
                self.ledger.complete(claim.job_id, claim.fence, state="cancelled", usage=self._usage(1))
                self.cancelled.append(claim.job_id)
                self.cancel_seen.set()
                return
            pause.wait(0.02)

    def _delta(self, chat: ChatCompletionRequest, index: int, word: str, number: int, last: bool) -> dict[str, Any]:
        text = word if number == 0 else f" {word}"
        return {
            "type": "response.output_text.delta",
            "index": index,
            "delta": text,
            "token_ids": [number],
            "logprobs": [self._logprob(text)] if chat.logprobs else None,
            "finish_reason": "stop" if last else None,
        }

    @staticmethod
    def _logprob(text: str) -> dict[str, Any]:
        alternative = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
        return {**alternative, "top_logprobs": [alternative]}

    @staticmethod
    def _usage(tokens: int) -> dict[str, Any]:
        return {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}

    def _completion(self, claim: Claim, chat: ChatCompletionRequest, text: str, tokens: int) -> dict[str, Any]:
        words = [f" {word}" if number else word for number, word in enumerate(text.split(" "))]
        logprobs = {"content": [self._logprob(word) for word in words], "refusal": None} if chat.logprobs else None
        choice = {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}
        return {
            "id": f"chatcmpl-{claim.job_id.removeprefix('job_')}",
            "object": "chat.completion",
            "created": claim.created_ms // 1000,
            "model": chat.model,
            "choices": [{"index": index, **choice, "finish_reason": "stop"} for index in range(chat.n or 1)],
            "usage": self._usage(tokens),
        }
