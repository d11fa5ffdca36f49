import copy
import json
import pickle
import subprocess
import sys

import pytest

from inferfleet.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", 2.01, "at most 2"),
        ("temperature", float("nan"), "at most 2"),
        ("temperature", True, "number"),
        ("top_k", -1, "at least 0"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("min_p", -0.5, "at least 0"),
        ("repetition_penalty", 0.0, "above 0"),
        ("presence_penalty", 2.5, "at most 2"),
        ("frequency_penalty", float("inf"), "at most 2"),
        ("seed", 2**63, "at most 9223372036854775807"),
        ("logprobs", 21, "at most 20"),
        ("ignore_eos", 1, "true or false"),
        ("max_tokens", 0, "at least 1"),
        ("n", 9, "at most 8"),
        ("stop", ("",), "1 to 64 characters"),
        ("stop", ("x" * 65,), "1 to 64 characters"),
        ("stop", ("a",) * 9, "at most 8 strings"),
        ("stop", (3,), "strings"),
        ("stop_token_ids", (-1,), "at least 0"),
        ("stop_token_ids", tuple(range(33)), "at most 32"),
        ("stop_token_ids", "12", "list of token ids"),
        ("logit_bias", {5: 101.0}, "at most 100"),
        ("logit_bias", {"1_0": 1.0}, "token ids"),
        ("logit_bias", {-1: 1.0}, "at least 0"),
        ("logit_bias", dict.fromkeys(range(301), 1.0), "at most 300"),
        ("logit_bias", [1], "map token ids"),
        ("logit_bias", {"7": 1.0, 7: 2.0}, "twice"),
    ],
)
def test_a_value_outside_its_limits_names_the_field_and_the_limit(field, value, limit):
    with pytest.raises(ValueError, match=limit) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(field)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens = 3"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ValueError, match="best_of is not a sampling parameter"):
        SamplingParams.from_dict({"best_of": 2})


def test_parameters_survive_a_journey_through_json():
    params = SamplingParams(
        temperature=0.5,
        logit_bias={"12": -100, 3: 1.5},
        stop=["a", "b"],
        stop_token_ids=[4],
        seed=7,
        logprobs=0,
    )
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


def test_parameters_can_be_copied_and_pickled():
    params = SamplingParams(logit_bias={1: 2.0}, stop="x")
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


def test_defaults_travel_as_nothing():
    assert SamplingParams().to_dict() == {}


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="END").stop == ("END",)


def test_parameters_cannot_be_changed_through_the_callers_containers():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias[1] == 2.0
    with pytest.raises(TypeError):
        params.logit_bias[1] = 4.0


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-5, False), (1, False)])
def test_a_vanishing_temperature_means_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_importing_the_parameters_loads_no_torch():
    code = "import inferfleet.engine.sampling_params, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
