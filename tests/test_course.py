import pytest

from minisft.course import check


@pytest.mark.parametrize(
    ("answer", "says"),
    [(None, "Not attempted"), ([1], "1 entries, and 2"), ([1, 3], "position 1, where you have 3"), ([1, 2], "Right")],
)
def test_check_tells_the_cases_apart(answer, says):
    assert says in check(answer, [1, 2])
