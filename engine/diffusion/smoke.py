"""The first picture of a loaded pipeline: one that cannot paint is refused before anybody waits for it.

It goes the way of every request, at the smallest size worth the name, for one step. What it shows does not matter.
"""

from __future__ import annotations

from inferfleet.engine.diffusion.engine import DiffusionEngine
from inferfleet.engine.diffusion.output import Picture
from inferfleet.engine.diffusion.params import ImageParams
from inferfleet.engine.errors import EngineError, LoadError

PROMPT = "a picture"
#: Pixels of a side, where the model's own size is not smaller.
SIDE = 64


def smoke(engine: DiffusionEngine) -> None:
    """LoadError when no picture comes out."""
    limits = engine.limits
    side = max(limits.multiple_of, min(limits.default_size, SIDE // limits.multiple_of * limits.multiple_of))
    params = ImageParams(prompt=PROMPT, seed=0, width=side, height=side, num_inference_steps=1)
    pictures: list[Picture] = []
    try:
        engine.add("smoke", params)
        while engine.has_work:
            out = engine.step()
            for _, error in out.errors:
                raise error
            pictures += [delta for delta in out.deltas if isinstance(delta, Picture)]
    except EngineError as error:
        raise LoadError(
            f"the smoke picture failed: {error}; these weights do not make a working model: fetch them again, or set"
            " another dtype"
        ) from error
    except Exception as error:
        raise LoadError(f"the smoke picture failed: {type(error).__name__}: {error}") from error
    if not pictures:
        raise LoadError("the smoke picture failed: no picture came")
