"""A whole fleet under random faults, and the checker that judges it. See soak/."""

import pytest
from soak.run import Soak

LONG_SECONDS = 75


def soaked(seed, seconds, redis_binary_path, session_swift, tmp_path):
    verdict = Soak(seed, seconds, redis_binary_path, session_swift, tmp_path).run()
    print(verdict)
    assert verdict.wrong == []
    assert verdict.figures["accepted"] > 2 * seconds
    assert sum(verdict.faults.values()) >= seconds / 2


@pytest.mark.timeout(200)
def test_nothing_is_lost_and_nothing_done_twice_under_random_faults(redis_binary_path, session_swift, tmp_path):
    soaked(7, 10, redis_binary_path, session_swift, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_a_long_soak_of_each_seed(redis_binary_path, session_swift, tmp_path, seed):
    soaked(seed, LONG_SECONDS, redis_binary_path, session_swift, tmp_path)
