"""How one request wants its tokens picked. Plain numbers, checked once; no torch, no tokenizer, no model.

Names and meanings are those of the OpenAI API, with vLLM's where OpenAI has none. The sampler trusts these
limits and checks nothing again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

MAX_TEMPERATURE = 2.0
#: Dividing by less could overflow float32; whoever asks for less is asking for greedy.
MIN_TEMPERATURE = 1e-5
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIAS_ENTRIES = 300
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 8
MAX_STOP_LENGTH = 64
MAX_STOP_TOKEN_IDS = 32
MAX_N = 8
MAX_SEED = 2**63 - 1
#: Token ids travel as int32 in places; no vocabulary comes near it.
MAX_TOKEN_ID = 2**31 - 1

_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Frozen and validated: a SamplingParams that exists is a valid one.

    Raises ValueError that begins with the field's name and says the limit.
    """

    #: 0 = greedy; below MIN_TEMPERATURE is taken as 0.
    temperature: float = 1.0
    #: 0 = all tokens.
    top_k: int = 0
    #: Smallest set of tokens whose probability reaches top_p; 1 = all.
    top_p: float = 1.0
    #: Drop tokens less likely than min_p times the likeliest; 0 = none.
    min_p: float = 0.0
    #: Divides positive and multiplies negative logits of every token in prompt or output; 1 = off.
    repetition_penalty: float = 1.0
    #: Subtracted once from tokens that were generated already.
    presence_penalty: float = 0.0
    #: Subtracted as often as the token was generated already.
    frequency_penalty: float = 0.0
    #: Token id -> added to its logit.
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    #: None = derived from the request id, so that a requeued request goes on as it began.
    seed: int | None = None
    #: None = no logprobs; k = the picked token's and the k likeliest (0 = the picked token's only).
    logprobs: int | None = None
    #: Strings that end the text; not part of it.
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    #: The model's own end tokens do not end the text.
    ignore_eos: bool = False
    #: Neither end tokens nor stop_token_ids are picked before so many tokens.
    min_tokens: int = 0
    #: None = as many as the context holds.
    max_tokens: int | None = None
    #: Independent answers to one prompt.
    n: int = 1

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _integer("top_k", self.top_k, 0, MAX_TOKEN_ID)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, MAX_PENALTY, low_open=True)
        _number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _optional_integer("seed", self.seed, 0, MAX_SEED)
        _optional_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _boolean("ignore_eos", self.ignore_eos)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKEN_ID)
        _optional_integer("max_tokens", self.max_tokens, 1, MAX_TOKEN_ID)
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens = {self.max_tokens}, not {self.min_tokens}")
        # The only fields that arrive as mutable containers: own copies, so that "frozen" is true.
        object.__setattr__(self, "logit_bias", MappingProxyType(_checked_bias(self.logit_bias)))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_ids(self.stop_token_ids))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles through `to_dict`: the read-only mapping inside can do neither."""
        return type(self).from_dict, (self.to_dict(),)

    @property
    def greedy(self) -> bool:
        """The likeliest token wins; temperature, top_k, top_p, min_p and seed change nothing."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def penalises(self) -> bool:
        """True when the logits depend on tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """From JSON values (logit_bias keys may be strings). ValueError for an unknown field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{unknown[0]} is not a sampling parameter")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields that differ from their defaults; `from_dict` restores an equal object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        values["stop"] = list(self.stop)
        values["stop_token_ids"] = list(self.stop_token_ids)
        defaults: dict[str, Any] = {"logit_bias": {}, "stop": [], "stop_token_ids": []} | {
            f.name: f.default for f in fields(self) if f.name not in ("logit_bias", "stop", "stop_token_ids")
        }
        return {name: value for name, value in values.items() if value != defaults[name]}


def _number(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value) or value > high or value < low or (low_open and value == low):
        border = "above" if low_open else "at least"
        raise ValueError(f"{name} must be {border} {low:g} and at most {high:g}, not {value!r}")


def _integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be at least {low} and at most {high}, not {value}")


def _optional_integer(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _boolean(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {type(value).__name__}")


def _checked_bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, not be a {type(bias).__name__}")
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise ValueError(f"logit_bias must have at most {MAX_LOGIT_BIAS_ENTRIES} entries, not {len(bias)}")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        token = _bias_token(key)
        if token in checked:
            raise ValueError(f"logit_bias names token {token} twice")
        _number(f"logit_bias[{token}]", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        checked[token] = float(value)
    return checked


def _bias_token(key: object) -> int:
    """JSON keys are strings; plain ASCII digits only, because int() also takes '1_0' and ' 1'."""
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10:
        key = int(key)
    if isinstance(key, bool) or not isinstance(key, int):
        raise ValueError(f"logit_bias keys must be token ids, not {key!r:.40}")
    _integer("logit_bias key", key, 0, MAX_TOKEN_ID)
    return key


def _checked_stop(stop: str | Iterable[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must have at most {MAX_STOP_STRINGS} strings, not {len(strings)}")
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"stop must hold strings, not {type(string).__name__}")
        if not 1 <= len(string) <= MAX_STOP_LENGTH:
            raise ValueError(f"stop strings must have 1 to {MAX_STOP_LENGTH} characters, not {len(string)}")
    return strings


def _checked_stop_ids(ids: Iterable[int]) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ValueError(f"stop_token_ids must be a list of token ids, not {type(ids).__name__}")
    checked = tuple(ids)
    if len(checked) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"stop_token_ids must have at most {MAX_STOP_TOKEN_IDS} entries, not {len(checked)}")
    for token in checked:
        _integer("stop_token_ids", token, 0, MAX_TOKEN_ID)
    return checked
