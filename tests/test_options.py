"""Switches: what is one, and what only looks like one."""

from __future__ import annotations

import numpy as np
import pytest

from stepguard.options import check_switch


@pytest.mark.parametrize("value", [True, False, 0, 1, np.bool_(True)])
def test_a_switch_is_on_or_off(value):
    check_switch("progress", value)


@pytest.mark.parametrize("value", ["no", None, 3, 1.0, [True]])
def test_what_is_merely_true_or_false_is_none(value):
    with pytest.raises(TypeError, match="progress must be True or False, got"):
        check_switch("progress", value)
