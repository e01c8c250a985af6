"""Each extra may be deleted: all that is not its own goes on."""

import pytest

from test_service import EXTRAS, short_contract


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_that_is_deleted_is_not_missed(name, tmp_path):
    short_contract(name, tmp_path)
