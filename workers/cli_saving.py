"""Where the command line puts pictures: file names, downloads that are checked, and files that are whole or absent."""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from inferfleet.tasks.errors import FleetError
from inferfleet.workers.cli_http import ApiClient
from inferfleet.workers.cli_output import out, print_json

#: A file name that means the standard output.
STDOUT = Path("-")
#: Endings of file names -> formats; the first of a format is the one that we give.
ENDINGS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class DamagedDownload(FleetError):
    """The picture that arrived is not the one that was made."""

    code = "damaged_download"


class CannotWrite(FleetError):
    """The file cannot be written."""

    code = "cannot_write"


@dataclass(frozen=True)
class Target:
    """What was given as -o: None = a file named after the job, STDOUT, or a file's name, numbered for several."""

    path: Path | None

    def check(self, count: int) -> None:
        """Complains now about what would fail after the work is done. Raises typer.BadParameter."""
        if self.path == STDOUT:
            if count > 1:
                raise typer.BadParameter(f"{count} pictures do not fit into one stream", param_hint="-o")
            return
        check_writable(self.path or Path("x"), "-o")

    def format(self) -> str | None:
        """The format that the file's ending stands for; None without a file or an ending. Raises BadParameter."""
        ending = "" if self.path in (None, STDOUT) else Path(str(self.path)).suffix.lower()
        if not ending:
            return None
        if ending not in ENDINGS:
            known = ", ".join(ENDINGS)
            raise typer.BadParameter(f"{ending} stands for no format ({known}): give --format too", param_hint="-o")
        return ENDINGS[ending]

    def file_for(self, job_id: str, output: dict[str, Any], count: int) -> Path:
        """out.png, or out-0.png and so on for several."""
        if self.path is None:
            known = (ending for ending, name in ENDINGS.items() if output["content_type"] == f"image/{name}")
            base = Path(Path(job_id).name + next(known, ""))  # whatever the server says, the file lies here
        else:
            base = self.path
        return base if count == 1 else base.with_name(f"{base.stem}-{output['index']}{base.suffix}")


def check_writable(path: Path, option: str) -> None:
    """Raises typer.BadParameter if no file can be written there."""
    folder = path.parent
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the name of a file", param_hint=option)
    if not os.access(folder, os.W_OK) and not path.exists():
        raise typer.BadParameter(f"{folder} cannot be written to", param_hint=option)


def refuse_mixed(target: Target, *, json: bool) -> None:
    """Raises typer.BadParameter."""
    if json and target.path == STDOUT:
        raise typer.BadParameter("JSON and a picture do not fit into one stream", param_hint="-o")


def finish(client: ApiClient, job: dict[str, Any], target: Target, index: int | None = None, *, json: bool) -> None:
    """Saves a completed job's pictures, or the one of that index, and says where they are."""
    job["outputs"] = [output for output in job["outputs"] if index in (None, output["index"])]
    for output, path in zip(job["outputs"], save_outputs(client, job, target), strict=True):
        if json:
            output["path"] = str(path)
        elif path != STDOUT:
            size = f"{output['width']}x{output['height']}"
            out.print(f"{path}  {size}  seed {output['seed']}", markup=False, soft_wrap=True)
    if json:
        print_json(job)


def save_outputs(client: ApiClient, job: dict[str, Any], target: Target) -> Iterator[Path]:
    """Downloads a job's pictures and yields where each was put.

    Raises DamagedDownload, CannotWrite and what the API answers.
    """
    for output in job["outputs"]:
        data = client.read(f"/v1/outputs/{output['id']}")
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if found != output["hash"]:
            raise DamagedDownload(f"{output['id']} arrived with {found}, but it was made with {output['hash']}")
        if target.path == STDOUT:
            _write_stdout(data)
            yield STDOUT
        else:
            path = target.file_for(job["id"], output, len(job["outputs"]))
            write_whole(path, data)
            yield path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is never half there, over what it was; a device or a pipe is written to directly.

    Raises CannotWrite.
    """
    write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """The same of what comes piece by piece; if that breaks off, the file stays as it was."""
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                file.writelines(pieces)
        else:
            _replace(Path(os.path.realpath(path)), pieces)
    except OSError as error:
        raise CannotWrite(f"{path}: {error.strerror or error}") from None


def _replace(path: Path, pieces: Iterable[bytes]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
            os.fchmod(file.fileno(), _mode_of(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _mode_of(path: Path) -> int:
    """The mode of the file that is replaced, else what a new file gets here."""
    if path.exists():
        return path.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _write_stdout(data: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
