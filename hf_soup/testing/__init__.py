"""What methods, selections and tasks must do, as test classes: subclass one, name yours, and pytest runs the contract.

::

    from hf_soup.testing import MethodTests, SelectionTests


    class TestMedian(MethodTests):
        method = "median"

Needs pytest and hypothesis, ``pip install 'hf-soup[testing]'``. Nothing else of the package imports this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    import hypothesis as hypothesis
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"hf_soup.testing needs pytest and hypothesis, and there is no {error.name}: pip install 'hf-soup[testing]'",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from hf_soup.testing.method_tests import (
        MethodTests as MethodTests,
        mix as mix,
        rounded as rounded,
        same_bits as same_bits,
    )
    from hf_soup.testing.selection_tests import SelectionTests as SelectionTests
    from hf_soup.testing.task_tests import TaskTests as TaskTests
else:
    from hf_soup._util.lazy import lazy_exports

    # Before they are imported: of an installed package pytest shows no values in failures otherwise.
    _FILES = ("registered", "method_tests", "selection_tests", "task_tests")
    pytest.register_assert_rewrite(*(f"{__name__}.{file}" for file in _FILES))
    __getattr__, __dir__ = lazy_exports(__name__)
