"""The counters of images and visual tokens."""

from concurrent.futures import ThreadPoolExecutor

from tokensieve import tally


def test_counts_are_sums_by_method() -> None:
    tally.add("sums", 144, 36)
    tally.add("sums", 100, 25)
    tally.add("others", 10, 10)
    assert tally.snapshot()["sums"] == tally.Counts(images=2, before=244, after=61)
    assert tally.snapshot()["others"] == tally.Counts(1, 10, 10)


def test_a_snapshot_does_not_change_later() -> None:
    tally.add("still", 1, 1)
    before = tally.snapshot()
    tally.add("still", 1, 1)
    assert before["still"].images == 1


def test_no_image_of_many_threads_is_lost() -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: tally.add("threads", 3, 2), range(20_000)))
    assert tally.snapshot()["threads"] == tally.Counts(20_000, 60_000, 40_000)
