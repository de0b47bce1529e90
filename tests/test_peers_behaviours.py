"""What users of seven other libraries rely on, because the test suites there check it, as a list that is run here.

Each entry in the modules of `tests/peers` says whose suites check a behaviour, the behaviour in our words, and how it
is checked on our functions, over attacks, norms and dtypes where it belongs to all of them. The suites are those of
adversarial-library (adv-lib), cleverhans, foolbox, torchattacks, advertorch, AutoAttack and RobustBench. What a peer's
users expect and we decided against is in `tests/peers/different.py`; `docs/migrate/behaviours.md` says why.
"""

import math
from pathlib import Path

import pytest

from tests.peers import autoattack, budgets, different, geometry, models, success, unchanged, verdicts
from tests.peers.listing import DIFFERENT, EXPECTED, PEERS

LISTS = (budgets, geometry, success, unchanged, models, verdicts, autoattack, different)


@pytest.mark.parametrize(("check", "values"), [case for one in EXPECTED for case in one.cases()])
def test_what_users_of_peers_expect(check, values):
    check(**values)


@pytest.mark.parametrize(("check", "values"), [case for one in DIFFERENT for case in one.cases()])
def test_what_is_different_on_purpose(check, values):
    check(**values)


def test_the_list_is_broad_and_names_its_peers():
    statements = [one.behaviour for one in (*EXPECTED, *DIFFERENT)]
    assert len(set(statements)) == len(statements) > 130
    named = {peer: sum(peer in one.peers.split(", ") for one in EXPECTED) for peer in PEERS}
    assert {peer for one in (*EXPECTED, *DIFFERENT) for peer in one.peers.split(", ")} == PEERS
    assert min(named.values()) >= 4
    assert sum(math.prod(map(len, one.over.values())) for one in EXPECTED) > 425


def test_the_page_gives_the_reason_for_each_difference():
    page = (Path(__file__).parents[1] / "docs" / "migrate" / "behaviours.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for one in DIFFERENT:
        assert any(row.startswith(f"| {one.behaviour} | {one.peers} |") for row in rows), one.behaviour
