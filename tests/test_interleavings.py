"""A few pairs of use cases in every order; all pairs and triples are in ``tests.torture``."""

import pytest

from tests.interleaving import Scene, world
from tests.unguarded import STOCK_CONSTRAINTS, without_constraints, without_row_locks

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def stage(transactional_db):
    with world() as opened:
        yield opened


@pytest.mark.parametrize(
    "kinds", [("reserve", "release"), ("purchase", "deadline"), ("retry", "retry")]
)
def test_every_order_gives_what_some_serial_order_gives(stage, kinds):
    assert stage.check_all(Scene(kinds)) > 5


def test_a_seed_plays_the_same_run_again(stage):
    orders = []
    for _ in range(2):
        choices: list[int] = []
        check = stage.check
        stage.check = lambda scene, choose, c=choices, check=check: c.extend(
            check(scene, choose).choices
        )
        stage.check_seed(7)
        stage.check = check
        orders.append(choices)

    assert orders[0] == orders[1]
    assert len(orders[0]) > 10


def test_without_row_locks_some_order_is_wrong():
    with without_row_locks(), world() as stage, pytest.raises(AssertionError, match="in the order"):
        stage.check_all(Scene(("reserve", "reserve")))


def test_without_row_locks_and_constraints_some_order_sells_the_hold_and_returns_it():
    with (
        without_constraints(*STOCK_CONSTRAINTS),
        without_row_locks(),
        world() as stage,
        pytest.raises(AssertionError, match="in the order"),
    ):
        stage.check_all(Scene(("purchase", "release")))
