"""Random histories on the real database, against the model; 50,000 steps by the long form."""

from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.clock import stopped_clock
from tests.shop import open_shop

pytestmark = pytest.mark.django_db(transaction=True)

FEW = settings(
    max_examples=5,
    stateful_step_count=20,
    deadline=None,
    database=None,
    derandomize=True,
    # The long form makes a failing history short; here it would take minutes.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def shop(transactional_db):
    with stopped_clock() as clock, ExitStack() as stack:
        yield open_shop(stack, clock)


def test_any_history_goes_as_the_model_says(shop):
    run_state_machine_as_test(shop, settings=FEW)

    assert shop.steps >= 50


def test_a_repeat_is_replayed_on_either_lane_and_another_body_refused(shop):
    history = shop()
    history.create(sizes={"One size": 2}, limit=None, seconds=None)
    history.reserve(lane="hot", user=0, size=1, quantity=1, key="one")
    for lane in ("hot", "viewsets"):
        history.repeat(lane=lane, number=0, same=True)
        history.repeat(lane=lane, number=0, same=False)

    history.nothing_is_wrong()
