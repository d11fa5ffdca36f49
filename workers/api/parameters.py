"""Query parameters: what a route does not know is refused."""

from fastapi import Request

from inferfleet.tasks.errors import InvalidRequest


def only_known_parameters(request: Request) -> None:
    """A misspelt filter must not silently show everything."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(f"unknown query parameter {name[:100]!r}", param=name[:100])
