"""Parameters of paths and queries: what a route does not know is refused; what ids look like, for the document."""

import re
from typing import Any

from fastapi import Path, Query, Request

from inferfleet.tasks.errors import FleetError, InvalidRequest


def path_id(pattern: str) -> Any:
    """An id in a path. The document names its form; the route itself answers 404 to any other."""
    return Path(json_schema_extra={"pattern": f"^{pattern}$"})


def query_id(pattern: str, description: str = "the last id of the page before") -> Any:
    """The same in a query."""
    return Query(description=description, json_schema_extra={"pattern": f"^{pattern}$"})


def check_after(after: str | None, pattern: re.Pattern[str], not_found: type[FleetError]) -> None:
    """Where a page begins. One that no id can be is not found, like any other that is not there."""
    if after is not None and not pattern.fullmatch(after):
        raise not_found(param="after")


def only_known_parameters(request: Request) -> None:
    """A misspelt filter must not silently show everything."""
    refuse_unknown(request)


def refuse_unknown(request: Request, besides: re.Pattern[str] | None = None) -> None:
    """Raises InvalidRequest. besides: names that the route does not declare and reads all the same."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known and not (besides and besides.fullmatch(name)):
            raise InvalidRequest(f"unknown query parameter {name[:100]!r}", param=name[:100])
