"""A slice of the random calls of every op, of which `make fuzz` makes as many as one likes."""

from __future__ import annotations

from conftest import needs_kernels
from fuzz_calls import OPS, VALID, make_call
from fuzz_ops import OUTCOMES, fuzz, results_of, table

pytestmark = needs_kernels

CALLS = 1200
SEED = 1


def test_every_op_is_called() -> None:
    assert set(VALID) == OPS


def test_a_call_follows_from_its_number() -> None:
    for number in range(20):
        calls = [str(make_call("layer", SEED, number)) for _ in range(2)]
        assert calls[0] == calls[1]


def test_no_call_crashes_or_is_wrong() -> None:
    results = list(fuzz(None, SEED, 0, CALLS))
    bad = [result for result in results if result.outcome in ("crashed", "wrong")]
    assert not bad, "\n".join(f"{r.number} {r.outcome}: {r.call}: {r.why}" for r in bad)
    assert [result.number for result in results] == list(range(CALLS))
    # A harness that refuses everything would find nothing.
    accepted = sum(result.outcome == "accepted" for result in results)
    assert CALLS // 4 < accepted < CALLS * 3 // 4


def test_a_child_that_ends_early_is_noticed() -> None:
    lines = ("7\tany\twhile it was made", "7\tlayer\tlayer()", "=accepted\t", "8\tany\twhile it was made")
    output = "\n".join((*lines, "8\tpack\tpack()"))
    first, second = results_of(output, -11, "")
    assert first[:4] == (7, "layer", "layer()", "accepted")
    assert second == (8, "pack", "pack()", "crashed", "SIGSEGV")
    assert results_of(output, -14, "")[1].why == "no end in 60 s"
    counts = table([first, second]).splitlines()
    assert counts[0].split() == ["op", "calls", *OUTCOMES]
    assert counts[-1].split() == ["all", "2", "1", "0", "1", "0"]
