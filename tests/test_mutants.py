"""The product with one guard missing: each time a test must notice."""

import pytest

from tests.mutants import MUTANTS, Mutant
from tests.unguarded import without_row_locks

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_a_missing_guard_is_noticed(mutant):
    mutant.check()


def test_there_are_twelve_or_more():
    assert len({mutant.guard for mutant in MUTANTS}) >= 12


def test_a_test_that_notices_nothing_is_told():
    blind = Mutant("a lock", without_row_locks, lambda: None, {})

    with pytest.raises(AssertionError, match="passes without a lock"):
        blind.check()
