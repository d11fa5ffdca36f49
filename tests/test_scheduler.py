import pytest
from paper_engine import PaperEngine, cold_tokens, make_blocks, make_request

from inferfleet.engine.errors import ContextLengthExceeded, SchedulerStuck
from inferfleet.engine.request import Status
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.scheduler import Scheduler


def roomy(**fields):
    return PaperEngine(make_blocks((None, 100)), **fields)


def ids(plan):
    return {request.id: count for request, count in zip(plan.rows, plan.num_tokens, strict=True)}


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_at_its_end():
    engine = roomy(max_num_batched_tokens=8)
    engine.add(make_request("a", list(range(20)), max_tokens=1))
    plans = [engine.step() for _ in range(3)]
    assert [plan.num_tokens for plan in plans] == [[8], [8], [4]]
    assert [plan.samples for plan in plans] == [[False], [False], [True]]
    assert not engine.scheduler.has_work


def test_writers_go_first_and_prompts_take_the_rest_of_the_budget():
    engine = roomy(max_num_batched_tokens=8)
    engine.add(make_request("writer", [1, 2]))
    engine.step()
    engine.add(make_request("prompt", list(range(20)), arrival=1))
    assert ids(engine.step()) == {"writer": 1, "prompt": 7}


def test_several_prompts_share_one_step():
    engine = roomy()
    for index in range(3):
        engine.add(make_request(str(index), [index] * 5, arrival=index))
    assert ids(engine.step()) == {"0": 5, "1": 5, "2": 5}


def test_a_lower_priority_number_runs_first_and_then_who_came_first():
    engine = roomy(max_num_seqs=1)
    engine.add(make_request("late", [1], max_tokens=1, arrival=2))
    engine.add(make_request("early", [1], max_tokens=1, arrival=1))
    engine.add(make_request("urgent", [1], max_tokens=1, arrival=3, priority=-5))
    assert [request.id for request in engine.run()] == ["urgent", "early", "late"]


def test_an_urgent_prompt_overtakes_the_chunks_of_a_long_one():
    engine = roomy(max_num_batched_tokens=8)
    engine.add(make_request("long", list(range(40))))
    engine.step()
    engine.add(make_request("urgent", [1, 2, 3], arrival=1, priority=-1))
    assert ids(engine.step()) == {"urgent": 3, "long": 5}


def test_no_more_requests_run_than_there_are_seats():
    engine = roomy(max_num_seqs=2)
    for index in range(3):
        engine.add(make_request(str(index), [1], arrival=index))
    assert len(engine.step().rows) == 2
    assert engine.scheduler.num_waiting == 1


def test_when_blocks_run_out_the_last_in_order_is_computed_again_and_writes_the_same():
    # Given nine blocks of four and three requests that grow to four blocks each.
    engine = PaperEngine(make_blocks((None, 10)))
    requests = [make_request(str(i), [i] * 7, max_tokens=9, arrival=i) for i in range(3)]
    for request in requests:
        engine.add(request)
    engine.run()
    # Then the first was never disturbed, somebody after it was, and all wrote their own tokens.
    assert requests[0].num_preemptions == 0
    assert engine.scheduler.num_preemptions > 0
    assert all(r.output_token_ids == cold_tokens(r, [None]) for r in requests)


def test_the_victim_is_the_one_with_the_least_priority():
    engine = PaperEngine(make_blocks((None, 10)))
    meek = make_request("meek", [1] * 7, max_tokens=9, arrival=0, priority=5)
    rest = [make_request(str(i), [i] * 7, max_tokens=9, arrival=i) for i in (1, 2)]
    for request in (meek, *rest):
        engine.add(request)
    engine.run()
    assert meek.num_preemptions > 0
    assert [r.num_preemptions for r in rest] == [0, 0]


def test_a_preempted_request_keeps_its_tokens_and_goes_before_later_ones():
    engine = PaperEngine(make_blocks((None, 7), prefix=False))
    first = make_request("first", [1] * 7, max_tokens=14, arrival=0)
    second = make_request("second", [2] * 7, max_tokens=14, arrival=1)
    engine.add(first)
    engine.add(second)
    while second.num_preemptions == 0:
        engine.step()
    kept = list(second.output_token_ids)
    assert kept and second.status is Status.WAITING and second.num_computed_tokens == 0
    engine.add(make_request("third", [3] * 7, max_tokens=14, arrival=2))
    assert [request.id for request in engine.run()] == ["first", "second", "third"]
    assert second.output_token_ids[: len(kept)] == kept
    assert second.output_token_ids == cold_tokens(second, [None])


def test_a_request_that_can_never_fit_is_refused_with_the_limit():
    engine = PaperEngine(make_blocks((None, 5)))
    engine.add(make_request("fits", [1] * 10, max_tokens=6))
    with pytest.raises(ContextLengthExceeded, match=r"need 17 tokens.* at most 16") as caught:
        engine.add(make_request("never", [1] * 10, max_tokens=7, arrival=1))
    assert caught.value.code == "context_length_exceeded"
    assert [request.id for request in engine.run()] == ["fits"]


def test_the_answers_after_the_first_wait_for_its_prompt_and_then_find_it_cached():
    engine = roomy(max_num_batched_tokens=8)
    answers = [make_request("job", [1] * 13, index=index) for index in range(3)]
    engine.add(*answers)
    assert [len(engine.step().rows) for _ in range(3)] == [1, 1, 3]
    engine.run()
    assert [answer.num_cached_tokens for answer in answers] == [0, 12, 12]


def test_cancelling_the_first_answer_lets_the_others_run():
    engine = roomy()
    answers = [make_request("job", [1] * 5, index=index) for index in range(2)]
    engine.add(*answers)
    engine.scheduler.finish(answers[0], "cancelled")
    assert engine.run() == [answers[1]]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_finished_request_leaves_from_wherever_it_is(index):
    # Given one that runs, one that waits for a seat and one held behind it.
    engine = roomy(max_num_seqs=1)
    requests = [make_request("a", [1] * 5), *(make_request("b", [2] * 5, arrival=1, index=i) for i in range(2))]
    engine.add(requests[0])
    engine.add(*requests[1:])
    engine.step()
    engine.scheduler.finish(requests[index], "cancelled")
    assert requests[index].finish_reason == "cancelled"
    assert len(engine.run()) == 2
    assert requests[index].output_token_ids == cold_tokens(requests[0], [None])[: 1 if index == 0 else 0]


def test_published_tokens_count_as_output_and_are_not_written_again():
    reference = make_request("cold", [1, 2, 3], max_tokens=6)
    whole = cold_tokens(reference, [None])
    engine = roomy()
    resumed = make_request("a", [1, 2, 3], max_tokens=6, output=whole[:4])
    engine.add(resumed)
    engine.run()
    assert resumed.output_token_ids == whole
    assert engine.steps == 2


def test_an_end_token_ends_the_answer_but_not_before_min_tokens():
    tokens = cold_tokens(make_request("cold", [1, 2], max_tokens=9), [None])
    end = frozenset({tokens[0]})
    for least, count in ((0, 1), (3, next(i for i in range(3, 9) if tokens[i - 1] == tokens[0] or i == 8))):
        engine = roomy()
        request = make_request("a", [1, 2], max_tokens=8, end_token_ids=end, sampling=SamplingParams(min_tokens=least))
        engine.add(request)
        engine.run()
        assert len(request.output_token_ids) == count


def test_a_row_that_failed_gets_no_token_and_ends_where_it_is_told():
    engine = roomy()
    bad, good = make_request("bad", [1] * 3), make_request("good", [2] * 3, arrival=1)
    engine.add(bad)
    engine.add(good)
    plan = engine.scheduler.plan()
    engine.scheduler.finish(bad, "error")
    engine.scheduler.record(plan, [None, 4])
    assert bad.output_token_ids == [] and good.output_token_ids == [4]
    engine.check_blocks()


def test_work_without_progress_is_an_error_and_not_an_endless_loop():
    # Given a manager that never gives anybody a slot: a bug that no input can cause.
    engine = roomy()
    engine.blocks.open = lambda request, reserve: False
    engine.add(make_request("a", [1]))
    with pytest.raises(SchedulerStuck, match="1 waiting"):
        engine.step()


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(make_blocks((None, 5)), max_num_seqs=limits[0], max_num_batched_tokens=limits[1])
