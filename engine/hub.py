"""Fetches a model from the Hugging Face hub: its files, or its headers alone. Each refusal says what to do about it.

It knows repositories and logins, not models. Only names listed here are ever fetched, so no code and no pickle is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inferfleet.engine.foreign import foreign_weights
from inferfleet.engine.headers import StoredWeights
from inferfleet.engine.model_errors import LoginNeeded, ModelUnavailable, TermsNotAccepted, UnsupportedModel
from inferfleet.engine.progress import Progress

#: What a text model needs of a hub repository; pictures, other frameworks' weights and code stay there.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
#: Says that the repository is an image pipeline, whose files lie in folders of their own.
PIPELINE_INDEX = "model_index.json"
#: What says how large a model is.
CONFIG_FILES = ("config.json", "generation_config.json", PIPELINE_INDEX)
#: What of an image pipeline says whether it can be served: kilobytes, the licence's tag among them, and tokenizers.
PIPELINE_CONFIG_FILES = (
    PIPELINE_INDEX,
    "README.md",
    "LICENSE.md",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors.index.json",
)
#: Its weights. The same weights in the authors' own layout, at the repository's root, stay there.
PIPELINE_WEIGHT_FILES = (
    "text_encoder/model.safetensors",
    "text_encoder/model-*.safetensors",
    "text_encoder_2/model.safetensors",
    "text_encoder_2/model-*.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model-*.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model-*.safetensors",
)
#: What a LoRA adapter is called where its author gave it no name.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
#: owner/name, or owner/name/file.safetensors.
ADAPTER = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-][\w./-]*\.safetensors)?")
LOGIN = "run `inferfleet login`, or set HF_TOKEN"


def download(repo: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of a repository's snapshot, with all of a text model, or with PIPELINE_INDEX alone of a pipeline.

    Raises a ModelError.
    """
    folder = fetch(repo, revision, (*HUB_FILES, PIPELINE_INDEX), progress)
    if not any(folder.glob("*.safetensors")) and not (folder / PIPELINE_INDEX).is_file():
        _refuse_without_weights(repo, folder.name)
    return folder


def is_adapter(source: str) -> bool:
    """Whether it is written as a hub id, with or without one of the repository's safetensors files behind it."""
    return ADAPTER.fullmatch(source) is not None and ".." not in source


def download_adapter(source: str, progress: Progress | None = None) -> Path:
    """The file of `owner/name/file.safetensors`, or the folder of `owner/name` with what a LoRA adapter consists of.

    Fetched unless it is there. Raises a ModelError.
    """
    owner, name, *inside = source.split("/", 2)
    repo = f"{owner}/{name}"
    if inside:
        path = fetch(repo, None, inside, progress) / inside[0]
        if not path.is_file():
            raise ModelUnavailable(f"{repo} has no file {inside[0]}")
        return path
    folder = fetch(repo, None, ADAPTER_FILES, progress)
    if any(folder.glob("*.safetensors")):
        return folder
    # Such repositories may hold a file for every thousand steps of the training: only an only one is fetched.
    names = _names_in(repo, folder.name)
    found = [file for file in names if file.endswith(".safetensors") and "/" not in file]
    if len(found) > 1:
        raise UnsupportedModel(f"{repo} holds {len(found)} safetensors files; name one, as in {repo}/{found[0]}")
    if not found:
        why = foreign_weights(names)
        raise UnsupportedModel(f"{repo} holds no safetensors" + (f" ({why})" if why else ""))
    return fetch(repo, folder.name, found, progress) / found[0]


def _names_in(repo: str, commit: str) -> list[str]:
    from huggingface_hub import list_repo_files

    with explained(repo, commit):
        return list_repo_files(repo, revision=commit)


def download_config(repo: str, revision: str | None = None) -> Path:
    """The snapshot's folder with the configuration alone, unless more of it is there already. Raises a ModelError."""
    return fetch(repo, revision, CONFIG_FILES)


def fetch(repo: str, revision: str | None, files: Iterable[str], progress: Progress | None = None) -> Path:
    """The folder of a repository's snapshot with those of its files that match, fetched unless they are there.

    Raises a ModelError.
    """
    # Imported here: a model in a local folder needs no HTTP client in its process.
    from huggingface_hub import snapshot_download

    with explained(repo, revision):
        bar = _bar(progress or Progress())
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files), tqdm_class=bar))


def stored_weights(repo: str, revision: str | None = None) -> StoredWeights:
    """What the headers of a repository's safetensors say; a few kilobytes of each file are fetched.

    Raises ModelUnavailable, or UnsupportedModel for a repository without safetensors.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    with explained(repo, revision), _undamaged(repo):
        try:
            files = get_safetensors_metadata(repo, revision=revision).files_metadata.values()
        except NotASafetensorsRepoError:
            _refuse_without_weights(repo, revision or "main")
            raise UnsupportedModel(f"{repo} holds no safetensors") from None
    return _summed(files)


def stored_files(repo: str, revision: str | None, names: Iterable[str]) -> StoredWeights:
    """As `stored_weights`, of these safetensors of the repository alone."""
    from huggingface_hub import parse_safetensors_file_metadata

    with explained(repo, revision), _undamaged(repo):
        return _summed([parse_safetensors_file_metadata(repo, name, revision=revision) for name in names])


@contextmanager
def _undamaged(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        yield
    except SafetensorsParsingError as error:
        raise ModelUnavailable(f"{repo} holds a damaged safetensors file: {_first_line(error)}") from error


def _summed(files: Iterable[Any]) -> StoredWeights:
    """files: their headers as the hub's client reads them."""
    stored = StoredWeights()
    for tensor in (tensor for file in files for tensor in file.tensors.values()):
        stored.add(tensor.dtype, tensor.shape, tensor.data_offsets[1] - tensor.data_offsets[0])
    return stored


def _refuse_without_weights(repo: str, commit: str) -> None:
    """What other formats a repository without safetensors has; nothing where the hub does not say."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repo, revision=commit)
    except (OSError, ValueError):
        return
    raise UnsupportedModel(f"{repo} holds no safetensors" + (f" ({why})" if (why := foreign_weights(names)) else ""))


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises inside into a ModelUnavailable that says what to do."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        XetDownloadError,
    )

    named = f"{repo} at revision {revision}" if revision else repo
    try:
        yield
    except GatedRepoError as error:  # before its parent RepositoryNotFoundError: the remedy is another one
        raise _gated(repo, error.response.status_code, error.server_message) from error
    except RevisionNotFoundError as error:
        raise ModelUnavailable(f"{repo} has no revision {revision or 'main'}") from error
    except RepositoryNotFoundError as error:
        raise _unknown(repo) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(named, repo, revision, error) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise LoginNeeded(f"the hub does not know your token, so it does not show {repo}: {LOGIN}") from error
        raise ModelUnavailable(f"{named} could not be fetched from the hub: {_first_line(error)}") from error
    except (HTTPError, XetDownloadError, OSError, ValueError) as error:
        raise ModelUnavailable(f"{named} could not be fetched from the hub: {_first_line(error)}") from error


def _gated(repo: str, status: int, said: str | None) -> ModelUnavailable:
    """Nobody is logged in, or somebody who has not been let in: the hub's two reasons need two remedies."""
    from huggingface_hub import constants, get_token

    page = f"{constants.ENDPOINT}/{repo}"
    if get_token() is None:
        return LoginNeeded(f"{repo} is gated and you are not logged in: {LOGIN}; its terms are on {page}")
    if status == 401:
        return LoginNeeded(f"{repo} is gated and the hub does not know your token: {LOGIN}")
    words = f" (the hub says: {said})" if said else ""
    return TermsNotAccepted(
        f"{repo} is gated and your login may not read it: accept the terms on {page}, or log in as somebody who has,"
        f" with `inferfleet login`{words}"
    )


def _unknown(repo: str) -> ModelUnavailable:
    from huggingface_hub import get_token

    if get_token() is None:
        return LoginNeeded(f"the hub shows nobody a repository {repo}; if it is private, {LOGIN}")
    return ModelUnavailable(f"the hub has no repository {repo} that your login may see; check its name and your token")


def _unreachable(named: str, repo: str, revision: str | None, error: Exception) -> ModelUnavailable:
    from huggingface_hub.errors import HfHubHTTPError

    # The client tries the local cache first in the end, and reports that; what the hub said is the cause.
    why = (
        f"the hub answered {_first_line(error.__cause__)}"
        if isinstance(error.__cause__, HfHubHTTPError)
        else ("the hub cannot be reached")
    )
    at = f" --revision {revision}" if revision else ""
    return ModelUnavailable(
        f"{named} is not in the local cache and {why}; on a connected machine run `hf download {repo}{at}`"
    )


def _first_line(error: BaseException) -> str:
    """An error of the client without its advice and addresses of requests."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _bar(progress: Progress) -> type[Any]:
    """A class that stands in for the progress bars of the hub's client, and draws none."""
    furthest = 0
    lock = threading.Lock()

    class Bar:
        """The client keeps one of these for each measure (files, bytes received, bytes written) and sets `total`."""

        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, unit: str = "", **__: Any) -> None:
            self.total, self.n, self._in_bytes = total, initial, unit == "B"
            self.format_dict: dict[str, Any] = {}

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            with lock:
                self.n += n or 0
                # Bytes received and bytes written run side by side; whichever is ahead counts.
                if not self._in_bytes or not self.total or self.n <= furthest:
                    return
                if not furthest:
                    progress.begin("download", int(self.total))
                furthest = int(self.n)
                progress.at(furthest, int(self.total))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing was opened."""

        def nothing(self, *_: Any, **__: Any) -> None:
            """What is only about drawing."""

        refresh = close = clear = nothing
        set_description = set_description_str = set_postfix = set_postfix_str = nothing

    return Bar
