"""What schemathesis has to be told of this fleet: its models, and what time it is. Loaded by its command."""

import schemathesis

TEXT, IMAGE = "paper", "painter"
#: Unix seconds, in the year 2096.
LATER = 4_000_000_000


@schemathesis.hook
def map_body(context, body):
    """Most generated names are of no model, and a 404 proves little; what is no good name stays what it is."""
    if isinstance(body, dict):
        for values in (body, body.get("body")):
            if isinstance(values, dict) and isinstance(values.get("model"), str) and 0 < len(values["model"]) <= 256:
                values["model"] = IMAGE if "prompt" in values else TEXT
            if isinstance(values, dict) and type(values.get("deadline")) in (int, float) and values["deadline"] >= 0:
                values["deadline"] = max(values["deadline"], LATER)  # one that is over makes a rightful 504
    return body
