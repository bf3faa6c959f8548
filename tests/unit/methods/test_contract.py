"""Every method keeps the contract that the package ships. A new method is tested by being registered."""

from __future__ import annotations

from hf_soup.methods import METHODS
from hf_soup.testing import MethodTests


class TestMethods(MethodTests):
    method = METHODS.built_in
