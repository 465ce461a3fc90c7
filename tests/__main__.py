"""Runs pytest on the named files: a py_test is a script, and a file of tests alone would run none of them."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
