"""`inferfleet login`: who you are on the model hub, for gated and private models. The token is never printed.

It is kept where every program that speaks to the hub looks for it: HF_TOKEN goes first, then the file of this login.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from inferfleet.tasks.errors import SetupError
from inferfleet.workers.cli_options import Json
from inferfleet.workers.cli_output import err, out, print_json

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class LoginFailed(SetupError):
    """The hub does not know this token."""

    code = "login_failed"


class NotLoggedIn(SetupError):
    """Nobody is logged in to the model hub."""

    code = "not_logged_in"


class HubUnreachable(SetupError):
    """The model hub cannot be reached."""

    code = "hub_unreachable"


def login(
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="TOKEN",
            help="An access token of the hub. Other users of this machine can see it in the list of processes: "
            "without it the token is read from standard input, or asked for without echo.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say who is logged in, and change nothing.")] = False,
    logout: Annotated[bool, typer.Option("--logout", help="Forget the token that is kept.")] = False,
    json: Json = False,
) -> None:
    """Log in to the model hub, for gated and private models. HF_TOKEN, where it is set, goes before this login."""
    if sum((token is not None, check, logout)) > 1:
        raise typer.BadParameter("give one of --token, --check and --logout", param_hint="--token")
    if logout:
        facts = _forget()
    elif check:
        facts = _who()
    else:
        facts = _log_in(token)
    print_json(facts) if json else _say(facts)


def _log_in(given: str | None) -> dict[str, Any]:
    """The token is kept only once the hub has said whose it is."""
    token = _clean(given if given is not None else _read_token())
    facts = {"user": _ask_hub(token), "kept_in": str(_token_file()), "logged_in": True}
    _keep(token)
    return facts | _overruled()


def _who() -> dict[str, Any]:
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise NotLoggedIn("nobody is logged in to the model hub")
    source = _variable() or str(_token_file())
    return {"user": _ask_hub(token), "kept_in": source, "logged_in": True}


def _forget() -> dict[str, Any]:
    path = _token_file()
    existed = path.exists()
    path.unlink(missing_ok=True)
    return {
        "user": None,
        "forgotten": str(path) if existed else None,
        "logged_in": _variable() is not None,
    } | _overruled()


def _say(facts: dict[str, Any]) -> None:
    if facts["user"] is not None:
        out.print(f"logged in as {facts['user']} ({facts['kept_in']})", markup=False, soft_wrap=True)
    else:
        gone = facts["forgotten"]
        out.print(f"logged out: {gone} is gone" if gone else "nobody was logged in", markup=False, soft_wrap=True)
    if name := facts.get("overruled_by"):
        err.print(f"{name} is set and goes before this login: unset it to use the token that is kept", markup=False)


def _read_token() -> str:
    """From a pipe, or from somebody at a terminal, who does not see it."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    answer: str = typer.prompt("Access token of the hub (it is not shown)", hide_input=True, err=True)
    return answer


def _clean(token: str) -> str:
    token = token.strip()
    if not token or not token.isascii() or any(c.isspace() or not c.isprintable() for c in token):
        raise LoginFailed("no token was given" if not token else "this is no token: it must be one word of ASCII")
    return token


def _ask_hub(token: str) -> str:
    """The user's name. Raises LoginFailed or HubUnreachable, neither with the token in it."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    where = constants.ENDPOINT
    try:
        return str(HfApi(endpoint=where).whoami(token=token)["name"])
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise LoginFailed(f"{where} does not know this token") from None
        raise HubUnreachable(f"{where} answered with status {status}; try again later") from None
    except (HTTPError, OSError, ValueError, KeyError) as error:
        raise HubUnreachable(f"{where} cannot be reached: {type(error).__name__}") from None


def _keep(token: str) -> None:
    """Written anew, so that nobody else could read it at any time."""
    path = _token_file()
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(token)
        fresh.replace(path)
    except OSError as error:
        raise SetupError(f"the token cannot be kept in {path}: {error.strerror or error}") from None


def _token_file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_TOKEN_PATH)


def _variable() -> str | None:
    """The variable that holds a token, which every program takes before the file."""
    return next((name for name in VARIABLES if os.environ.get(name, "").strip()), None)


def _overruled() -> dict[str, Any]:
    name = _variable()
    return {} if name is None else {"overruled_by": name}
