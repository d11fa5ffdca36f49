"""Finds a pipeline's folder; from the hub it comes in two steps: what says whether it can be served, then the rest."""

from __future__ import annotations

from pathlib import Path

from inferfleet.engine import hub
from inferfleet.engine.diffusion.components import read_components
from inferfleet.engine.diffusion.licence import read_licence
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import local_folder


def find_pipeline(spec: DiffusionSpec, progress: Progress) -> Path:
    """The local folder of a spec's path, or the whole snapshot of its hub id. Raises LoadError or a ModelError."""
    return local_folder(spec.path) or fetch_pipeline(spec.path, spec.revision, spec.accept_licence, progress)


def fetch_pipeline(repo: str, revision: str | None, accept_licence: str | None, progress: Progress) -> Path:
    """What cannot be served, or whose licence is not accepted, is refused before its weights are fetched."""
    folder = hub.fetch(repo, revision, hub.PIPELINE_CONFIG_FILES, progress)
    components = read_components(folder)
    read_licence(folder, guided=components.guided).refuse_unaccepted(accept_licence)
    # The commit that was looked at, should the branch move on meanwhile.
    return hub.fetch(repo, folder.name, (*hub.PIPELINE_CONFIG_FILES, *hub.PIPELINE_WEIGHT_FILES), progress)
