"""What the worker by hand makes of an image job: plain pictures, progress, previews, files in the store."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

from PIL import Image

from inferfleet.tasks import names
from inferfleet.tasks.contracts import ImageEditRequest, ImageRequest
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import Claim
from inferfleet.tasks.stores import RedisStore

CARD = {
    "kind": "image",
    "family": "flux",
    "architecture": "FluxPipeline",
    "guided": True,
    "licence": "paper-licence",
    "loras": ["ink", "wax"],
    "default_size": 64,
    "default_steps": 4,
    "max_sequence_length": 64,
    "max_pixels": 1024 * 1024,
    "max_side": 4096,
    "multiple_of": 16,
    "max_steps": 50,
}
SEED = 1000


def paint(
    ledger: Ledger, claim: Claim, asked: ImageRequest, *, until_cancelled: Callable[[Claim], None] | None = None
) -> None:
    """Carries a claimed image job to its end; with `until_cancelled` it stops after its first step."""
    steps, count = asked.num_inference_steps or 4, asked.n or 1
    for step in range(1, steps + 1):
        events: list[dict[str, Any]] = [{"type": names.PROGRESS, "step": step * count, "steps": steps * count}]
        if asked.preview_every and step % asked.preview_every == 0:
            events.append({"type": names.PREVIEW, "index": 0, "step": step, "content_type": "image/png",
                           "b64_json": base64.b64encode(picture(asked, 0, (8, 8))).decode()})  # fmt: skip
        ledger.publish(claim.job_id, claim.fence, events, f"{claim.fence}.{step}")
        if until_cancelled is not None:
            until_cancelled(claim)
            return
    outputs = [_stored(ledger, claim, asked, index) for index in range(count)]
    told = [{"type": names.OUTPUT, **output} for output in outputs]
    ledger.publish(claim.job_id, claim.fence, told, f"{claim.fence}.out")
    response = json.dumps(answer(claim, asked, outputs)).encode()
    ledger.complete(claim.job_id, claim.fence, state="completed", response=response, usage=usage(count),
                    outputs=outputs, keep=[output["id"] for output in outputs])  # fmt: skip


def picture(asked: ImageRequest, index: int, size: tuple[int, int] | None = None) -> bytes:
    """Of one colour, which the seed and the picture's number give; an edit takes its image's upper left pixel."""
    width, height = size or asked.sides or (CARD["default_size"],) * 2
    seed = seed_of(asked) + index
    colour = (seed % 256, index * 20, 100)
    if isinstance(asked, ImageEditRequest):
        with Image.open(io.BytesIO(asked.init_image)) as start:
            colour = start.convert("RGB").getpixel((0, 0))
    kept = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(kept, format=asked.output_format or "png")
    return kept.getvalue()


def seed_of(asked: ImageRequest) -> int:
    return SEED if asked.seed is None else asked.seed


def usage(count: int) -> dict[str, Any]:
    details = {"text_tokens": 5, "image_tokens": 0}
    return {"input_tokens": 5, "output_tokens": 16 * count, "total_tokens": 5 + 16 * count,
            "input_tokens_details": details}  # fmt: skip


def answer(claim: Claim, asked: ImageRequest, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer as a worker leaves it in the ledger: it holds no picture."""
    return {
        "created": claim.created_ms // 1000,
        "data": [{"index": output["index"], "seed": output["seed"]} for output in outputs],
        "size": f"{outputs[0]['width']}x{outputs[0]['height']}",
        "output_format": asked.output_format or "png",
        "response_format": asked.response_format or "url",
        "model": asked.model,
        "licence": CARD["licence"],
        "usage": usage(len(outputs)),
    }


def _stored(ledger: Ledger, claim: Claim, asked: ImageRequest, index: int) -> dict[str, Any]:
    data, kind = picture(asked, index), asked.output_format or "png"
    key = names.output_id(claim.job_id, claim.fence, index)
    stored = RedisStore(ledger, 600).put(key, data, f"image/{kind}")
    width, height = asked.sides or (CARD["default_size"],) * 2
    return {"id": key, "index": index, "content_type": stored.content_type, "size_bytes": stored.size_bytes,
            "hash": f"sha256:{stored.sha256}", "width": width, "height": height,
            "seed": seed_of(asked) + index}  # fmt: skip
