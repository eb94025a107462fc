"""The parts of mixed precision by themselves."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from qgraph import budget
from qgraph.mixed import knapsack, losses, swaps
from qgraph.mixed.items import Item, Option
from qgraph.mixed.knapsack import Limit


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4.5MB", 4_500_000),
        ("4.5 MiB", 4_718_592),
        ("12", 12),
        ("1kb", 1000),
        (77, 77),
        (".5KiB", 512),
    ],
)
def test_sizes(text, nbytes):
    assert budget.size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "4.5 MBit", "-3", "1e3", "4,5MB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        budget.size(text)


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    loss = [np.sort(rng.random(n))[::-1].tolist() for n in rng.integers(1, 5, 7)]
    sizes = [np.sort(rng.integers(1, 1000, len(v))).astype(float).tolist() for v in loss]
    low, high = (sum(map(f, sizes)) for f in (min, max))
    most = low + rng.random() * (high - low)

    def total(values, mixed):
        return sum(v[c] for v, c in zip(values, mixed, strict=True))

    every = itertools.product(*(range(len(v)) for v in loss))
    best = min(total(loss, c) for c in every if total(sizes, c) <= most)
    found = knapsack.solve(loss, [Limit(sizes, most)])
    assert total(sizes, found) <= most
    assert np.isclose(total(loss, found), best)


def test_a_knapsack_that_nothing_fits_into():
    assert knapsack.solve([[1.0, 0.0]], [Limit([[5.0, 6.0]], 4.0)]) is None
    assert knapsack.solve([[1.0, 0.0]], [Limit([[5.0, 6.0]], 5.0)]) == [0]
    assert knapsack.solve([], []) == []


def test_what_the_solver_prints_is_not_seen():
    """HiGHS prints lines of its own at times, which would be among the JSON of --json."""
    code = (
        "import ctypes, scipy.optimize as o\n"
        "from qgraph.mixed import knapsack\n"
        "solve, libc = o.milp, ctypes.CDLL(None)\n"
        "o.milp = lambda *a, **k: (libc.puts(b'from C'), solve(*a, **k))[1]\n"
        "print('before')\n"
        "print(knapsack.solve([[1.0, 0.0]], []))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "before\n[1]\n" and not done.stderr


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 20])
def test_the_order_of_measuring_is_spread(count):
    order = losses._spread(count)
    assert sorted(order) == list(range(count))
    if count == 20:
        assert np.ptp(order[:2]) >= 4 and np.ptp(order[:4]) >= 12


def test_an_item_that_was_not_measured_has_the_gain_of_the_nearest_of_its_shape():
    items = items_of(4)
    for item, cost in zip(items, (1.0, 2.0, 4.0, 8.0), strict=True):
        item.options = [Option("a", ("a",), 1, cost), Option("b", ("b",), 2)]
    count = itertools.count()

    class One:
        def loss(self, specs):
            return 0.5

    losses.measure(items, One(), lambda what, share: None, lambda: next(count) > 0)
    assert [i.options[0].loss for i in items] == [0.5, 1.0, 2.0, 4.0]
    assert all(i.options[1].loss == 0 for i in items)


class Measured:
    """Losses that do not add up: items 0 and 1 hurt each other when both are coarse.

    The halves of the samples agree, or the second one says that they hurt nobody.
    """

    def __init__(self, items, agree=True):
        self.items, self.agree = items, agree

    def halves(self, specs):
        coarse = [specs[i.weights[0].name] == "a" for i in self.items]
        alone = sum((0.1, 0.1, 0.15, 0.15)[i] * c for i, c in enumerate(coarse))
        both = 0.5 * (coarse[0] and coarse[1])
        return alone + both, alone + both * self.agree

    def stay_near(self, specs):
        self.near = specs


class Named:
    def __init__(self, name):
        self.name = self.label = name
        self.shape = (4, 2)


def items_of(count):
    found = []
    for i in range(count):
        item = Item((Named(f"w{i}"),), None, 8)
        loss = (0.1, 0.1, 0.15, 0.15)[i]
        item.options = [Option("a", ("a",), 1, 1.0, loss), Option("b", ("b",), 2, 0.0, 0.0)]
        found.append(item)
    return found


def within(items, most):
    """The knapsack for so many bytes."""
    sizes = [[float(o.nbytes) for o in i.options] for i in items]

    def solve(values, chosen, moves):
        return knapsack.solve(values, [Limit(sizes, most), knapsack.moves(values, chosen, moves)])

    return solve


@pytest.mark.parametrize("is_over", [False, True])
def test_changes_are_taken_where_they_measure_better(is_over):
    items = items_of(4)
    start = [0, 0, 1, 1]  # what adding up says, and measuring does not
    found = swaps.improve(items, start, Measured(items), within(items, 6), lambda: is_over)
    if is_over:
        assert found.chosen == start and not found.taken
        return
    assert sum(found.chosen) == 2 and found.chosen[:2].count(0) == 1
    assert np.isclose(found.loss, 0.25)
    assert found.taken == len(found.notes) >= 1


def test_a_change_that_only_one_half_of_the_samples_wants_is_not_taken():
    items = items_of(4)
    found = swaps.improve(
        items, [0, 0, 1, 1], Measured(items, agree=False), within(items, 6), lambda: False
    )
    assert found.chosen == [0, 0, 1, 1] and found.tried and not found.taken


def test_fewer_changes_at_a_time_where_many_do_not_help():
    items = items_of(4)
    found = swaps.improve(items, [1, 1, 0, 0], Measured(items), within(items, 6), lambda: False)
    # One for one costs 0.25. Two for two would look better still, and costs 0.7.
    assert np.isclose(found.loss, 0.25)
    assert found.tried > found.taken == 1


@pytest.mark.parametrize("most", [0, 1, 2, 4])
def test_so_many_items_change_at_most(most):
    losses_of = [[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    found = knapsack.solve(losses_of, [knapsack.moves(losses_of, [0, 0, 0, 0], most)])
    assert found == [0, int(most > 2), int(most > 1), int(most > 0)]


def test_importing_does_not_load_scipy():
    code = "import sys, qgraph, qgraph.compiler, qgraph.mixed; print('scipy' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
