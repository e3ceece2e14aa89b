"""The command that changes the kernels, in a short form."""

import pytest

from . import mutate


def test_changes_that_nobody_sees_are_changes() -> None:
    """Of a kernel that has been rewritten, the reason is another one."""
    args = mutate.Args(signs=10**6, masks=10**6)
    found = {f"{one.kernel}: {one.what}" for file in mutate.TESTS for one in mutate.mutations(file, args)}
    assert set(mutate.SAME) - found == set()


def test_a_change_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(mutate.TESTS, "triton/ids.py", ("tests/test_kernels.py", "-k", "marks_of_equal_ids"))
    assert mutate.main(mutate.Args(match="mark_alike", signs=1, masks=0)) == 0
    change, result = capsys.readouterr().out.splitlines()
    assert "tests/test_kernels.py::test_marks_of_equal_ids" in change
    assert result == "1 changes, 0 survive"
