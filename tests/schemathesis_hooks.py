"""What schemathesis has to be told of this fleet: the names of the models that it serves. Loaded by its command."""

import schemathesis

TEXT, IMAGE = "paper", "painter"


@schemathesis.hook
def map_body(context, body):
    """Most generated names are of no model, and a 404 proves little; what is no good name stays what it is."""
    if isinstance(body, dict):
        for values in (body, body.get("body")):
            if isinstance(values, dict) and isinstance(values.get("model"), str) and 0 < len(values["model"]) <= 256:
                values["model"] = IMAGE if "prompt" in values else TEXT
    return body
