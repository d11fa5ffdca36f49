"""GET /v1/models: what the fleet serves."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from inferfleet.tasks.errors import ModelNotFound
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.openapi import GET_MODEL, LIST_MODELS
from inferfleet.workers.api.responses import json_response
from inferfleet.workers.api.services import Use

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", openapi_extra=LIST_MODELS)
async def list_models(tenant: Tenant, use: Use) -> Response:
    """The models that workers serve or settings name."""
    cards = await use.door.cards()
    return json_response({"object": "list", "data": [_shown(name, cards[name]) for name in sorted(cards)]})


@router.get("/v1/models/{model:path}", openapi_extra=GET_MODEL)
async def get_model(model: str, tenant: Tenant, use: Use) -> Response:
    """One model. Names may hold slashes, as hub ids do."""
    cards = await use.door.cards()
    if model not in cards:
        raise ModelNotFound(f"no worker serves the model {model[:100]!r}", param="model")
    return json_response(_shown(model, cards[model]))


def _shown(name: str, card: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's model object, then what the worker's card adds."""
    facts = {key: value for key, value in card.items() if key not in ("id", "state")}
    return {"id": name, "object": "model", "created": int(card.get("created", 0)), "owned_by": "inferfleet",
            "status": card.get("state", "ready"), **facts}  # fmt: skip
