"""The resume matrix, by real processes: the table that notebook 06 shows says what happens."""

import re

import pytest

from minisft.course.experiments.resharding import AS_IT_IS, REPAIRED, UNIVERSAL, Resumed, as_table, resume_matrix


@pytest.fixture(scope="module")
def attempts():
    return resume_matrix(ranks=(1,), say=lambda line: None)


def by_case(attempts):
    return {(a.saved_stage, a.stage, a.way): a for a in attempts}


@pytest.mark.distributed
def test_with_fewer_ranks_only_universal_checkpoints_go_on(attempts):
    found = by_case(attempts)
    assert {a.verdict for a in attempts if a.way == AS_IT_IS and a.saved_stage} == {"refused"}
    for saved in (1, 2):
        assert {found[saved, stage, UNIVERSAL].verdict for stage in (1, 2)} == {"exact"}
    assert found[1, 3, UNIVERSAL].verdict == found[3, 1, UNIVERSAL].verdict == "refused"
    assert all(a.refusal for a in attempts if a.verdict == "refused")
    assert not any(re.search(r"/tmp|\n", a.refusal) for a in attempts)


@pytest.mark.distributed
def test_stage_3_takes_up_a_universal_checkpoint_wrongly_and_can_be_repaired(attempts):
    wrong, repaired = by_case(attempts)[3, 3, UNIVERSAL], by_case(attempts)[3, 3, REPAIRED]
    assert wrong.verdict == "wrong"
    assert wrong.decays == (0.5, 0.5)
    assert wrong.one_counter
    assert wrong.difference > 1e-3
    assert repaired.verdict == "exact"
    assert (repaired.decays, repaired.one_counter) == ((0.5, 0.0), False)
    assert not [a for a in attempts if a.way == REPAIRED and a.stage != 3]


def test_the_table_has_a_column_for_each_target_and_a_line_for_each_checkpoint():
    attempts = [Resumed(1, 2, stage, ranks, UNIVERSAL, difference=0.0) for ranks in (2, 1) for stage in (1, 2)]
    attempts.append(Resumed(3, 2, 1, 2, AS_IT_IS, refusal="no"))
    lines = as_table(attempts, markdown=True).splitlines()
    assert lines[0].count("|") == 7
    assert lines[2] == "| 1 on 2 | universal | exact | exact | exact | exact |"
    assert lines[3] == "| 3 on 2 | as it is | refused |  |  |  |"
    assert as_table(attempts).splitlines()[2] == "3 on 2    as it is   refused"
