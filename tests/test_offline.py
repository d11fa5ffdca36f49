import random
from itertools import chain

import pytest
import torch
from parity.checkpoints.writing import write

from inferfleet.engine.errors import ContextLengthExceeded, InvalidRequest, LoadError, NumericalError
from inferfleet.engine.model_errors import ModelUnavailable
from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.sight import Sight
from inferfleet.engine.text.chat import ChatTemplateError

CONTEXT = 256


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random checkpoint of each family, and transformers' model of it."""
    names = {"qwen3": 2, "gemma4-e2b": 0, "gemma4-31b": 1, "qwen3-moe": 1}
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, write(name, names[name], folder))
        return made[name]

    return get


@pytest.fixture(scope="module")
def llm(folders):
    """llm(name, **settings): an engine of its own around the family's checkpoint."""
    defaults = {"device": "cpu", "dtype": "float32", "max_model_len": CONTEXT, "kv_cache_tokens": 2048}

    def make(name="qwen3", **settings):
        made = LLM(folders(name)[0], **(defaults | settings))
        # What nobody has written must never be read.
        for tensor in chain.from_iterable(made.engine.builder.cache.blocks.values()):
            tensor.fill_(float("nan"))
        return made

    return make


def tasks(seed=1):
    """Sixteen prompts around windows, blocks and chunks of these models; every third is sampled."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(rng.choice((1, 5, 16, 17, 40, 90)))] for _ in range(16)]
    sampling = [
        SamplingParams(seed=n, max_tokens=16, ignore_eos=True)
        if n % 3 == 0
        else SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        for n in range(16)
    ]
    return [{"prompt_token_ids": prompt} for prompt in prompts], sampling


def tokens(outputs):
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def alone(llm):
    """Answers of each prompt by itself, unchunked, without a prefix cache."""
    made = {}

    def get(name):
        if name not in made:
            engine = llm(name, prefix_caching=False)
            prompts, sampling = tasks()
            made[name] = [tokens(engine.generate([p], s))[0] for p, s in zip(prompts, sampling, strict=True)]
        return made[name]

    return get


SETTINGS = [
    {},
    {"max_num_batched_tokens": 13},
    {"block_size": 8, "max_num_batched_tokens": 64},
    {"block_size": 32, "max_num_seqs": 5},
    {"kv_cache_tokens": 240, "max_model_len": 160, "block_size": 8},
    {"paged_attn": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["qwen3", "gemma4-e2b"])
def test_families_answer_the_same_alone_batched_chunked_preempted_and_unpaged(llm, alone, name, settings):
    engine = llm(name, **settings)
    prompts, sampling = tasks()
    assert tokens(engine.generate(prompts, sampling)) == alone(name)
    if "kv_cache_tokens" in settings:
        assert engine.engine.stats()["preemptions"] > 0


@pytest.mark.parametrize("name", ["qwen3", "gemma4-e2b"])
def test_families_answer_the_same_after_a_prefix_hit(llm, alone, name):
    engine = llm(name, block_size=8)
    prompts, sampling = tasks()
    engine.generate(prompts, [SamplingParams(max_tokens=1)] * 16)
    assert tokens(engine.generate(prompts, sampling)) == alone(name)
    # Every full block before a prompt's last token was there.
    possible = sum((len(prompt["prompt_token_ids"]) - 1) // 8 * 8 for prompt in prompts)
    assert engine.engine.stats()["prefix_hits"] == possible


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["gemma4-31b", "qwen3-moe"])
def test_the_other_families_too(llm, alone, name, settings):
    prompts, sampling = tasks()
    engine = llm(name, **settings)
    for _ in range(2):
        assert tokens(engine.generate(prompts, sampling)) == alone(name)


def test_greedy_tokens_are_those_of_transformers(llm, folders):
    reference = folders("gemma4-e2b")[1]
    prompt = list(range(3, 80))
    expected, margins = reference.greedy(prompt, 40)
    assert min(margins) > 1e-3
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    engine = llm("gemma4-e2b", max_num_batched_tokens=32)
    assert tokens(engine.generate({"prompt_token_ids": prompt}, sampling)) == [expected]


def test_scores_are_the_logits_of_transformers_over_several_chunks(llm, folders):
    reference = folders("gemma4-e2b")[1]
    prompt = list(range(3, 103))
    scores = llm("gemma4-e2b", max_num_batched_tokens=32).score(prompt)
    assert scores.dtype == torch.float32 and scores.shape == (100, reference.vocab_size)
    assert float((scores - reference.logits(prompt)).abs().max()) <= reference.tolerance


def test_a_windowed_family_gives_blocks_back_while_it_computes(llm):
    # Given a Gemma with a window of 16 beside full layers, and a cache that just holds the context in full layers.
    engine = llm("gemma4-e2b", max_num_batched_tokens=16, max_num_seqs=1).engine
    windowed = engine.scheduler.blocks.sights.index(Sight(window=16))
    pool = engine.scheduler.blocks.pools[windowed]
    engine.add("long", list(range(200)), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, pool.num_usable - pool.num_free)
    assert most <= (16 + 16) // 16 + 1


def test_a_text_prompt_is_tokenised_and_answers_come_in_the_order_of_the_prompts(llm):
    outputs = llm().generate(["one", "another"], SamplingParams(max_tokens=3, ignore_eos=True, n=2))
    assert [output.prompt for output in outputs] == ["one", "another"]
    assert [len(output.prompt_token_ids) for output in outputs] == [3, 7]
    assert [[answer.index for answer in output.outputs] for output in outputs] == [[0, 1], [0, 1]]
    assert all(answer.finish_reason == "length" for output in outputs for answer in output.outputs)


def test_a_chat_goes_through_the_template(llm):
    engine = llm()
    output = engine.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0.0, max_tokens=4))[0]
    rendered = engine.tokenizer.encode("<|turn>user\nhi<turn|>\n<|turn>model")
    assert output.prompt_token_ids == rendered
    assert output.outputs[0].text == engine.tokenizer.decode(output.outputs[0].token_ids)


def test_several_conversations_are_answered_together(llm):
    chats = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert len(llm().chat(chats, SamplingParams(max_tokens=2))) == 2


def test_an_empty_conversation_is_refused(llm):
    with pytest.raises(ChatTemplateError, match="at least one message"):
        llm().chat([], SamplingParams(max_tokens=2))


def test_logprobs_are_the_log_softmax_of_the_scores(llm):
    engine = llm()
    prompt = [5, 6, 7, 8]
    sampling = SamplingParams(temperature=0.0, max_tokens=2, logprobs=3, ignore_eos=True)
    answer = engine.generate({"prompt_token_ids": prompt}, sampling)[0].outputs[0]
    expected = engine.score(prompt + answer.token_ids)[3:5].log_softmax(-1)
    for entry, row, token in zip(answer.logprobs, expected, answer.token_ids, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_one_prompt_that_does_not_fit_stops_all_before_anything_runs(llm):
    engine = llm()
    with pytest.raises(ContextLengthExceeded):
        engine.generate([{"prompt_token_ids": [1]}, {"prompt_token_ids": [1] * CONTEXT}], SamplingParams(max_tokens=1))
    assert engine.engine.num_steps == 0
    # And the engine is as good as new.
    assert (
        len(tokens(engine.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=2, ignore_eos=True)))[0]) == 2
    )


def test_nan_logits_are_an_error_and_no_answer(llm):
    engine = llm()
    engine.engine.model.compute_logits = lambda hidden: torch.full((hidden.shape[0], 347), float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        engine.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    ("prompts", "sampling", "words"),
    [
        ([{"token_ids": [1]}], None, "prompt_token_ids"),
        (["a", "b"], [SamplingParams()], "1 sampling_params for 2 prompts"),
    ],
)
def test_a_misused_call_is_a_typed_error(llm, prompts, sampling, words):
    with pytest.raises(InvalidRequest, match=words):
        llm().generate(prompts, sampling)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 0}, "block_size must be a whole number of at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs must be"),
        ({"max_model_len": 1 << 20}, "more than the 4096 positions"),
        ({"kv_cache_tokens": 1 << 40}, r"TiB \(.*a token.*\), but only .* are free"),
        ({"blocksize": 16}, "blocksize is not a setting"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(llm, settings, words):
    with pytest.raises(LoadError, match=words):
        llm(**settings)


def test_a_missing_folder_is_a_typed_error(tmp_path):
    with pytest.raises(ModelUnavailable):
        LLM(str(tmp_path / "nothing"))


def test_the_card_says_what_was_loaded(llm):
    card = llm("gemma4-e2b", kv_cache_tokens=None).card
    assert (card["family"], card["dtype"], card["device"]) == ("gemma4", "float32", "cpu")
    # Given a small model, the default cache holds a whole context for every seat.
    assert card["kv_cache_tokens"] == 32 * CONTEXT
    assert card["max_model_len"] == CONTEXT
    assert set(card["load_seconds"]) == {"find", "build", "read", "pack", "engine", "warm"}
