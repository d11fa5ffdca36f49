"""The engine without the fleet, for scripts, evaluation and tests.

llm = LLM("path/or/hub-id")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)

ImageGenerator("path/or/hub-id").generate("a red circle", seed=7).save("circle.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from inferfleet.engine.errors import InvalidRequest
from inferfleet.engine.loader import EngineSpec, load_engine
from inferfleet.engine.output import StepOutput
from inferfleet.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from inferfleet.engine.diffusion.offline import ImageGenerator

__all__ = ["LLM", "Completion", "ImageGenerator", "RequestOutput"]

#: A text, or {"prompt_token_ids": [...]}.
Prompt = str | Mapping[str, Sequence[int]]
Message = Mapping[str, Any]
#: The name of a MatFormer slice for all prompts, or one each; None = what the settings say.
Slices = str | Sequence[str | None] | None


@dataclass(slots=True)
class Completion:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    #: OpenAI's entries, one for each token, where sampling.logprobs asked for them.
    logprobs: list[dict[str, Any]] | None = None
    #: "stop" or "length".
    finish_reason: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its sampling.n answers."""

    #: The text that was given, or None for a prompt given as tokens or as messages.
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    #: Prompt tokens that came from the prefix cache.
    num_cached_tokens: int = 0


class LLM:
    """A loaded model that answers many prompts in one continuous batch.

    Settings are those of EngineSpec (device, dtype, quantization, max_model_len, paged_attn, block_size,
    kv_cache_tokens, max_num_seqs, max_num_batched_tokens, prefix_caching, tensor_parallel_size, revision). Raises
    LoadError or a ModelError.
    """

    def __init__(self, path: str, **settings: Any) -> None:
        self._loaded = load_engine(EngineSpec.from_dict({"path": str(path), **settings}))
        self.engine = self._loaded.engine
        self.tokenizer = self.engine.tokenizer
        self.card = self._loaded.card
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        matformer_slice: Slices = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts. One SamplingParams and one MatFormer slice for all, or one each.

        Without a seed the answers depend on how many requests this object has had before, and on nothing else.
        Raises InvalidRequest for a prompt that does not fit (nothing runs then), NumericalError for NaN logits.
        """
        given = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._run(
            [self._tokens(prompt) for prompt in given],
            [prompt if isinstance(prompt, str) else None for prompt in given],
            sampling_params,
            matformer_slice,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        matformer_slice: Slices = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation of OpenAI messages or a list of them. ChatTemplateError if refused."""
        one = not messages or isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if one else messages)
        prompts, kwargs = self._loaded.prompts, chat_template_kwargs or {}
        tokens = [prompts.encode_chat(conversation, **kwargs) for conversation in conversations]
        return self._run(tokens, [None] * len(tokens), sampling_params, matformer_slice)

    def score(self, prompt_token_ids: Sequence[int], *, matformer_slice: str | None = None) -> Tensor:
        """Float32 logits [T, V] after each of the T tokens, computed in the chunks that `generate` would use."""
        return self.engine.score(prompt_token_ids, matformer_slice=matformer_slice)

    def close(self) -> None:
        """End the other processes of a split model; the end of this object does it too."""
        if self._loaded.followers is not None:
            self._loaded.followers.close()

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._loaded.prompts.encode_text(prompt)
        if set(prompt) != {"prompt_token_ids"}:
            raise InvalidRequest('a prompt is a string or {"prompt_token_ids": [...]}', param="prompts")
        return list(prompt["prompt_token_ids"])

    def _run(
        self,
        prompts: list[list[int]],
        texts: list[str | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        slices: Slices,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise InvalidRequest(
                f"{len(sampling_params)} sampling_params for {len(prompts)} prompts", param="sampling_params"
            )
        if slices is None or isinstance(slices, str):
            slices = [slices] * len(prompts)
        if len(slices) != len(prompts):
            raise InvalidRequest(f"{len(slices)} slices for {len(prompts)} prompts", param="matformer_slice")
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, text, sampling, part in zip(prompts, texts, sampling_params, slices, strict=True):
                name = f"offline-{self._num_requests}"
                self.engine.add(name, prompt, sampling, matformer_slice=part)
                self._num_requests += 1
                answers = [Completion(index) for index in range(sampling.n)]
                outputs[name] = RequestOutput(text, prompt, answers)
            while self.engine.has_work:
                _collect(outputs, self.engine.step())
        except BaseException:
            for name in outputs:
                self.engine.cancel(name)
            self.engine.step()
            raise
        return list(outputs.values())


def __getattr__(name: str) -> Any:
    """ImageGenerator comes when somebody asks for it: language models shall not wait for what it imports."""
    if name != "ImageGenerator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from inferfleet.engine.diffusion.offline import ImageGenerator

    return ImageGenerator


def _collect(outputs: dict[str, RequestOutput], news: StepOutput) -> None:
    for _, error in news.errors:
        raise error
    for delta in news.deltas:
        answer = outputs[delta.id].outputs[delta.index]
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + delta.logprobs
    for name, usage in news.finished:
        outputs[name].num_cached_tokens = usage.cached_tokens
