from hypothesis import given
from hypothesis import strategies as st

from inferfleet.engine.text.stop import StopChecker

texts = st.text(alphabet="ab<", max_size=30)
stops = st.lists(st.text(alphabet="ab<", min_size=1, max_size=5), max_size=4)


def cut(text, places):
    places = sorted({min(place, len(text)) for place in places})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def expected(text, stop):
    """(text given out, stop string): the match that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(texts, stops, st.lists(st.integers(0, 30), max_size=6))
def test_the_result_is_the_same_however_the_text_is_cut(text, stop, places):
    checker = StopChecker(stop)
    given_out = "".join(checker.add(piece) for piece in cut(text, places)) + checker.finish()
    assert (given_out, checker.matched) == expected(text, stop)


def test_a_stop_string_across_pieces_is_not_given_out():
    checker = StopChecker(["</answer>"])
    assert [checker.add(piece) for piece in ("42<", "/ans", "wer", "> more")] == ["42", "", "", ""]
    assert checker.matched == "</answer>"


def test_what_turns_out_not_to_be_a_stop_string_is_given_out_at_once():
    checker = StopChecker(["<end>"])
    assert checker.add("a<e") == "a"
    assert checker.add("f") == "<ef"


def test_a_text_that_ends_in_half_a_stop_string_keeps_it():
    checker = StopChecker(["STOP"])
    assert checker.add("we STO") == "we "
    assert checker.finish() == "STO"


def test_nothing_is_given_out_after_a_match():
    checker = StopChecker(["x"])
    assert checker.add("ax") == "a"
    assert checker.add("more") == checker.finish() == ""


def test_without_stop_strings_everything_passes():
    checker = StopChecker()
    assert checker.add("any <text>") == "any <text>"
