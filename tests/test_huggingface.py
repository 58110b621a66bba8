"""The model types of Hugging Face transformers, built small from their configurations."""

from collections.abc import Callable

import pytest
from checks import check
from conftest import Covered
from zoo import hugging_face_model, hugging_face_types

import eulernet

transformers = pytest.importorskip("transformers")

QUICK = "bert t5 clip llama".split()
