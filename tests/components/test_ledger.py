"""The ledger of retraining: its rules, on a folder and on a bucket that fails, and in any order of events."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from components.find_teachers.entries import ENTRIES, Claim, LedgerEntry, WorkItem
from components.find_teachers.ledger import RESERVATIONS, Ledger
from components.find_teachers.limits import RetrainLimits
from dmd2.errors import Refused
from dmd2.io.storage import join_uri, open_store
from tests.bucket import UPLOAD, Fault, Proxy

PLENTY = RetrainLimits(100, 1e9)


@dataclass
class Clock:
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["folder", "bucket"])
def ledger(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Ledger:
    place = request.getfixturevalue("bucket") if request.param == "bucket" else str(tmp_path)
    return Ledger(open_store(join_uri(place, "ledger")), clock)


def work(teacher: str = "teacher", recipe: str = "recipe", image: str = "image") -> WorkItem:
    return WorkItem(teacher=teacher, recipe=recipe, image=image)


def claimed(
    ledger: Ledger, what: WorkItem | None = None, limits: RetrainLimits = PLENTY, hours: float = 1
) -> Claim:
    claim = ledger.claim(what or work(), "gs://b/teacher", "watcher", hours, limits)
    assert claim
    return claim


def entry(ledger: Ledger, what: WorkItem | None = None) -> LedgerEntry:
    found = ledger.entry((what or work()).key)
    assert found
    return found


def test_it_needs_neither_torch_nor_kfp() -> None:
    """It runs in a small image."""
    names = "components.find_teachers.ledger, components.find_teachers.watch, components.find_teachers.run_reports"
    program = f"import sys; sys.modules.update(torch=None, kfp=None); import {names}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_entry_can_be_read_by_people(ledger: Ledger) -> None:
    claim = claimed(ledger)
    ledger.begin(claim, "run-1")
    ledger.done(claim, "run-1", "accepted", "gs://b/package")
    ledger.settle(claim.key)
    text = ledger.store.read(f"{ENTRIES}{work().key}.json").decode()
    told = json.loads(text)
    assert text.count("\n") > 10
    assert told["work"] == {"teacher": "teacher", "recipe": "recipe", "image": "image"}
    assert (told["state"], told["run"], told["package"]) == ("done", "run-1", "gs://b/package")
    assert told["changed"] == "2026-01-01T00:00:00Z"


def test_work_is_claimed_once(ledger: Ledger) -> None:
    claimed(ledger)
    assert ledger.claim(work(), "gs://b/teacher", "other", 1, PLENTY) is None
    assert entry(ledger).owner == "watcher"


def test_another_recipe_or_image_is_other_work(ledger: Ledger) -> None:
    keys = {work().key, work(recipe="b").key, work(image="b").key, work(teacher="b").key}
    assert len(keys) == 4


def test_of_many_that_claim_at_once_one_has_it(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: ledger.claim(work(), "t", "w", 1, PLENTY), range(8)))
    (claim,) = filter(None, claims)
    assert entry(ledger).holds(claim.token)


def test_many_that_claim_other_work_at_once_stay_within_the_limits(ledger: Ledger) -> None:
    limits = RetrainLimits(3, 1e9)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ledger.claim(work(f"t{n}"), "t", "w", 1, limits), range(8)))
    states = [entry.state for entry in ledger.entries()]
    assert states.count("claimed") == 3
    assert set(states) <= {"claimed", "waiting"}


def test_a_claim_is_read_as_it_is_written(ledger: Ledger) -> None:
    claim = claimed(ledger)
    assert Claim.read(claim.text) == claim
    assert claim.text.startswith(f"{ledger.store.uri}/entries/")


@pytest.mark.parametrize(
    "text", ["", "gs://b/ledger", "#t", "gs://b/entries/k.json#", "/entries/k.json#t", "gs://b/entries/k#t"]
)
def test_what_is_no_claim_is_refused(text: str, refusal: Callable[..., str]) -> None:
    assert repr(text) in refusal(lambda: Claim.read(text))


def test_a_run_begins_once_per_claim(ledger: Ledger, refusal: Callable[..., str]) -> None:
    claim = claimed(ledger)
    assert ledger.begin(claim, "run-1").state == "running"
    assert ledger.begin(claim, "run-1").run == "run-1"  # a step that is repeated
    assert "running by run run-1; run run-2 has no claim on it" in refusal(
        lambda: ledger.begin(claim, "run-2")
    )
    assert entry(ledger).run == "run-1"


def test_the_watcher_and_the_run_may_tell_the_same_in_any_order(ledger: Ledger) -> None:
    for first, second in ((ledger.record_run, ledger.begin), (ledger.begin, ledger.record_run)):
        claim = claimed(ledger, what := work(recipe=first.__name__))
        first(claim, "run-1")
        second(claim, "run-1")
        assert entry(ledger, what).state == "running"
        ledger.done(claim, "run-1", "rejected", "")
        assert ledger.record_run(claim, "run-1").state == "done"  # a watcher that was slow


def test_a_run_that_comes_after_its_claim_was_given_back_is_refused(
    ledger: Ledger, refusal: Callable[..., str]
) -> None:
    late = claimed(ledger)
    ledger.release(late, "the watcher was lost")
    assert entry(ledger).reason == "the watcher was lost"
    assert "is waiting" in refusal(lambda: ledger.begin(late, "late"))
    claim = claimed(ledger)
    assert claim.token != late.token
    assert "is claimed" in refusal(lambda: ledger.begin(late, "late"))
    assert ledger.release(late, "said again").state == "claimed"
    ledger.begin(claim, "run")
    assert "running by run run;" in refusal(lambda: ledger.begin(late, "late"))
    assert "running by run run;" in refusal(lambda: ledger.done(late, "late", "accepted", "p"))
    assert "running by run run;" in refusal(lambda: ledger.failed(late, "late", "why"))
    assert entry(ledger).claims == 2


def test_a_claim_with_a_run_is_not_given_back(ledger: Ledger) -> None:
    claim = claimed(ledger)
    ledger.begin(claim, "run")
    assert ledger.release(claim, "too late").state == "running"


def test_a_lease_only_says_when_to_look(ledger: Ledger, clock: Clock) -> None:
    claim = claimed(ledger)
    assert not ledger.lease_expired(entry(ledger))
    clock.forward(minutes=30)
    assert ledger.lease_expired(entry(ledger))
    assert ledger.claim(work(), "t", "other", 1, PLENTY) is None  # not before it was looked for
    ledger.begin(claim, "run")  # it was only slow
    clock.forward(days=30)
    assert not ledger.lease_expired(entry(ledger))


def test_what_is_done_is_never_claimed_again(ledger: Ledger) -> None:
    claim = claimed(ledger)
    ledger.begin(claim, "run")
    for _ in range(2):  # said twice
        ledger.done(claim, "run", "accepted", "gs://b/package")
    assert ledger.claim(work(), "t", "w", 1, PLENTY) is None
    with pytest.raises(Refused, match="is done by run run; that run run failed is not recorded"):
        ledger.failed(claim, "run", "afterwards")
    with pytest.raises(Refused, match="that run is over and gives way"):
        ledger.begin(claim, "run")


def test_after_three_failures_it_is_quarantined_with_its_reason(ledger: Ledger) -> None:
    for number in range(3):
        claim = claimed(ledger)
        ledger.begin(claim, f"run-{number}")
        for _ in range(2):  # said twice, counted once
            ledger.failed(claim, f"run-{number}", f"diverged at step {number}")
    assert entry(ledger).state == "quarantined"
    assert entry(ledger).reason == "failed 3 times, at last: diverged at step 2"
    assert [failure.reason for failure in entry(ledger).failures] == [
        f"diverged at step {n}" for n in range(3)
    ]
    assert ledger.claim(work(), "t", "w", 1, PLENTY) is None


def test_watchers_that_are_lost_are_no_failures_of_the_teacher(ledger: Ledger) -> None:
    for _ in range(10):
        ledger.release(claimed(ledger), "lost")
    assert (entry(ledger).state, entry(ledger).claims, entry(ledger).failures) == ("waiting", 10, ())


def test_what_a_person_stopped_is_quarantined_at_once(ledger: Ledger) -> None:
    claim = claimed(ledger)
    ledger.begin(claim, "run")
    ledger.failed(claim, "run", "cancelled", for_good=True)
    assert (entry(ledger).state, entry(ledger).reason) == ("quarantined", "cancelled")


def test_an_entry_that_a_person_removes_is_done_anew(ledger: Ledger, refusal: Callable[..., str]) -> None:
    claim = claimed(ledger)
    ledger.store.delete([f"{ENTRIES}{work().key}.json"])
    assert "is not there" in refusal(lambda: ledger.begin(claim, "run"))
    ledger.begin(claimed(ledger), "run")


@pytest.mark.parametrize("name", [f"{ENTRIES}{work().key}.json", RESERVATIONS])
def test_what_another_version_has_written_is_refused_by_name(
    ledger: Ledger, refusal: Callable[..., str], name: str
) -> None:
    ledger.store.write(name, b'{"state": "asleep"}')
    assert f"{ledger.store.uri}/{name} is not of this version" in refusal(lambda: claimed(ledger))


def test_two_recipes_or_images_do_not_run_for_one_teacher_at_a_time(ledger: Ledger) -> None:
    claim = claimed(ledger)
    other = work(recipe="other", image="other")
    assert ledger.capacity(PLENTY).refusal(other, 1) == f"entry {claim.key} is at work on the same teacher"
    assert ledger.claim(other, "t", "w", 1, PLENTY) is None
    assert entry(ledger, other).state == "waiting"
    ledger.begin(claim, "run")
    assert ledger.claim(other, "t", "w", 1, PLENTY) is None
    ledger.done(claim, "run", "rejected", "")
    claimed(ledger, other)


def test_runs_are_bounded_in_number(ledger: Ledger) -> None:
    limits = RetrainLimits(2, 1e9)
    first, _ = (claimed(ledger, work(f"t{n}"), limits) for n in range(2))
    assert ledger.capacity(limits).refusal(work("t2"), 1) == "2 of at most 2 runs are at work"
    ledger.release(first, "no run")
    assert ledger.capacity(limits).refusal(work("t2"), 1) == ""
    claimed(ledger, work("t2"), limits)


def test_gpu_hours_are_bounded_within_a_window_failures_included(ledger: Ledger, clock: Clock) -> None:
    limits = RetrainLimits(10, 100, timedelta(days=7))
    claim = claimed(ledger, work("a"), limits, 60)
    ledger.begin(claim, "run")
    ledger.failed(claim, "run", "why")
    clock.forward(days=3)
    refusal = ledger.capacity(limits).refusal(work("a"), 60)
    assert refusal == "60 of at most 100 GPU-hours are spent in 7 days, a run takes 60"
    ledger.release(claimed(ledger, work("b"), limits, 40), "no run")  # so it costs nothing
    claim = claimed(ledger, work("c"), limits, 40)
    ledger.begin(claim, "run")
    clock.forward(days=4)
    assert "40 of at most 100" in ledger.capacity(limits).refusal(work("a"), 61)
    claimed(ledger, work("a"), limits, 60)
    clock.forward(days=30)
    assert "100 of at most 100" in ledger.capacity(limits).refusal(work("d"), 1)  # they are still at work
    assert len(json.loads(ledger.store.read(RESERVATIONS))["places"]) == 2


@pytest.mark.parametrize("fault", ["503", "drop", "lost", "cut"])
def test_a_bucket_that_fails_now_and_then_changes_nothing(bucket: str, proxy: Proxy, fault: Fault) -> None:
    """Above all an answer that is lost: the claim was written, and is known as one's own."""
    proxy.fail(".*", fault, share=0.15)
    proxy.fail(UPLOAD, fault, times=2)
    ledger = Ledger(open_store(f"{bucket}/ledger"))
    claim = claimed(ledger)
    assert ledger.claim(work(), "t", "other", 1, PLENTY) is None
    ledger.record_run(claim, "run")
    ledger.begin(claim, "run")
    with pytest.raises(Refused, match="gives way"):
        ledger.begin(claim, "other")
    ledger.failed(claim, "run", "why")
    claim = claimed(ledger)
    ledger.begin(claim, "run-2")
    ledger.done(claim, "run-2", "accepted", "p")
    (found,) = ledger.entries()
    assert (found.state, found.claims, len(found.failures)) == ("done", 2, 1)
    assert proxy.injected[fault] >= 3


@dataclass
class Run:
    """A run as the platform sees it: it may be told of its claim late, or twice."""

    claim: Claim
    work: WorkItem
    name: str
    at_work: bool = False


@dataclass
class World:
    """What was really claimed and run, next to what the ledger says."""

    claims: list[tuple[Claim, WorkItem]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where a file costs nothing to have on the disk."""
LIMITS = RetrainLimits(2, 7, timedelta(days=1))
WORKS = [work(f"t{t}", recipe) for t in range(3) for recipe in ("a", "b")]


class AnyOrder(RuleBasedStateMachine):
    """Watchers that are lost, slow or many, runs that come late, twice or never, told by whoever knows."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory(dir=MEMORY)
        self.clock, self.world = Clock(), World()
        self.ledger = Ledger(open_store(self.folder.name), self.clock)
        self.before: dict[str, LedgerEntry] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(what=st.sampled_from(WORKS))
    def claim(self, what: WorkItem) -> None:
        free = self.ledger.capacity(LIMITS).refusal(what, 1) == ""
        known = self.ledger.entry(what.key)
        claim = self.ledger.claim(what, "t", "w", 1, LIMITS)
        assert bool(claim) == (free and (known is None or known.state in ("waiting", "failed")))
        if claim:
            self.world.claims.append((claim, what))

    @rule(hours=st.integers(1, 30))
    def later(self, hours: int) -> None:
        self.clock.forward(hours=hours)

    @precondition(lambda self: self.world.claims)
    @rule(data=st.data())
    def create_a_run(self, data: st.DataObject) -> None:
        """Also for a claim that is long over, or that has one already."""
        claim, what = data.draw(st.sampled_from(self.world.claims))
        self.world.runs.append(Run(claim, what, f"run-{len(self.world.runs)}"))

    @precondition(lambda self: self.world.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        claim, _ = data.draw(st.sampled_from(self.world.claims))
        self.ledger.release(claim, "lost")

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def record_run(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.world.runs))
        try:
            self.ledger.record_run(run.claim, run.name)
        except Refused:
            assert not run.at_work

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.world.runs))
        try:
            self.ledger.begin(run.claim, run.name)
            run.at_work = True
        except Refused:
            assert not run.at_work

    @precondition(lambda self: any(run.at_work for run in self.world.runs))
    @rule(data=st.data(), end=st.sampled_from(["done", "failed", "died"]))
    def end(self, data: st.DataObject, end: str) -> None:
        run = data.draw(st.sampled_from([run for run in self.world.runs if run.at_work]))
        run.at_work = False
        if end == "done":
            assert self.ledger.done(run.claim, run.name, "accepted", "p").state == "done"
        else:  # by itself, or by a watcher that asked the platform
            assert self.ledger.failed(run.claim, run.name, end).state in ("failed", "quarantined")

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def say_something_untrue(self, data: st.DataObject) -> None:
        """By a run that is not at work: refused, or known already."""
        idle = [run for run in self.world.runs if not run.at_work]
        if not idle:
            return
        run = data.draw(st.sampled_from(idle))
        known = self.ledger.entry(run.work.key)
        assert known
        if known.is_run_of(run.claim.token, run.name) and known.state == "running":
            return  # it was told of, and has not begun
        with pytest.raises(Refused) if not known.is_run_of(run.claim.token, run.name) else _allowed():
            self.ledger.done(run.claim, run.name, "accepted", "p")
        assert self.ledger.entry(run.work.key) == known

    @invariant()
    def no_two_runs_of_a_teacher_are_at_work(self) -> None:
        teachers = [run.work.teacher for run in self.world.runs if run.at_work]
        assert len(teachers) == len(set(teachers)) <= LIMITS.runs

    @invariant()
    def entries_tell_a_possible_story(self) -> None:
        entries = {entry.work.key: entry for entry in self.ledger.entries()}
        for key, old in self.before.items():
            new = entries[key]
            assert new.claims >= old.claims
            assert new.failures[: len(old.failures)] == old.failures
            assert old.state not in ("done", "quarantined") or new == old
        for one in entries.values():
            assert (one.state == "quarantined") == (len(one.failures) >= self.ledger.max_failures)
            assert len({failure.claim for failure in one.failures}) == len(one.failures)
        self.before = entries


class _allowed:  # noqa: N801 - reads as a word
    """Whatever happens: said again, or refused."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is None or issubclass(kind, Refused)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
