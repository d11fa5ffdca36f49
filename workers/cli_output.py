"""How the command line prints: tables or JSON on stdout, one error in three lines on stderr, and exit codes."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inferfleet.tasks.errors import FleetError

#: 2 is a wrong command line (typer's own), 130 a Ctrl-C.
EXIT_ERROR = 1
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_JOB = 5

EXIT_CODES = {
    "api_unreachable": EXIT_UNREACHABLE,
    "ledger_unavailable": EXIT_UNREACHABLE,
    "hub_unreachable": EXIT_UNREACHABLE,
    "job_not_found": EXIT_NOT_FOUND,
    "output_not_found": EXIT_NOT_FOUND,
    "model_not_found": EXIT_NOT_FOUND,
    "batch_not_found": EXIT_NOT_FOUND,
    "file_not_found": EXIT_NOT_FOUND,
    "webhook_endpoint_not_found": EXIT_NOT_FOUND,
    "webhook_delivery_not_found": EXIT_NOT_FOUND,
}

#: What to try next, by error code.
HINTS = {
    "api_unreachable": "start it with `inferfleet up`, or point at it with --api-url or INFERFLEET_API_URL",
    "ledger_unavailable": "check that Redis runs and INFERFLEET_REDIS_URL is right; `inferfleet up` brings its own",
    "job_not_found": "list what is there with `inferfleet jobs list`",
    "output_not_found": "see what the job made with `inferfleet jobs show ID`",
    "damaged_download": "fetch it again with `inferfleet jobs output ID`; if it stays so, the store is damaged",
    "not_terminal": "wait for its end with `inferfleet jobs wait ID`",
    "model_not_found": "list what is served with `inferfleet models`",
    "batch_not_found": "list what is there with `inferfleet batch list`",
    "batch_state": "see how it stands with `inferfleet batch show ID`",
    "other_batch": "finish that one with its own options, or remove the file named above to start anew",
    "file_not_found": "list what is there with `inferfleet files list`",
    "file_in_use": "wait for the end of the batch that reads it, or cancel it with `inferfleet batch cancel ID`",
    "webhook_endpoint_not_found": "list what is there with `inferfleet endpoints list`",
    "webhook_endpoint_disabled": "enable it with `inferfleet endpoints update ID --enable`",
    "webhook_delivery_not_found": "list what is there with `inferfleet deliveries list`",
    "too_many_webhook_endpoints": "delete one with `inferfleet endpoints delete ID`",
    "webhook_receiver_failed": "see what it answered with `inferfleet deliveries list`",
    "no_webhook_worker": "start one with `inferfleet webhooks`; `inferfleet up` brings its own",
    "unauthorized": "pass --api-key or set INFERFLEET_API_KEY; make a key with `inferfleet keys create`",
    "queue_full": "wait a little, or raise max_queued",
    "already_terminal": "see its outcome with `inferfleet jobs show ID`",
    "redis_misconfigured": "fix the setting named above in redis.conf, or let `inferfleet up` run its own Redis",
    "login_failed": "make an access token on the settings page of your account on the hub, and paste the whole of it",
    "not_logged_in": "log in with `inferfleet login`, or set HF_TOKEN",
    "hub_unreachable": "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; models in a local folder need no hub",
    "plan_failed": "check the path and the options; a gated model needs `inferfleet login` first",
    "settings_error": "see inferfleet.toml and the INFERFLEET_* environment variables",
}

PIPE_WIDTH = 400

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout, indented for a person, complete for a program."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table; cells are shown as they are, never read as markup."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    _print(table)


def print_page(
    page: Mapping[str, Any], columns: Sequence[str], row: Callable[[Any], Sequence[str]], *, json: bool
) -> None:
    """A page of a list, and where the next one starts."""
    if json:
        print_json(page)
        return
    print_table(columns, [row(each) for each in page["data"]])
    if page.get("has_more"):
        out.print(f"[dim]more: --after {page['last_id']}[/]")


def in_numbers(count: int) -> str:
    """A count of weights for a person: `11.90 billion numbers`."""
    size, unit = (1e9, "billion") if count >= 1e9 else (1e6, "million") if count >= 1e6 else (1e3, "thousand")
    return f"{count / size:.2f} {unit} numbers"


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and what there is to say of each; on a narrow terminal that goes on in further lines."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts:
        table.add_row(escape(name), escape(fact))
    _print(table)


def print_error(error: FleetError) -> None:
    """What went wrong, why, and what to try."""
    first, _, rest = error.message.partition("\n")
    err.print(f"[bold red]error:[/] {escape(first)}")
    if rest:
        err.print(escape(rest))
    why = f"{error.code} ({error.param})" if error.param else error.code
    err.print(f"  [dim]why:[/] {escape(why)}")
    if hint := HINTS.get(error.code):
        err.print(f"  [dim]try:[/] {escape(hint)}")


def exit_code(error: FleetError) -> int:
    """The process's exit code for an error."""
    return EXIT_CODES.get(error.code, EXIT_ERROR)


def age(unix_seconds: float | None) -> str:
    """`12s`, `3m`, `5h`, `2d` since then; `-` for never."""
    if unix_seconds is None:
        return "-"
    seconds = max(0, int(time.time() - unix_seconds))
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86400}d"


def clock(unix_seconds: float) -> str:
    """That moment, in this machine's time."""
    return datetime.fromtimestamp(unix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _print(table: Table) -> None:
    # A pipe has no width, but rich gives it one: what is cut or folded there is lost to grep and awk.
    (out if out.is_terminal else Console(file=out.file, highlight=False, width=PIPE_WIDTH)).print(table)
