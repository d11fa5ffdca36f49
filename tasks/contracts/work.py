"""How much work a body asks for, before anybody has done it: for fair turns and for quotas. Knows no model.

An estimate that is made in microseconds: what a model makes of a text is known only to its tokenizer.
"""

from inferfleet.tasks.contracts.chat import ChatCompletionRequest
from inferfleet.tasks.contracts.images import ImageRequest
from inferfleet.tasks.contracts.responses import ResponseRequest
from inferfleet.tasks.records import Work

CHARS_PER_TOKEN = 4
#: Of an answer without max_tokens.
ANSWER_TOKENS = 512
#: Of a picture without a size or a number of steps.
SIDE, STEPS = 1024, 28
#: Pixels of one latent token of FLUX.
PIXELS_PER_TOKEN = 16 * 16
#: Jobs that begin with the same text are worth running one after the other, for the prefix cache.
PREFIX_CHARS = 1024


def work_of(body: ChatCompletionRequest | ResponseRequest | ImageRequest) -> Work:
    """Tokens as they would be counted in `usage`, what the job costs beside others of its model, and what it shares
    with others: the beginning of a dialogue, the adapters or the prompt of a picture."""
    if isinstance(body, ImageRequest):
        return picture_work(body)
    if isinstance(body, ResponseRequest):
        body = body.chat()
    texts = [message.text for message in body.messages]
    answer = (body.n or 1) * (body.token_limit or ANSWER_TOKENS)
    tokens = sum(map(len, texts)) // CHARS_PER_TOKEN + answer
    return Work(tokens=tokens, cost=tokens, affinity=texts[0][:PREFIX_CHARS])


def picture_work(body: ImageRequest) -> Work:
    width, height = body.sides or (SIDE, SIDE)
    latents = (body.n or 1) * width * height // PIXELS_PER_TOKEN
    tokens = len(body.prompt) // CHARS_PER_TOKEN + latents
    adapters = ",".join(f"{lora.name}:{lora.scale:g}" for lora in body.loras or ())
    return Work(tokens, cost=latents * (body.num_inference_steps or STEPS), affinity=adapters or body.prompt)
