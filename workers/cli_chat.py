"""`inferfleet chat`: one question, a pipe, or a conversation; the answer streams to the terminal."""

import sys
from typing import Annotated, Any

import typer

from inferfleet.tasks.errors import FleetError
from inferfleet.workers.cli_http import ApiClient
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, api_client, complete_models, pick_model
from inferfleet.workers.cli_output import err, print_error, print_json


def chat(
    question: Annotated[
        str | None, typer.Argument(help="What to ask. Without it: stdin if piped, else a conversation.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Which model answers.", autocompletion=complete_models)
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message put first.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 up to 1.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    matformer_slice: Annotated[str | None, typer.Option(help="Which slice of a MatFormer answers.")] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Ask a model. The answer streams as it is written; Ctrl-C stops it and cancels the job."""
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    options["matformer_slice"] = matformer_slice
    messages = [{"role": "system", "content": system}] if system else []
    prompt = _prompt(question)
    if prompt is None and json:
        raise typer.BadParameter("a conversation cannot be printed as JSON: give a question", param_hint="--json")
    with api_client(api_url, api_key) as client:
        body: dict[str, Any] = {"model": pick_model(client, model, kind="text")}
        body |= {name: value for name, value in options.items() if value is not None}
        if prompt is None:
            _converse(client, body, messages)
            return
        body["messages"] = [*messages, {"role": "user", "content": prompt}]
        if json:
            print_json(client.request("POST", "/v1/chat/completions", body=body))
        else:
            _stream(client, body)


def _prompt(question: str | None) -> str | None:
    """The question, the piped text, or both; None when a person sits at a terminal and gave none."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    parts = [part for part in (question, piped) if part]
    return "\n\n".join(parts) if parts else (None if sys.stdin and sys.stdin.isatty() else _no_prompt())


def _no_prompt() -> str:
    raise typer.BadParameter("give a question, pipe one in, or run it in a terminal", param_hint="QUESTION")


def _stream(client: ApiClient, body: dict[str, Any]) -> str:
    """Prints the answer as it comes and returns the whole of it."""
    text: list[str] = []
    for chunk in client.stream("POST", "/v1/chat/completions", body={**body, "stream": True}):
        for choice in chunk.get("choices", []):
            part = choice["delta"].get("content") or ""
            text.append(part)
            sys.stdout.write(part)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(text)


def _converse(client: ApiClient, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Questions and answers until Ctrl-D; Ctrl-C stops the answer that is being written."""
    err.print(f"[dim]{body['model']} · Ctrl-C stops an answer, Ctrl-D ends[/]")
    while (question := _ask()) is not None:
        if not question:
            continue
        turn = [*messages, {"role": "user", "content": question}]
        try:
            answer = _stream(client, {**body, "messages": turn})
        except KeyboardInterrupt:
            err.print("\n[dim]stopped[/]")
            continue
        except FleetError as error:
            print_error(error)
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        return None
