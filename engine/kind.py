"""Which kind of model a worker's settings mean, a language model or an image pipeline, and the settings of that kind.

The folder decides: model_index.json makes it a pipeline. Settings that the other kind has are refused where they were
changed, so that nobody waits for what they would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from inferfleet.engine import hub
from inferfleet.engine.diffusion.components import is_pipeline
from inferfleet.engine.diffusion.fetching import fetch_pipeline
from inferfleet.engine.diffusion.spec import SHARED, DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.loader import EngineSpec
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import local_folder


def find_spec(values: Mapping[str, Any], progress: Progress) -> EngineSpec | DiffusionSpec:
    """The settings of a model, its files found: `path` of the result is a local folder with everything in it.

    values: a worker's ModelSpec; "image" holds what an image model alone has. Raises LoadError or a ModelError.
    """
    path, revision = values.get("path"), values.get("revision")
    if not isinstance(path, str):
        raise LoadError(f"path must be a folder or a hub id, not {path!r}", param="path")
    folder = local_folder(path)
    is_remote = folder is None
    if folder is None:
        progress.begin("find")
        folder = hub.download(path, revision, progress)
    here = {**values, "path": str(folder), "revision": None}
    if not is_pipeline(folder):
        return _text_spec(here)
    spec = _image_spec(here)
    if is_remote:
        fetch_pipeline(path, folder.name, spec.accept_licence, progress)
    return spec


def _text_spec(values: Mapping[str, Any]) -> EngineSpec:
    if values.get("image") is not None:
        raise LoadError("image is set, but this is a language model: the setting is for image models", param="image")
    return EngineSpec.from_dict({name: value for name, value in values.items() if name != "image"})


def _image_spec(values: Mapping[str, Any]) -> DiffusionSpec:
    usual = {field.name: field.default for field in fields(EngineSpec)}
    for name, value in values.items():
        if name not in (*SHARED, "image") and name in usual and value != usual[name]:
            raise LoadError(
                f"{name} is {value!r}, but this is an image model: the setting is for language models", param=name
            )
    image = {} if values.get("image") is None else values["image"]
    if not isinstance(image, Mapping):
        raise LoadError(f"image must be a table of settings, not {image!r}", param="image")
    twice = sorted(set(image) & set(SHARED))
    if twice:
        raise LoadError(f"{twice[0]} belongs to the model's settings, not to image", param=f"image.{twice[0]}")
    own = {name: value for name, value in values.items() if name != "image" and name not in set(usual) - set(SHARED)}
    return DiffusionSpec.from_dict({**own, **image})
