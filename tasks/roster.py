"""Calls about who is here and who may ask: workers, cards of served models, API keys, signed urls. Knows no jobs."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from inferfleet.tasks.call import Call, Key, Steps, text, to_json

#: What a worker says about a model it serves: id, max_model_len, vocab_size, max_token_bytes, family, state, ...
Card = dict[str, Any]
SECRET_BYTES = 32


def put_worker(worker: str, info: Mapping[str, Any], ttl_seconds: float) -> Call[None]:
    """Say that a worker lives for ttl_seconds more. Zero takes it off the list."""
    return Call("announce", ("worker", worker, to_json(info), round(ttl_seconds * 1000)), ignore)


def workers() -> Call[dict[str, dict[str, Any]]]:
    """The workers that said so lately: name -> info."""
    return Call("present", ("worker", ""), bodies)


def put_role(role: str, name: str, info: Mapping[str, Any], ttl_seconds: float) -> Call[None]:
    """Say that a process of a role beside workers (batches, webhooks) lives for ttl_seconds more. Zero: it ends."""
    return Call("announce", (f"role:{role}", name, to_json(info), round(ttl_seconds * 1000)), ignore)


def roles(role: str) -> Call[dict[str, dict[str, Any]]]:
    """The processes of a role that said so lately: name -> info."""
    return Call("present", (f"role:{role}", ""), bodies)


def put_neighbour(machine: str, worker: str, info: Mapping[str, Any], ttl_seconds: float) -> Call[None]:
    """Say that a worker lives on a machine for ttl_seconds more. Zero takes it off."""
    return Call("announce", (f"machine:{machine}", worker, to_json(info), round(ttl_seconds * 1000)), ignore)


def neighbours(machine: str) -> Call[dict[str, dict[str, Any]]]:
    """The workers that said so of a machine: name -> info."""
    return Call("present", (f"machine:{machine}", ""), bodies)


def put_card(model: str, card: Mapping[str, Any], worker: str, ttl_seconds: float) -> Call[None]:
    """Publish the card of a model that a worker serves, for ttl_seconds. Zero takes it back."""
    return Call("announce", ("model", f"{model}\n{worker}", to_json(card), round(ttl_seconds * 1000)), ignore)


def cards() -> Call[dict[str, Card]]:
    """One card a served model: a ready worker's before one that still loads, then the latest. A model whose workers
    fell silent is remembered for ten minutes as "unserved": while Redis is away none of them can say that it lives.
    """

    def parse(answer: list[bytes]) -> dict[str, Card]:
        best: dict[str, Card] = {}
        for name, card in bodies(answer).items():
            model = name.partition("\n")[0]
            if model not in best or card.get("state") == "ready" or best[model].get("state") != "ready":
                best[model] = card
        return best

    return Call("present", ("model", "1"), parse)


def bodies(answer: list[bytes]) -> dict[str, dict[str, Any]]:
    return {text(name): json.loads(body) for name, body in zip(answer[::2], answer[1::2], strict=True)}


def ignore(answer: Any) -> None:
    return None


def stats() -> Call[dict[str, dict[str, Any]]]:
    """model -> waiting, running (jobs), oldest_age_s (of those that wait; 0 when none does)."""

    def parse(answer: list[Any]) -> dict[str, dict[str, Any]]:
        now = int(answer[0])
        return {
            text(model): {
                "waiting": waiting,
                "running": running,
                "oldest_age_s": max(0, now - int(oldest)) / 1000 if oldest else 0.0,
            }
            for model, waiting, running, oldest in answer[1:]
        }

    return Call("stats", (), parse)


def note_server() -> Call[bool]:
    """Note which Redis server keeps the ledger: True, once, where it took over from one that may have known more."""
    return Call("server", (), lambda answer: answer == b"failover")


def failovers() -> Call[int]:
    """How often a server took over, as far as anybody noted."""
    return Call("", ("HGET", Key("server"), "failovers"), lambda answer: int(answer or 0))


def put_tenants(limits: Mapping[str, Mapping[str, Any]]) -> Call[int]:
    """Replace the weights and quotas of all tenants: name ("*" = whoever is not named) -> settings.TenantSettings."""
    return Call("tenants", [part for name, values in limits.items() for part in (name, to_json(values))], int)


def put_key(sha256: str, tenant: str, name: str) -> Call[None]:
    """Let whoever shows the key with this digest act for a tenant. The key itself is never stored."""
    return Call("", ("HSET", Key("keys"), sha256, to_json({"tenant": tenant, "name": name})), ignore)


def find_key(sha256: str) -> Call[dict[str, str] | None]:
    """{"tenant", "name"} of a key's digest, or None."""
    return Call("", ("HGET", Key("keys"), sha256), lambda answer: json.loads(answer) if answer else None)


def list_keys() -> Call[dict[str, dict[str, str]]]:
    """digest -> {"tenant", "name"}."""

    def parse(answer: Any) -> dict[str, dict[str, str]]:
        pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
        return {text(digest): json.loads(body) for digest, body in pairs}

    return Call("", ("HGETALL", Key("keys")), parse)


def delete_key(sha256: str) -> Call[None]:
    """Refuse this key from now on. A key that is not there is no error."""
    return Call("", ("HDEL", Key("keys"), sha256), ignore)


def signing_secret() -> Steps[bytes]:
    """What this namespace's urls are signed with: 32 random bytes, made by whoever asks first.

    Kept nowhere but in Redis, so that every API process knows the same one and losing the pictures loses it too.
    """
    found = yield Call("", ("GET", Key("signing")), kept)
    if found is None:
        yield Call("", ("SET", Key("signing"), secrets.token_bytes(SECRET_BYTES), "NX"), ignore)
        found = yield Call("", ("GET", Key("signing")), kept)
    return bytes(found)


def kept(answer: bytes | None) -> bytes | None:
    return answer
