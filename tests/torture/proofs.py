"""Scenarios within this process: the model, the interleavings and the mutants."""

from contextlib import ExitStack

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.clock import stopped_clock
from tests.interleaving import Scene, scenes, world
from tests.mutants import MUTANTS
from tests.shop import open_shop
from tests.torture.run import Run

STEPS_PER_HISTORY = 50
# Then there is a line about how far it is.
HISTORIES_AT_ONCE = 100
# Triples draw their scenes from so many; each needs its six serial orders played first.
SCENES_IN_SHORT = 12
BATCHES_IN_SHORT = {("reserve", "batch"), ("batch", "batch")}


def model(run: Run) -> None:
    steps = run.share(1500, 50_000)
    what = "Random histories of requests, time and staff, on both lanes, against the model."
    with run.scenario("Model", what) as result, stopped_clock() as clock, ExitStack() as stack:
        shop = open_shop(stack, clock)
        drawn = run.random.getrandbits(32)
        result.facts.append(f"Hypothesis seed {drawn}")
        while shop.steps < steps:
            histories = settings(
                max_examples=min(HISTORIES_AT_ONCE, -(-(steps - shop.steps) // STEPS_PER_HISTORY)),
                stateful_step_count=STEPS_PER_HISTORY,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
                verbosity=Verbosity.quiet,
            )
            run_state_machine_as_test(seed(drawn + shop.steps)(shop), settings=histories)
            run.say(f"Model: {shop.steps:,} of {steps:,} steps")
        result.operations = shop.steps


def pairs(run: Run) -> None:
    what = "All pairs of use cases, every order of their statements; a serial order must match."
    # Holds that others have left would end when the clock is moved.
    run.stack.fresh(drops=0)
    with run.scenario("Interleavings of two", what) as result, world() as stage:
        drawn = [scene for scene in scenes(2) if not run.is_short or is_quick(scene)]
        for number, scene in enumerate(drawn, 1):
            result.operations += stage.check_all(scene)
            run.say(f"Interleavings of two: {number} of {len(drawn)} scenes")
        result.facts.append(f"{len(drawn)} scenes, each in every order there is")


def is_quick(scene: Scene) -> bool:
    """Say whether the short form plays it.

    Batches over two drops have very many orders; an overdue hold matters most to expiry, and
    scenes with a deadline have one that becomes overdue under way.
    """
    if "batch" in scene.kinds:
        return scene.kinds in BATCHES_IN_SHORT
    return not scene.is_overdue or "expire" in scene.kinds


def triples(run: Run) -> None:
    count = run.share(150, 10_000)
    what = "Three use cases at once, in orders drawn by seed; some serial order must match."
    run.stack.fresh(drops=0)
    with run.scenario("Interleavings of three", what) as result, world() as stage:
        only = run.random.sample(scenes(3), SCENES_IN_SHORT) if run.is_short else ()
        first = seed_number = run.random.getrandbits(32)
        while result.operations < count:
            result.operations += stage.check_seed(seed_number, only) is not None
            seed_number += 1
            if result.operations % 100 == 0:
                run.say(f"Interleavings of three: {result.operations:,} of {count:,} seeds")
        result.facts.append(f"seeds {first} to {seed_number - 1}")


def mutants(run: Run) -> None:
    what = "The product with one guard missing: a named test must fail, and pass with the guard."
    with run.scenario("Negative controls", what) as result:
        for mutant in MUTANTS:
            run.say(f"Negative controls: {mutant.guard}")
            run.stack.empty()
            mutant.run_test()
            run.stack.empty()
            mutant.check()
            result.operations += 1
            name = mutant.test_name.rpartition(".")[2]
            result.facts.append(f"without {mutant.guard}: `{name}` fails")
    run.stack.populate()
