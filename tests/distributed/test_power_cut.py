"""Two power cuts around saves; tools/soak/power_cut.py makes more of them."""

import pytest

from tests.support import corpus

pytestmark = pytest.mark.exhaustive


def test_what_is_on_the_disk_at_a_power_cut_resumes_bit_equal(tmp_path, capsys):
    tool = corpus.tool("soak/power_cut")
    status = tool.main(["--cuts", "2", "--steps", "8", "--work", str(tmp_path)])
    printed = capsys.readouterr().out
    if status == tool.SKIPPED:
        pytest.skip(printed.strip())
    assert status == 0 and "2 power cuts, 2 came back bit-equal" in printed
