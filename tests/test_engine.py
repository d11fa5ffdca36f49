import random

import pytest
import torch
from tiny_engine import CONTEXT, EOS, VOCAB, gather, greedy, run, seeded, tiny_engine

from inferfleet.engine.admission import Published
from inferfleet.engine.errors import ContextLengthExceeded, InvalidRequest
from inferfleet.engine.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make(tmp_path):
    return lambda **settings: tiny_engine(tmp_path, **settings)


def prompts(count, seed=0, longest=60):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def answers_of(engine, tasks):
    """Runs (prompt, sampling) pairs together; the tokens of each."""
    for number, (prompt, sampling) in enumerate(tasks):
        engine.add(str(number), prompt, sampling)
    told = run(engine)
    return [[told[str(n)][i]["token_ids"] for i in range(s.n)] for n, (_, s) in enumerate(tasks)]


#: Sixteen requests of unequal length, greedy and sampled, with and without penalties.
TASKS = [
    (
        prompt,
        greedy(20) if n % 2 else seeded(n, 20, top_p=0.9 + 0.1 * (n % 4 == 0), presence_penalty=0.5 * (n % 3)),
    )
    for n, prompt in enumerate(prompts(16))
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What each request answers with an engine to itself, nothing chunked."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return [answers_of(tiny_engine(folder, prefix_caching=False), [task])[0] for task in TASKS]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 8},
        {"block_size": 16, "max_num_batched_tokens": 33},
        {"block_size": 32, "max_num_seqs": 3},
        {"paged_attn": False, "kv_cache_tokens": 16 * CONTEXT},
        {"paged_attn": False, "kv_cache_tokens": 2 * CONTEXT, "max_num_batched_tokens": 16},
    ],
    ids=str,
)
def test_a_request_answers_the_same_alone_and_in_any_batch_chunk_block_or_cache(make, alone, settings):
    assert answers_of(make(**settings), TASKS) == alone


def test_a_preempted_request_answers_the_same(make, alone):
    # Given a cache so small that the sixteen cannot all stay.
    engine = make(kv_cache_tokens=160, max_model_len=128)
    assert answers_of(engine, TASKS) == alone
    assert engine.stats()["preemptions"] > 0


def test_a_prefix_hit_answers_the_same_as_a_cold_start(make, alone):
    engine = make()
    cold = answers_of(engine, TASKS)
    before = engine.stats()["prefix_hits"]
    assert answers_of(engine, TASKS) == cold == alone
    assert engine.stats()["prefix_hits"] > before


def test_the_answer_of_one_turn_is_found_in_the_cache_by_the_next(make):
    engine = make()
    engine.add("one", [1] * 10, greedy(10))
    first = run(engine)["one"]
    turn = [1] * 10 + first[0]["token_ids"] + [2, 3]
    engine.add("two", turn, greedy(4))
    told = run(engine)["two"]
    # Twenty tokens in blocks of four, of which the last written one was never computed.
    assert told[-1]["usage"].cached_tokens == 16
    assert told[0]["token_ids"] == answers_of(make(), [(turn, greedy(4))])[0][0]


def test_tenants_do_not_share_a_cache(make):
    engine = make()
    for salt in ("one", "two"):
        engine.add(salt, [1] * 20, greedy(2), cache_salt=salt)
        assert run(engine)[salt][-1]["usage"].cached_tokens == 0


def test_several_answers_differ_by_their_random_stream_and_share_the_prompt(make):
    engine = make()
    engine.add("job", [7] * 30, seeded(5, 10, n=4))
    told = run(engine)["job"]
    assert len({tuple(told[i]["token_ids"]) for i in range(4)}) == 4
    # Answers that end in the same step each tell their last token and why they ended.
    assert [(len(told[i]["token_ids"]), told[i]["finish_reason"]) for i in range(4)] == [(10, "length")] * 4
    assert told[-1]["usage"].prompt_tokens == 30
    assert told[-1]["usage"].completion_tokens == 40
    assert engine.stats()["prefix_hits"] == 3 * 28


def test_without_a_seed_the_id_decides_so_that_a_requeued_job_goes_on_as_it_began(make):
    def tokens(name):
        engine = make()
        engine.add(name, [3] * 5, SamplingParams(max_tokens=12, ignore_eos=True))
        return run(engine)[name][0]["token_ids"]

    assert tokens("job_a") == tokens("job_a")
    assert tokens("job_a") != tokens("job_b")


@pytest.mark.parametrize("sampling", [greedy(16), seeded(9, 16, frequency_penalty=0.7, repetition_penalty=1.3)])
@pytest.mark.parametrize("count", [1, 6, 15])
def test_a_requeued_request_goes_on_after_what_was_published(make, sampling, count):
    engine = make()
    engine.add("job", [9, 8, 7], sampling)
    whole = run(engine)["job"]
    published = whole[0]["token_ids"][:count]
    # Given that the text of the published tokens went out as far as it was certain.
    text = engine.tokenizer.decode(published).rstrip("\ufffd")
    again = make()
    again.add("job", [9, 8, 7], sampling, published={0: Published(tuple(published), text)})
    told = run(again)["job"]
    # Then tokens and text follow without a gap or a repetition, and all tokens count as output.
    assert published + told[0]["token_ids"] == whole[0]["token_ids"]
    assert text + told[0]["text"] == whole[0]["text"]
    assert told[0]["finish_reason"] == "length"
    assert told[-1]["usage"] == whole[-1]["usage"]


def test_a_requeued_request_whose_last_token_was_published_ends_at_once(make):
    engine = make()
    engine.add("job", [1, 2], greedy(2), published={0: Published((65, 66), "A")})
    told = run(engine)["job"]
    # "AB" by the tokenizer's alphabet is not the point: what is certain and unpublished comes with the end.
    assert told[0]["token_ids"] == [] and told[0]["finish_reason"] == "length"
    assert told[-1]["usage"].completion_tokens == 2
    assert engine.num_steps == 0


def test_one_of_several_answers_may_be_complete_when_a_request_comes_back(make):
    engine = make()
    engine.add("job", [4] * 9, seeded(1, 6, n=3))
    whole = run(engine)["job"]
    again = make()
    again.add(
        "job",
        [4] * 9,
        seeded(1, 6, n=3),
        published={
            0: Published(tuple(whole[0]["token_ids"]), whole[0]["text"]),
            2: Published((whole[2]["token_ids"][0],)),
        },
    )
    told = run(again)["job"]
    assert told[0]["token_ids"] == []
    assert told[1]["token_ids"] == whole[1]["token_ids"]
    assert told[2]["token_ids"] == whole[2]["token_ids"][1:]
    assert told[-1]["usage"].completion_tokens == 18


def letters(engine):
    """Token ids of "a" to "z"."""
    return {letter: engine.tokenizer.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz"}


def write(engine, text):
    """A logit bias cannot spell a word: let the model's logits be the next letter of a text, whatever it reads."""
    ids = [engine.tokenizer.encode(letter)[0] for letter in text]
    step = iter(ids)
    table = torch.eye(VOCAB) * 50
    engine.model.compute_logits = lambda hidden: table[[next(step, EOS) for _ in range(hidden.shape[0])]]


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(make):
    engine = make()
    write(engine, "hello worms")
    engine.add("job", [1], greedy(20, stop=("wor",)))
    steps, pieces = {}, []
    while engine.has_work:
        out = engine.step()
        pieces += [delta.text for delta in out.deltas]
        gather(steps, out)
    # Then "w" and "wo" were held back and never told, while what came before was told as it came.
    assert steps["job"][0]["text"] == "hello "
    assert steps["job"][0]["finish_reason"] == "stop"
    assert len(steps["job"][0]["token_ids"]) == 9
    assert pieces == ["h", "e", "l", "l", "o", " ", "", "", ""]


def test_what_was_held_back_is_told_when_the_text_ends_otherwise(make):
    engine = make()
    write(engine, "hello wo")
    engine.add("job", [1], greedy(8, stop=("wor",)))
    told = run(engine)["job"][0]
    assert (told["text"], told["finish_reason"]) == ("hello wo", "length")


def test_a_stop_string_completed_by_the_last_token_is_a_stop(make):
    engine = make()
    write(engine, "hello wor")
    engine.add("job", [1], greedy(9, stop=("wor",)))
    told = run(engine)["job"][0]
    assert (told["text"], told["finish_reason"]) == ("hello ", "stop")


def test_the_end_token_ends_the_text_and_is_no_text(make):
    engine = make()
    write(engine, "hi")
    engine.add("job", [1], greedy(20, ignore_eos=False))
    told = run(engine)["job"]
    assert (told[0]["text"], told[0]["finish_reason"]) == ("hi", "stop")
    assert told[0]["token_ids"][-1] == EOS
    assert told[-1]["usage"].completion_tokens == 3


def test_a_stop_token_ends_the_text_even_where_the_end_token_is_ignored(make):
    engine = make()
    write(engine, "abcde")
    engine.add("job", [1], greedy(20, stop_token_ids=(letters(engine)["c"],)))
    told = run(engine)["job"][0]
    assert (told["text"], told["finish_reason"]) == ("ab", "stop")


def test_before_min_tokens_neither_stop_strings_nor_end_tokens_end_the_text(make):
    engine = make()
    write(engine, "ababab")
    engine.add("job", [1], greedy(20, stop=("ab",), min_tokens=3))
    told = run(engine)["job"][0]
    assert (told["text"], told["finish_reason"]) == ("ab", "stop")
    assert len(told["token_ids"]) == 4


def test_a_stop_string_begun_before_a_requeue_is_completed_after_it(make):
    # Given that "hello wo" was published as tokens, and its text only up to what could be no stop string.
    engine = make()
    write(engine, "rms")
    published = Published(tuple(engine.tokenizer.encode("hello wo")), "hello ")
    engine.add("job", [1], greedy(20, stop=("wor",)), published={0: published})
    told = run(engine)["job"]
    assert (told[0]["text"], told[0]["finish_reason"]) == ("", "stop")
    assert told[-1]["usage"].completion_tokens == 9


def test_what_was_certain_but_not_published_before_a_requeue_is_told_after_it(make):
    engine = make()
    write(engine, "!!")
    published = Published(tuple(engine.tokenizer.encode("hello")), "he")
    engine.add("job", [1], greedy(7), published={0: published})
    assert run(engine)["job"][0]["text"] == "llo!!"


def test_half_a_code_point_is_never_told(make):
    engine = make()
    ids = engine.tokenizer.encode("é🙂")
    steps = iter(ids)
    table = torch.eye(VOCAB) * 50
    engine.model.compute_logits = lambda hidden: table[[next(steps)]]
    engine.add("job", [1], greedy(len(ids)))
    pieces = []
    while engine.has_work:
        pieces += [delta.text for delta in engine.step().deltas]
    assert pieces == ["", "é", "", "", "", "🙂"]


def test_logprobs_come_in_the_shape_of_openai(make):
    engine = make()
    write(engine, "ab")
    engine.add("job", [1], greedy(2, logprobs=2))
    entries = run(engine)["job"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["a", "b"]
    assert entries[0]["bytes"] == [97]
    assert entries[0]["logprob"] == pytest.approx(0, abs=1e-3)
    assert len(entries[0]["top_logprobs"]) == 2
    assert entries[0]["top_logprobs"][0]["token"] == "a"


def test_a_row_of_nan_fails_its_own_request_and_leaves_nothing_in_the_cache(make):
    # Given a prompt whose token spoils everything computed after it, over several chunks, among good neighbours.
    engine = make(max_num_batched_tokens=16)
    expected = answers_of(make(), [([5] * 9, greedy(12)), ([6] * 21, greedy(12))])
    engine.model.spoiled_token = 77
    bad = [5] * 8 + [77] + [5] * 30
    engine.add("good", [5] * 9, greedy(12))
    engine.add("bad", bad, greedy(12, n=2))
    engine.add("also good", [6] * 21, greedy(12))
    told = run(engine)
    error = told["bad"][-1]["error"]
    assert error.code == "nan_logits"
    assert [told["good"][0]["token_ids"], told["also good"][0]["token_ids"]] == [row[0] for row in expected]
    # When the same prompt comes again after the fault has gone, then it finds nothing spoiled.
    engine.model.spoiled_token = None
    assert answers_of(engine, [(bad, greedy(12))]) == answers_of(make(), [(bad, greedy(12))])


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RuntimeError("some kernel broke"), "engine_error"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"), "out_of_memory"),
    ],
)
def test_a_failing_batch_fails_its_rows_and_the_engine_goes_on(make, raised, code):
    engine = make(max_num_seqs=2)
    for number in range(3):
        engine.add(str(number), [number] * 5, greedy(4))
    engine.step()
    engine.model.errors = [raised]
    told = run(engine)
    assert [told[str(n)][-1]["error"].code for n in range(2)] == [code, code]
    # Then the third, which waited, is served as if nothing had been.
    assert told["2"][0]["token_ids"] == answers_of(make(), [([2] * 5, greedy(4))])[0][0]
    assert engine.stats()["kv_usage"] == 0


def test_a_cancelled_request_frees_its_blocks_at_once_and_tells_its_usage(make):
    engine = make()
    engine.add("job", [1] * 20, greedy(50))
    for _ in range(4):
        engine.step()
    assert engine.cancel("job")
    assert engine.stats()["kv_usage"] == 0
    out = engine.step()
    assert [(d.index, d.token_ids, d.finish_reason) for d in out.deltas] == [(0, [], "cancelled")]
    assert out.finished[0][1].completion_tokens == 4
    assert not engine.has_work
    assert not engine.cancel("job")


def test_a_waiting_request_can_be_cancelled(make):
    engine = make(max_num_seqs=1)
    engine.add("first", [1] * 5, greedy(3))
    engine.add("second", [1] * 5, greedy(3, n=2))
    engine.cancel("second")
    told = run(engine)
    assert told["second"][0]["finish_reason"] == told["second"][1]["finish_reason"] == "cancelled"
    assert told["second"][-1]["usage"].completion_tokens == 0
    assert len(told["first"][0]["token_ids"]) == 3


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "words"),
    [
        ([], greedy(), InvalidRequest, "at least one token"),
        ([VOCAB], greedy(), InvalidRequest, f"from 0 to {VOCAB - 1}"),
        ([1] * CONTEXT, greedy(1), ContextLengthExceeded, f"has {CONTEXT} tokens; at most {CONTEXT - 1} fit"),
        ([1] * 200, greedy(57), ContextLengthExceeded, "at most 56 fit"),
        ([1] * 200, SamplingParams(min_tokens=57), ContextLengthExceeded, "min_tokens is 57"),
        ([1], greedy(logit_bias={VOCAB: 1.0}), InvalidRequest, "from 0 to"),
        ([1], greedy(stop_token_ids=(VOCAB,)), InvalidRequest, "from 0 to"),
    ],
)
def test_what_cannot_be_served_is_refused_with_field_and_limit(make, prompt, sampling, error, words):
    engine = make()
    with pytest.raises(error, match=words) as caught:
        engine.add("job", prompt, sampling)
    assert caught.value.param in ("messages", "max_tokens", "min_tokens", "logit_bias", "stop_token_ids")
    assert not engine.has_work


def test_a_cache_smaller_than_the_context_limits_the_context(make):
    engine = make(kv_cache_tokens=40)
    with pytest.raises(ContextLengthExceeded, match="context of 40 tokens here"):
        engine.add("job", [1] * 40, greedy(1))
    engine.add("fits", [1] * 30, greedy(10))
    assert len(run(engine)["fits"][0]["token_ids"]) == 10


def test_without_max_tokens_an_answer_ends_where_the_context_ends(make):
    engine = make()
    engine.add("job", [1] * 250, SamplingParams(temperature=0.0, ignore_eos=True))
    told = run(engine)["job"][0]
    assert len(told["token_ids"]) == 6 and told["finish_reason"] == "length"


def test_an_id_may_be_used_again_only_after_its_end(make):
    engine = make()
    engine.add("job", [1], greedy(2))
    with pytest.raises(InvalidRequest, match="job is running"):
        engine.add("job", [1], greedy(2))
    run(engine)
    engine.add("job", [1], greedy(2))
    assert len(run(engine)["job"][0]["token_ids"]) == 2


def test_scores_are_the_logits_at_every_position_however_the_prompt_is_cut(make):
    prompt = prompts(1, seed=4, longest=90)[0]
    whole, cut = make().score(prompt), make(max_num_batched_tokens=5).score(prompt)
    assert whole.shape == (len(prompt), VOCAB) and whole.dtype == torch.float32
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-4)
    engine = make()
    engine.score(prompt)
    # Then the score of the last position is what the next token is picked from.
    assert answers_of(engine, [(prompt, greedy(1))])[0][0] == [int(whole[-1].argmax())]
    assert engine.stats()["prefix_hits"] == 0


def test_arrivals_cancels_and_a_crowded_cache_change_nobodys_answer(make):
    # Given forty requests of several priorities, tenants and answer counts, and room for about five of them.
    rng = random.Random(11)
    engine = make(kv_cache_tokens=240, max_model_len=128, max_num_batched_tokens=24)
    base = [rng.randrange(256) for _ in range(40)]
    tasks = [
        (
            base[: rng.randrange(40)] + [rng.randrange(256) for _ in range(rng.randrange(1, 12))],
            seeded(n, 14, n=1 + n % 3),
        )
        for n in range(40)
    ]
    # When they come a few at a time, some are cancelled, and one batch fails.
    told, cancelled, failed = {}, set(), set()
    for number, (prompt, sampling) in enumerate(tasks):
        engine.add(str(number), prompt, sampling, priority=number % 3, cache_salt=str(number % 2))
        for _ in range(rng.randrange(4)):
            gather(told, engine.step())
        if number % 7 == 3:
            victim = rng.choice(list(engine._open))
            cancelled.add(victim)
            engine.cancel(victim)
        if number == 20:
            engine.model.errors = [RuntimeError("once")]
    while engine.has_work:
        gather(told, engine.step())
    failed = {name for name, answers in told.items() if "error" in answers[-1]}
    assert failed and len(failed | cancelled) < 20
    # Then every other request has the answers that it gives alone, and the cache is empty.
    alone = make(prefix_caching=False)
    for number, task in enumerate(tasks):
        expected = answers_of(alone, [task])[0]
        for index, tokens in enumerate(expected):
            answer = told[str(number)].get(index, {"token_ids": []})
            if str(number) in failed | cancelled:
                assert answer["token_ids"] == tokens[: len(answer["token_ids"])]
            else:
                assert answer["token_ids"] == tokens
    assert engine.stats()["preemptions"] > 0
    assert engine.stats()["kv_usage"] == 0 and engine.stats()["waiting"] == 0
